"""Products with weight matrices, laid out as each device multiplies them.

On a CPU matrices lie in oneDNN's blocked layout. `F.linear` brings a matrix into that layout anew at every call, and
for a few tokens that costs more than the product. Elsewhere they are plain tensors at addresses that never change.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EXPECTED_TOKENS = 32  # what oneDNN's layout is chosen for; it serves any number


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16 or AMX), and torch what uses them."""
    return _has_onednn() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _packs(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or not _has_onednn():
        return False
    return tensor.dtype == torch.float32 or (
        tensor.dtype == torch.bfloat16 and multiplies_bfloat16()
    )


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
            dict(zip(biases, torch.split(self._bias, self.sizes), strict=True))
            if self._bias is not None
            else {}
        )
        self._packed = _packs(next(iter(weights.values())))
        self._weight = self.pack(list(weights.values()))

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
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
