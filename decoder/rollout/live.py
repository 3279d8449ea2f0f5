"""A route's live draft: staged from an artifact, then copied into the running tensors."""

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from decoder.models.base import ServedModel
from decoder.policy.acceptance import ROUTE_MEMORY, Acceptance, RankAcceptance
from decoder.policy.token_acceptance import TokenAcceptance
from online.artifacts import WEIGHTS
from online.errors import ArtifactError


class LiveDraft:
    def __init__(self, route: str, model: ServedModel) -> None:
        self.route = route
        self.model = model
        self.canary: LiveDraft | None = None  # a second draft, for candidates; same cache slots
        self.share = 0.0  # of the route's sequences that the canary drafts for
        self.generic: LiveDraft | None = None  # of a cluster: its parent route's draft
        self.follows = False  # the generic draft serves, since no version of its own is active
        self.version = 0  # 0: the weights it was built with, not registered yet
        self.usable = True  # False after a failed forward, until weights are installed
        self.acceptance = Acceptance(ROUTE_MEMORY)  # of the route's recent sequences
        self.rank_acceptance = RankAcceptance(self.acceptance)
        self.token_acceptance = TokenAcceptance()
        self._failed_at = -math.inf

    def assigned(self, query_id: str) -> "LiveDraft":
        """The draft of a new sequence, from its first token to its last.

        This one or, for a share of the sequences, the canary. A cluster whose own draft is
        missing or broken uses the generic draft, or that one's canary.
        """
        if self.generic is not None and (self.follows or not self.usable):
            return self.generic.assigned(query_id)
        if not self.share or self.canary is None or not self.canary.usable:
            return self
        return self.canary if fraction(f"{self.canary.version}:{query_id}") < self.share else self

    @property
    def serving(self) -> int:
        """The version that new sequences are drafted by."""
        return self.generic.version if self.generic is not None and self.follows else self.version

    @property
    def routes(self) -> tuple[str, ...]:
        """Routes whose draft may have served this one's sequences."""
        return (self.route,) if self.generic is None else (self.route, self.generic.route)

    def follow(self, generic: "LiveDraft") -> None:
        """Leaves new sequences to another route's draft."""
        self.generic = generic
        self.follows = True

    def fail(self) -> None:
        """A forward failed: the route decodes plainly until weights are installed."""
        self.usable = False
        self._failed_at = time.monotonic()

    def failed_within(self, seconds: float) -> bool:
        return time.monotonic() - self._failed_at < seconds

    def stage(self, folder: Path) -> Any:
        """Reads an artifact onto the device, beside the live weights. Any thread may call it.

        Raises:
            ArtifactError: unreadable, or names, shapes or values that this draft can't take.
        """
        name = folder.name[:12]
        try:
            stored = safetensors.torch.load_file(folder / WEIGHTS)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{name}: weights can't be read: {error}") from error
        self._check(name, stored)
        return self.model.prepare(stored)

    def _check(self, artifact: str, stored: dict[str, Tensor]) -> None:
        live = self.model.weights()
        if stored.keys() != live.keys():
            differing = ", ".join(sorted(stored.keys() ^ live.keys())[:3])
            raise ArtifactError(f"{artifact}: tensors differ from the live draft's: {differing}")
        for name, tensor in stored.items():
            found, expected = tuple(tensor.shape), tuple(live[name].shape)
            if found != expected:
                raise ArtifactError(f"{artifact}: {name} has shape {found}, not {expected}")
            if not torch.isfinite(tensor).all():
                raise ArtifactError(f"{artifact}: {name} has values that are no numbers")

    @torch.inference_mode()
    def install(self, staged: Any, version: int) -> None:
        """Puts staged weights in place of the live ones. Only between two steps.

        The draft's KV cache keeps what the old weights wrote. That costs a little acceptance and
        never correctness.

        Raises:
            ArtifactError: the device does not hold what was copied.
        """
        self.usable = self.model.install(staged)
        self.version = version
        self.follows = False
        self.acceptance.reset()
        self.rank_acceptance.reset()
        self.token_acceptance.reset()
        if not self.usable:
            raise ArtifactError(
                f"version {version}: the device does not hold the weights that were copied"
            )


def fraction(name: str) -> float:
    """A number in [0, 1), always the same for the same name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
