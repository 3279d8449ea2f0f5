# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""What compiled kernels share: compiler options and their disk cache, addresses, numbers, e^x.

A step of a small model is hundreds of torch operations. On a CPU, calling one takes as long as its
arithmetic, so numba compiles kernels that replace many of them. Kernels receive addresses; `at`
checks the tensors behind them.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

# Every file with compiled code, relative to `decoder/`.
KERNELS = ("device/numba_support.py", "models/ops_cpu*.py", "verification/fused*.py")


# ── the disk cache ──


def kernel_files() -> list[Path]:
    decoder = Path(__file__).parents[1]
    return sorted(path for pattern in KERNELS for path in decoder.glob(pattern))


def cache_folder() -> Path:
    """Where compiled code lies: a folder for each state of the kernels' sources.

    numba notices edits of the file that defines a kernel, but not of functions that it calls from
    other files. A folder named by the hash of all kernel files can hold nothing stale.

    Raises:
        RuntimeError: there is no home folder, and NUMBA_CACHE_DIR is not set.
    """
    sources = hashlib.sha256()
    for path in kernel_files():
        sources.update(path.read_bytes())
    chosen, shared = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / sources.hexdigest()[:16]
    base = Path(shared) if shared else Path.home() / ".cache"
    return base / "slipstream" / "numba" / sources.hexdigest()[:16]


def _enable_cache() -> bool:
    """Points numba to the cache folder. False where it cannot be written: all is compiled anew."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):
        return False
    numba.config.CACHE_DIR = str(folder)
    return True


EXACT: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},
    "cache": _enable_cache(),
}
SUMS = EXACT | {"fastmath": {"reassoc", "contract"}}  # sums may be vectorised

njit: Any = numba.njit
_intrinsic: Any = intrinsic
_overload: Any = overload


# ── addresses ──


def at(tensor: Tensor | None, dtype: torch.dtype) -> int:
    """The address of a tensor's numbers; 0 for None.

    Raises:
        TypeError: a kernel would misread the tensor.
    """
    if tensor is None:
        return 0
    if tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        raise TypeError(f"expected contiguous {dtype} on the CPU, got {_described(tensor)}")
    return tensor.data_ptr()


def rows_at(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """The address of rows that may lie apart, and the distance between them, in numbers.

    Raises:
        TypeError: a kernel would misread the tensor.
    """
    inner = tensor[0] if len(tensor) else tensor
    if tensor.dtype is not dtype or not inner.is_contiguous() or not tensor.is_cpu:
        raise TypeError(f"expected contiguous rows of {dtype} on the CPU, got {_described(tensor)}")
    return tensor.data_ptr(), tensor.stride(0)


def _described(tensor: Tensor) -> str:
    strides = tuple(tensor.stride())
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {strides} on {tensor.device}"


def _pointer(kind: types.Type) -> Callable[[int], Any]:
    @_intrinsic
    def pointer(_: Any, address: Any) -> Any:
        return types.CPointer(kind)(types.int64), _address_to_pointer

    return pointer


def _address_to_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[-1], context.get_value_type(signature.return_type))


@_intrinsic
def elements(_: Any, like: Any, address: Any) -> Any:
    """A pointer to numbers of the type of `like`."""
    return types.CPointer(like)(like, types.int64), _address_to_pointer


floats, doubles = _pointer(types.float32), _pointer(types.float64)
integers, bools = _pointer(types.int64), _pointer(types.uint8)


# ── numbers: float32, or bfloat16 in a uint16 ──


STORED = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}  # examples of their types


def load(number: Any) -> Any:
    """A stored number as float32. Compiled code only."""
    raise NotImplementedError


def store(number: Any, like: Any) -> Any:
    """A float32 in the type of `like`, rounded to nearest even. Compiled code only."""
    raise NotImplementedError


@_overload(load, inline="always", strict=False)
def _load(number: Any) -> Any:
    if isinstance(number, types.Integer):
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: np.float32(number)


@_overload(store, inline="always", strict=False)
def _store(number: Any, like: Any) -> Any:
    if isinstance(like, types.Integer):
        return _to_bfloat16
    return lambda number, like: np.float32(number)


def _to_bfloat16(number: Any, like: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.uint32(number != number)  # no branch: loops over it vectorise
    return np.uint16((rounded & (nan - np.uint32(1))) | (nan * np.uint32(0x7FC0)))


@njit(inline="always")
def exp(x: Any) -> Any:
    """e^x to 1e-7, vectorisable: e^x = 2^n e^r with |r| ≤ ln 2 / 2, and e^r as its series."""
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
