"""The default route's clusters in one decoder process: its router for many threads, and the file that outlives it.

The file is written rarely, and aside before it takes its place. Whatever is wrong with it, no request fails: the
worst is that clusters begin anew, and their drafts learn what they are of now.
"""

import logging
import os
import threading
from collections.abc import Sequence

from online.clustering import ClusterRouter
from online.settings import Settings

log = logging.getLogger("slipstream.clusters")

SAVE_EVERY = 1000  # prompts between two writings, unless a cluster begins


class PromptClusters:
    def __init__(self, settings: Settings) -> None:
        self._generic, self._routes = settings.default_route, settings.cluster_routes
        self._path = settings.data_dir / "clusters.npz"
        self._lock = threading.Lock()
        self._router = self._restored()
        self._saved_at = self._router.prompts

    @classmethod
    def of(cls, settings: Settings) -> "PromptClusters | None":
        """None where no routes are learnt."""
        return cls(settings) if settings.learnt_routes else None

    def route(self, prompt_ids: Sequence[int], *, learn: bool) -> str:
        """The route of the prompt's cluster, or the default route where it has none."""
        with self._lock:
            known = len(self._router.sizes)
            cluster = self._router.assign(prompt_ids, learn=learn)
            due = (
                self._router.prompts - self._saved_at >= SAVE_EVERY
                or len(self._router.sizes) > known
            )
        if due:
            self.save()
        # A state may have more clusters than are wanted now: those are kept, and have no route.
        return (
            self._generic
            if cluster is None or cluster >= len(self._routes)
            else self._routes[cluster]
        )

    def size(self, route: str) -> int | None:
        """Prompts of the route's cluster so far; None where the route is no cluster's."""
        if route not in self._routes:
            return None
        cluster = self._routes.index(route)
        return self._router.sizes[cluster] if cluster < len(self._router.sizes) else 0

    def save(self) -> None:
        with self._lock:
            state, self._saved_at = self._router.to_bytes(), self._router.prompts
        aside = self._path.with_suffix(f".{threading.get_ident()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(state)
            os.replace(aside, self._path)
        except OSError as error:
            log.warning("clusters can't be kept in %s: %s", self._path, error)

    def _restored(self) -> ClusterRouter:
        try:
            return ClusterRouter.from_bytes(self._path.read_bytes(), len(self._routes))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.error("clusters begin anew: %s: %s", self._path, error)
        return ClusterRouter(len(self._routes))
