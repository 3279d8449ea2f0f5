"""Routes of prompt clusters in one decoder process: a router for many threads, and its file.

The file is written rarely, and atomically. If it can't be read or written, no request fails:
clusters start over, and their drafts then learn from the new clusters.
"""

import logging
import os
import threading
from collections.abc import Sequence

from online.clustering import ClusterRouter
from online.settings import Settings

log = logging.getLogger("slipstream.clusters")

SAVE_EVERY = 1000  # prompts between two writes, unless a cluster begins


class PromptClusters:
    """Sorts prompts of the default route into cluster routes. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._default_route = settings.default_route
        self._routes = settings.cluster_routes
        self._path = settings.data_dir / "clusters.npz"
        self._lock = threading.Lock()
        self._router = self._restored()
        self._saved_at = self._router.prompts

    @classmethod
    def of(cls, settings: Settings) -> "PromptClusters | None":
        """None if the settings ask for no clusters."""
        return cls(settings) if settings.learnt_routes else None

    def route(self, prompt_ids: Sequence[int], *, learn: bool) -> str:
        """The route of the prompt's cluster; the default route for an outlier."""
        with self._lock:
            before = len(self._router.sizes)
            cluster = self._router.assign(prompt_ids, learn=learn)
            has_grown = len(self._router.sizes) > before
            due = has_grown or self._router.prompts - self._saved_at >= SAVE_EVERY
        if due:
            self.save()
        # A saved state may have more clusters than the settings ask for: those have no route.
        if cluster is None or cluster >= len(self._routes):
            return self._default_route
        return self._routes[cluster]

    def size(self, route: str) -> int | None:
        """Prompts of the route's cluster so far; None if the route is not a cluster's."""
        if route not in self._routes:
            return None
        cluster = self._routes.index(route)
        return self._router.sizes[cluster] if cluster < len(self._router.sizes) else 0

    def save(self) -> None:
        with self._lock:
            state = self._router.to_bytes()
            self._saved_at = self._router.prompts
        aside = self._path.with_suffix(f".{threading.get_ident()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(state)
            os.replace(aside, self._path)
        except OSError as error:
            log.warning("can't save clusters in %s: %s", self._path, error)

    def _restored(self) -> ClusterRouter:
        try:
            return ClusterRouter.from_bytes(self._path.read_bytes(), len(self._routes))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.error("clusters start over: %s: %s", self._path, error)
        return ClusterRouter(len(self._routes))
