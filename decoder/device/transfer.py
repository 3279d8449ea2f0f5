"""Copies between host and device.

Legend: B sequences, N any columns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Download:
    """An asynchronous copy to the host. The first reader, on any thread, waits for it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].device.type == "cpu":
            self._tensors = list(tensors)
            return
        self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for here, there in zip(self._tensors, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def arrays(self) -> list[NDArray[Any]]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def upload(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """Copies an array to the device without waiting for the copy."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[list[Any]]:
    """Small tensors, [B] or [B, N], as lists, in one transfer that is waited for."""
    if tensors[0].device.type == "cpu":
        return [tensor.tolist() for tensor in tensors]
    return unpack(pack(tensors).cpu(), tensors)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """One float64 tensor, which holds any token id exactly."""
    return torch.cat([tensor.reshape(len(tensor), -1).to(torch.float64) for tensor in tensors], 1)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[list[Any]]:
    parts = torch.split(packed, [tensor[0].numel() for tensor in like], 1)
    return [
        part.to(tensor.dtype).view(tensor.shape).tolist()
        for part, tensor in zip(parts, like, strict=True)
    ]
