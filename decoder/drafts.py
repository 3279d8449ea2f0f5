"""A route's live draft: staged aside from an artifact, then copied into the running tensors between two steps."""

import math
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from decoder.models import SlotModel, own_weights
from online.artifacts import WEIGHTS
from online.errors import ArtifactError


class LiveDraft:
    def __init__(self, route: str, model: SlotModel) -> None:
        self.route = route
        self.model = model
        self.version = 0  # 0: the weights it was built with, not registered yet
        self.usable = True  # False after a forward failed: the route is decoded plainly until weights are installed
        self._failed_at = -math.inf

    def fail(self) -> None:
        self.usable, self._failed_at = False, time.monotonic()

    def failed_within(self, seconds: float) -> bool:
        return time.monotonic() - self._failed_at < seconds

    def stage(self, folder: Path) -> dict[str, Tensor]:
        """Reads an artifact onto the device, beside the live weights. Any thread may call it.

        Raises:
            ArtifactError: unreadable, or names, shapes or values that this draft can't take.
        """
        live = own_weights(self.model.module)
        try:
            stored = safetensors.torch.load_file(folder / WEIGHTS)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{folder.name[:12]}: weights can't be read: {error}") from error
        if stored.keys() != live.keys():
            odd = sorted(stored.keys() ^ live.keys())
            raise ArtifactError(f"{folder.name[:12]}: tensors differ from the live draft's: {', '.join(odd[:3])}")
        for name, tensor in stored.items():
            if tensor.shape != live[name].shape:
                raise ArtifactError(
                    f"{folder.name[:12]}: {name} has shape {tuple(tensor.shape)}, not {tuple(live[name].shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ArtifactError(f"{folder.name[:12]}: {name} has values that are no numbers")
        return {name: tensor.to(live[name].device, live[name].dtype) for name, tensor in stored.items()}

    @torch.inference_mode()
    def install(self, staged: dict[str, Tensor], version: int) -> None:
        """Copies staged weights into the live tensors, whose addresses stay. Only between two steps.

        The draft's KV cache keeps what the old weights wrote: that costs a little acceptance, never correctness.

        Raises:
            ArtifactError: the device does not hold what was copied.
        """
        live = own_weights(self.model.module)
        for name, tensor in staged.items():
            live[name].data.copy_(tensor)
        self.version, self.usable = version, all(torch.equal(live[n], t) for n, t in staged.items())
        if not self.usable:
            raise ArtifactError(f"version {version}: the device does not hold the weights that were copied")
