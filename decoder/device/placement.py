"""What differs between devices; nothing else in the decoder asks which one it runs on.

CPU: weight matrices lie in oneDNN's blocked layout. `F.linear` brings a matrix into that layout anew at every call, and
for a few tokens that costs more than the product. Elsewhere they are plain tensors at addresses that never change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from decoder.models.ops import Operations, Rotations, TorchOperations

EXPECTED_TOKENS = 32  # what oneDNN's layout is chosen for; it serves any number


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype | str:
    """The precision of served weights. "auto": as stored, but float32 on a CPU, where greedy answers are exact."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else "auto"


def spread_over_cores(threads: int) -> None:
    """Lets this thread's operations use `threads` cores (0: torch's default), and those of threads to come as well.

    One thread of a process only: OpenMP keeps a team of workers for each thread that asks for one, and teams that are
    more than the cores put each other to sleep at every operation, which doubles the time of a small forward.
    """
    if threads:
        torch.set_num_threads(threads)


def stay_on_one_core() -> None:
    """For every thread but the engine's: see `spread_over_cores`."""
    torch.set_num_threads(1)


def prefill_tokens(device: torch.device) -> int:
    """Prompt tokens that take about as long as a few decoding steps: running streams wait for them."""
    return 256 if device.type == "cpu" else 2048


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16 or AMX), and torch what uses them."""
    return _has_onednn() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _packs(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or not _has_onednn():
        return False
    return tensor.dtype == torch.float32 or (tensor.dtype == torch.bfloat16 and multiplies_bfloat16())


def padded(tokens: int, like: Tensor) -> int:
    """The number of tokens to multiply instead of `tokens`: oneDNN compiles a product for every number that it meets.

    A compiled product costs a millisecond and up to a megabyte, and there are five shapes of them in each model.
    """
    if not _packs(like) or tokens <= 16:
        return tokens
    rung = 8 if tokens <= 128 else 32
    return -(-tokens // rung) * rung


class Linear:
    """Weight matrices with the same input, stacked: one product for all of them.

    `weights` and `biases` are named as in a Hugging Face file; biases are there for all of the weights, or for none.
    """

    def __init__(self, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
        self.names = tuple(weights)
        self.sizes = [len(weight) for weight in weights.values()]
        self._bias = torch.cat(list(biases.values())) if biases else None
        self.biases = (
            dict(zip(biases, torch.split(self._bias, self.sizes), strict=True)) if self._bias is not None else {}
        )
        self._packed = _packs(next(iter(weights.values())))
        self._weight = self.pack(list(weights.values()))

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return F.linear(x, self._weight, self._bias)

    def pack(self, weights: Sequence[Tensor]) -> Tensor:
        """Other weights for the same place, laid out as this device multiplies them."""
        stacked = torch.cat(list(weights)) if len(weights) > 1 else weights[0].contiguous()
        if not self._packed:
            return stacked
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(stacked, EXPECTED_TOKENS)
        return packed

    def install(self, packed: Tensor) -> None:
        """Puts packed weights in place. Plain tensors keep their addresses, which captured CUDA graphs read."""
        if self._packed:
            self._weight = packed
        else:
            self._weight.copy_(packed)

    def holds(self, packed: Tensor) -> bool:
        return self._weight is packed or torch.equal(self._weight, packed)

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, as they are multiplied now."""
        dense = self._weight.to_dense() if self._packed else self._weight
        return dict(zip(self.names, torch.split(dense, self.sizes), strict=True))


def operations(rotations: Rotations, group: int) -> Operations:
    """What a Llama does between its products, `group` query heads to a key-value head."""
    cos_LD, _ = rotations
    if cos_LD.device.type == "cpu" and cos_LD.dtype in (torch.float32, torch.bfloat16):
        from decoder.models.ops_cpu import FusedOperations  # a GPU's process has no use for a compiler

        return FusedOperations(rotations, group)
    return TorchOperations(rotations, group)


def compiled(logits: Tensor) -> Any:
    """`decoder.verification.fused` for the logits that it serves, else None: torch's operations serve any."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        from decoder.verification import fused as vocabulary

        return vocabulary
    return None


class Download:
    """Tensors on their way to the host: sent at once, waited for by whoever reads them first, on any thread."""

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
    """A host array on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[list[Any]]:
    """Small tensors with the same first axis, [B] or [B, N], as lists: in one transfer, which is waited for."""
    if tensors[0].device.type == "cpu":
        return [tensor.tolist() for tensor in tensors]
    return unpack(pack(tensors).cpu(), tensors)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(len(tensor), -1).to(torch.float64) for tensor in tensors], 1)  # holds any token id


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[list[Any]]:
    parts = torch.split(packed, [tensor[0].numel() for tensor in like], 1)
    return [part.to(tensor.dtype).view(tensor.shape).tolist() for part, tensor in zip(parts, like, strict=True)]
