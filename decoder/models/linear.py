"""Products with weight matrices, in the layout that each device multiplies fastest.

On a CPU matrices lie in oneDNN's blocked layout. `F.linear` would convert a matrix to that layout
at every call, which costs more than the product of a few tokens. On other devices matrices are
plain tensors at addresses that never change.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EXPECTED_TOKENS = 32  # oneDNN chooses its layout for this number; it serves any


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products (AVX512-BF16 or AMX), and torch uses them."""
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
    """The number of tokens to multiply in place of `tokens`.

    oneDNN compiles a product for each number of tokens. That takes a millisecond and up to a
    megabyte, for each of five shapes in a model.
    """
    if not _packs(like) or tokens <= 16:
        return tokens
    rung = 8 if tokens <= 128 else 32
    return -(-tokens // rung) * rung


class Linear:
    """Weight matrices with the same input, stacked into one product.

    `weights` and `biases` have their Hugging Face names. Either all matrices have biases or none.
    """

    def __init__(self, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> None:
        self.names = tuple(weights)
        self.sizes = [len(weight) for weight in weights.values()]
        self._bias = torch.cat(list(biases.values())) if biases else None
        self.biases: dict[str, Tensor] = {}  # views of the stacked one
        if self._bias is not None:
            self.biases = dict(zip(biases, torch.split(self._bias, self.sizes), strict=True))
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
        """New weights for the same matrices, in this device's layout."""
        stacked = torch.cat(list(weights)) if len(weights) > 1 else weights[0].contiguous()
        if not self._packed:
            return stacked
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(stacked, EXPECTED_TOKENS)
        return packed

    def install(self, packed: Tensor) -> None:
        """Makes packed weights live. Plain tensors keep their addresses, which CUDA graphs read."""
        if self._packed:
            self._weight = packed
        else:
            self._weight.copy_(packed)

    def holds(self, packed: Tensor) -> bool:
        return self._weight is packed or torch.equal(self._weight, packed)

    def weights(self) -> dict[str, Tensor]:
        """The live weights by name."""
        dense = self._weight.to_dense() if self._packed else self._weight
        return dict(zip(self.names, torch.split(dense, self.sizes), strict=True))
