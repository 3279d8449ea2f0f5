# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""What compiled functions share: how they read tensors, the numbers in them, and e^x.

A step of a small model is hundreds of torch operations, and on a CPU calling one costs as much as what it computes.
numba compiles what stands in their place, when a process loads its first model of a precision.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from torch import Tensor

EXACT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
SUMS = EXACT | {"fastmath": {"reassoc", "contract"}}  # sums may be vectorised

njit: Any = numba.njit
_intrinsic: Any = intrinsic


def at(tensor: Tensor | None) -> int:
    """Where its numbers lie; 0 for none."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "kernels read tensors as they lie"
    return tensor.data_ptr()


def _pointer(kind: types.Type) -> Callable[[int], Any]:
    @_intrinsic
    def pointer(_: Any, address: Any) -> Any:
        signature = types.CPointer(kind)(types.int64)
        return signature, lambda context, builder, sig, args: builder.inttoptr(
            args[0], context.get_value_type(sig.return_type)
        )

    return pointer


floats, doubles = _pointer(types.float32), _pointer(types.float64)
words, integers, bools = _pointer(types.uint16), _pointer(types.int64), _pointer(types.uint8)


@njit(inline="always")
def from_bfloat16(word: Any) -> Any:
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@njit(inline="always")
def to_bfloat16(number: Any) -> Any:
    """Rounds to nearest even, as torch does."""
    bits = np.float32(number).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if number == number else np.uint16(0x7FC0)


@njit(inline="always")
def same(number: Any) -> Any:
    return np.float32(number)


@njit(inline="always")
def exp(x: Any) -> Any:
    """e^x to 1e-7, in arithmetic that vectorises: e^x = 2^n e^r with |r| ≤ ln 2 / 2, and e^r as its series."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.rint(x * np.float32(1.4426950408889634))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    e = np.float32(1 / 5040)
    e = e * r + np.float32(1 / 720)
    e = e * r + np.float32(1 / 120)
    e = e * r + np.float32(1 / 24)
    e = e * r + np.float32(1 / 6)
    e = e * r + np.float32(1 / 2)
    e = e * r + np.float32(1)
    e = e * r + np.float32(1)
    return e * np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
