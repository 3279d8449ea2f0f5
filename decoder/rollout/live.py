"""A route's live draft: staged aside from an artifact, then copied into the running tensors between two steps."""

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from decoder.models.base import ServedModel
from decoder.policy.acceptance import ROUTE_MEMORY, Acceptance, RankAcceptance
from decoder.policy.token_acceptance import TokenAcceptance
from online.artifacts import WEIGHTS
from online.errors import ArtifactError


class LiveDraft:
    def __init__(self, route: str, model: ServedModel) -> None:
        self.route = route
        self.model = model
        self.canary: LiveDraft | None = None  # room for a candidate on trial, over the same slots
        self.generic: LiveDraft | None = (
            None  # of a cluster: what drafts for it until its own has proved itself
        )
        self.follows = False  # the generic draft, having no version of its own
        self.share = 0.0  # of the route's requests that the canary drafts for
        self.version = 0  # 0: the weights it was built with, not registered yet
        self.usable = True  # False after a forward failed: the route is decoded plainly until weights are installed
        self.acceptance = Acceptance(ROUTE_MEMORY)  # of the route's recent sequences
        self.rank_acceptance = RankAcceptance(self.acceptance)
        self.token_acceptance = (
            TokenAcceptance()
        )  # of what it drew in chains that stop by themselves
        self._failed_at = -math.inf

    def assigned(self, query_id: str) -> "LiveDraft":
        """The draft that a new sequence keeps to its end: this one or, for a share of the sequences, the canary.

        The sequences of a cluster without a draft of its own that works have the generic one, or that one's canary.
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

    def follow(self, generic: "LiveDraft") -> None:
        """Leaves new sequences to another route's draft."""
        self.generic, self.follows = generic, True

    def fail(self) -> None:
        self.usable, self._failed_at = False, time.monotonic()

    def failed_within(self, seconds: float) -> bool:
        return time.monotonic() - self._failed_at < seconds

    def stage(self, folder: Path) -> Any:
        """Reads an artifact onto the device, beside the live weights. Any thread may call it.

        Raises:
            ArtifactError: unreadable, or names, shapes or values that this draft can't take.
        """
        live = self.model.weights()
        try:
            stored = safetensors.torch.load_file(folder / WEIGHTS)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{folder.name[:12]}: weights can't be read: {error}") from error
        if stored.keys() != live.keys():
            odd = sorted(stored.keys() ^ live.keys())
            raise ArtifactError(
                f"{folder.name[:12]}: tensors differ from the live draft's: {', '.join(odd[:3])}"
            )
        for name, tensor in stored.items():
            if tensor.shape != live[name].shape:
                raise ArtifactError(
                    f"{folder.name[:12]}: {name} has shape {tuple(tensor.shape)}, not {tuple(live[name].shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ArtifactError(f"{folder.name[:12]}: {name} has values that are no numbers")
        return self.model.prepare(stored)

    @torch.inference_mode()
    def install(self, staged: Any, version: int) -> None:
        """Puts staged weights in place of the live ones. Only between two steps.

        The draft's KV cache keeps what the old weights wrote: that costs a little acceptance, never correctness.

        Raises:
            ArtifactError: the device does not hold what was copied.
        """
        self.usable = self.model.install(staged)
        self.version, self.follows = version, False
        self.acceptance.reset()
        self.rank_acceptance.reset()
        self.token_acceptance.reset()
        if not self.usable:
            raise ArtifactError(
                f"version {version}: the device does not hold the weights that were copied"
            )


def fraction(name: str) -> float:
    """A number in [0, 1) that is always the same for the same name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
