"""The signal: what one finished request teaches. One record per request, as safetensors.

A step is one target forward. Its positions begin with one for every token that it emitted: the
target's distribution after the prompt and the output so far. Behind a rejection follow positions
of the rejected branch: the distributions after its first 1, 2, … `branch_tokens` tokens.

A new field of positions is declared in `Signal`, with None for older records, and in `_ARRAYS`,
filled in `decoder/recording/observation.py`, and read in the trainer.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize

from online.errors import SignalError
from online.old_signals import OLD_VERSIONS, branches_of

SIGNAL_VERSION = 3
READABLE_VERSIONS = [str(version) for version in range(1, SIGNAL_VERSION + 1)]
Ints = NDArray[np.int32]
Floats = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Signal:
    request_id: str
    route: str
    temperature: float
    top_p: float
    top_k: int
    model: str  # fingerprint of the target that answered; signals of replaced targets are not used
    branch_tokens: int  # recorded tokens of every rejected branch, at most
    prompt_ids: Ints
    output_ids: Ints
    step_start: Ints  # index into output_ids of the first token that the step could emit
    step_drafted: Ints
    step_accepted: Ints
    branch_ids: Ints  # tokens of the recorded branches, one branch after another
    top_ids: Ints  # the target's most likely tokens
    top_logp: Floats  # their log-probabilities at temperature 1
    rest_mass: Floats  # probability of all other tokens together
    acceptance: float | None = None  # mean Σ min(p, q) as served; None: nothing was compared
    client: str = ""  # `pseudonym` of who asked; empty: nobody in particular

    @property
    def origin(self) -> str:
        """The request: its n answers share all but what follows the last `#`."""
        return self.request_id.rsplit("#", 1)[0]

    @property
    def step_branch(self) -> Ints:
        """Recorded tokens of each step's rejected branch."""
        rejected = self.step_drafted - self.step_accepted
        return rejected.clip(max=self.branch_tokens)

    def path(self) -> Iterator[tuple[int, int]]:
        """(index into output_ids, position) of every emitted token, in order."""
        position = 0
        for start, accepted, branch in self._steps():
            for j in range(accepted + 1):
                if start + j < len(self.output_ids):
                    yield start + j, position + j
            position += accepted + 1 + branch

    def branches(self) -> Iterator[tuple[int, int, int, int]]:
        """Every recorded branch, in order.

        (index into output_ids where it leaves the emitted path, index into branch_ids of its first
        token, its recorded tokens, position after its first token). Where the output ended inside
        the accepted tokens there is no branch: nothing was rejected.
        """
        first = position = 0
        for start, accepted, branch in self._steps():
            if branch and start + accepted < len(self.output_ids):
                yield start + accepted, first, branch, position + accepted + 1
            first += branch
            position += accepted + 1 + branch

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        """Start, accepted tokens and recorded branch tokens of every step."""
        columns = self.step_start, self.step_accepted, self.step_branch
        return zip(*(column.tolist() for column in columns), strict=True)


# Type and shape of every array: axes of one name have the same length.
_ARRAYS: dict[str, tuple[type[np.generic], tuple[str, ...]]] = {
    "prompt_ids": (np.int32, ("prompt",)),
    "output_ids": (np.int32, ("output",)),
    "step_start": (np.int32, ("step",)),
    "step_drafted": (np.int32, ("step",)),
    "step_accepted": (np.int32, ("step",)),
    "branch_ids": (np.int32, ("branch",)),
    "top_ids": (np.int32, ("position", "k")),
    "top_logp": (np.float16, ("position", "k")),
    "rest_mass": (np.float16, ("position",)),
}
_SCALARS = [field.name for field in fields(Signal) if field.name not in _ARRAYS]
_DTYPES = {np.dtype("<u2"): "uint16", np.dtype("<i4"): "int32", np.dtype("<f2"): "float16"}


def pseudonym(client: str) -> str:
    """Stands for a client in the buffer: tells clients apart and can't be read as a name."""
    return hashlib.sha256(client.encode(errors="surrogatepass")).hexdigest()[:16] if client else ""


def typed(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Arrays of a signal in the types that it holds them in."""
    return {name: array.astype(_ARRAYS[name][0]) for name, array in arrays.items()}


def encode(signal: Signal) -> bytes:
    """The record as bytes. Token ids of vocabularies up to 65,536 take two bytes each."""
    header = json.dumps({name: getattr(signal, name) for name in _SCALARS})
    arrays = {name: _narrow(getattr(signal, name)) for name in _held(signal)}
    # Not `safetensors.numpy.save`: its look-up of dtype names takes most of the time.
    specs = {
        name: TensorSpec(
            dtype=_DTYPES[array.dtype],
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    metadata = {"signal_version": str(SIGNAL_VERSION), "signal": header}
    return bytes(serialize(specs, metadata=metadata))


def decode(record: bytes) -> Signal:
    """Reads what `encode` wrote, in this version or an earlier one.

    Raises:
        SignalError: the bytes are no signal, are damaged, or have an unknown version.
    """
    try:
        metadata = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])["__metadata__"]
        version = metadata["signal_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise SignalError(f"not a signal record: {error}") from error
    if version not in READABLE_VERSIONS:
        known = ", ".join(READABLE_VERSIONS)
        raise SignalError(f"signal version {version} is unknown; readable are versions {known}")
    try:
        arrays = safetensors.numpy.load(record)
        header = json.loads(metadata["signal"])
        if version in OLD_VERSIONS:
            header["branch_tokens"], arrays["branch_ids"] = branches_of(arrays)
        found = {name: arrays[name] for name in _ARRAYS if name in arrays}
        signal = Signal(**header, **typed(found))
        _check(signal)
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError) as error:
        raise _damaged(str(error)) from error
    return signal


def _narrow(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """As it is written: contiguous, little-endian, ids in two bytes where they fit."""
    if array.dtype != np.int32:
        return np.ascontiguousarray(array, dtype="<f2")
    small = array.size == 0 or array.view(np.uint32).max() < 2**16  # a negative id is huge here
    return np.ascontiguousarray(array, dtype="<u2" if small else "<i4")


def _held(signal: Signal) -> list[str]:
    return [name for name in _ARRAYS if getattr(signal, name) is not None]


def _check(signal: Signal) -> None:
    """Raises SignalError where the parts do not fit together."""
    drafted, accepted = signal.step_drafted, signal.step_accepted
    if type(signal.branch_tokens) is not int or signal.branch_tokens < 0:
        raise _damaged(f"branch_tokens is {signal.branch_tokens!r}")
    if np.any(accepted < 0) or np.any(accepted > drafted):
        raise _damaged("more tokens accepted than drafted")
    branch = int(signal.step_branch.sum(dtype=np.int64))
    lengths = {
        "prompt": len(signal.prompt_ids),
        "output": len(signal.output_ids),
        "step": len(signal.step_start),
        "branch": branch,
        "position": int(accepted.sum(dtype=np.int64)) + len(accepted) + branch,
        "k": signal.top_ids.shape[-1],
    }
    for name in _held(signal):
        found = getattr(signal, name).shape
        expected = tuple(lengths[axis] for axis in _ARRAYS[name][1])
        if found != expected:
            raise _damaged(f"{name} has shape {found}, expected {expected}")


def _damaged(what: str) -> SignalError:
    return SignalError(f"damaged signal record: {what}")
