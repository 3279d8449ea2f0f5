"""The signal: what one finished request teaches. One record per request, versioned, safetensors on the wire.

Shapes: N output tokens, S target forwards ("steps"), D drafted tokens, V = D + S verified positions, K = top-k.

Position j of step s is the target's distribution after the prompt, `output_ids[:step_start[s]]` and the first j
tokens that this step drafted. It lies on the emitted path while j ≤ step_accepted[s]; beyond, it is the target
evaluated on the draft's own tokens, kept because nobody has to compute it again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize

from online.errors import SignalError

SIGNAL_VERSION = 2
READABLE_VERSIONS = ("1", "2")  # version 1 knew neither its acceptance nor its client
Ints = NDArray[np.int32]
Floats = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Signal:
    request_id: str
    route: str
    temperature: float
    top_p: float
    top_k: int
    model: str  # fingerprint of the target that answered: when it no longer does, its signals train no draft
    prompt_ids: Ints  # [P]
    output_ids: Ints  # [N]
    step_start: Ints  # [S] index into output_ids of the first token that the step could emit
    step_drafted: Ints  # [S]
    step_accepted: Ints  # [S]
    step_version: Ints  # [S] draft version that drafted
    draft_ids: Ints  # [D]
    draft_logp: Floats  # [D] the draft's log-probability of its own token, at temperature 1
    top_ids: Ints  # [V, K] the target's most likely tokens
    top_logp: Floats  # [V, K] their log-probabilities at temperature 1
    rest_mass: Floats  # [V] probability of all other tokens together
    draft_top_logp: (
        Floats  # [D, K] the draft's log-probabilities of those tokens, for drafted positions
    )
    acceptance: float | None = (
        None  # mean Σ min(p, q) as it was served, probes included; None: nothing was compared
    )
    client: str = (
        ""  # whose request it was, as `pseudonym` writes it; empty: nobody's in particular
    )

    @property
    def origin(self) -> str:
        """The request: its n answers share all but what follows the last `#`."""
        return self.request_id.rsplit("#", 1)[0]

    def path(self) -> Iterator[tuple[int, int]]:
        """(index into output_ids, verified position) of every emitted token, in order."""
        verified = 0
        for start, drafted, accepted in zip(
            self.step_start.tolist(),
            self.step_drafted.tolist(),
            self.step_accepted.tolist(),
            strict=True,
        ):
            for j in range(accepted + 1):
                if start + j < len(self.output_ids):
                    yield start + j, verified + j
            verified += drafted + 1

    def branches(self) -> Iterator[tuple[int, int, int, int]]:
        """Every rejected draft, in order.

        (index into output_ids where it leaves the emitted path, index into draft_ids of its first token, its tokens,
        verified position after its first token).
        """
        drafts = verified = 0
        for start, drafted, accepted in zip(
            self.step_start.tolist(),
            self.step_drafted.tolist(),
            self.step_accepted.tolist(),
            strict=True,
        ):
            if accepted < drafted and start + accepted < len(self.output_ids):
                yield (
                    start + accepted,
                    drafts + accepted,
                    drafted - accepted,
                    verified + accepted + 1,
                )
            drafts, verified = drafts + drafted, verified + drafted + 1


_ARRAYS = {
    "prompt_ids": np.int32,
    "output_ids": np.int32,
    "step_start": np.int32,
    "step_drafted": np.int32,
    "step_accepted": np.int32,
    "step_version": np.int32,
    "draft_ids": np.int32,
    "draft_logp": np.float16,
    "top_ids": np.int32,
    "top_logp": np.float16,
    "rest_mass": np.float16,
    "draft_top_logp": np.float16,
}
_NAMES = {np.dtype("<u2"): "uint16", np.dtype("<i4"): "int32", np.dtype("<f2"): "float16"}
_SCALARS = [f.name for f in fields(Signal) if f.name not in _ARRAYS]


def pseudonym(client: str) -> str:
    """What stands for a client in the buffer: enough to tell clients apart, and no name that someone could read."""
    return hashlib.sha256(client.encode(errors="surrogatepass")).hexdigest()[:16] if client else ""


def encode(signal: Signal) -> bytes:
    """The record as bytes. Token ids of vocabularies up to 65,536 travel as two bytes each."""
    header = json.dumps({name: getattr(signal, name) for name in _SCALARS})
    arrays = {name: _narrow(getattr(signal, name)) for name in _ARRAYS}
    # Not `safetensors.numpy.save`: looking up what numpy calls a dtype takes most of its time, and this is done for
    # every request, beside the engine.
    specs = {
        name: TensorSpec(
            dtype=_NAMES[array.dtype],
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }
    return bytes(
        serialize(specs, metadata={"signal_version": str(SIGNAL_VERSION), "signal": header})
    )


def decode(record: bytes) -> Signal:
    """Reads what `encode` wrote.

    Raises:
        SignalError: the bytes are no signal, are damaged, or carry a version this code does not know.
    """
    try:
        metadata = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])["__metadata__"]
        version = metadata["signal_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise SignalError(f"not a signal record: {error}") from error
    if version not in READABLE_VERSIONS:
        known = " and ".join(READABLE_VERSIONS)
        raise SignalError(
            f"signal version {version} is unknown; this service reads versions {known}"
        )
    try:
        arrays = safetensors.numpy.load(record)
        header = json.loads(metadata["signal"])
        header.update({name: arrays[name].astype(dtype) for name, dtype in _ARRAYS.items()})
        signal = Signal(**header)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SignalError(f"damaged signal record: {error}") from error
    _check_lengths(signal)
    return signal


def _narrow(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """As it is written: contiguous, little-endian."""
    if array.dtype == np.int32:
        small = array.size == 0 or array.view(np.uint32).max() < 2**16  # what is negative is huge
        return np.ascontiguousarray(array, dtype="<u2" if small else "<i4")
    return np.ascontiguousarray(array, dtype="<f2")


def _check_lengths(signal: Signal) -> None:
    steps, drafted = len(signal.step_start), int(signal.step_drafted.sum())
    expected = {
        "step_drafted": (signal.step_drafted.shape, (steps,)),
        "step_accepted": (signal.step_accepted.shape, (steps,)),
        "step_version": (signal.step_version.shape, (steps,)),
        "draft_ids": (signal.draft_ids.shape, (drafted,)),
        "draft_logp": (signal.draft_logp.shape, (drafted,)),
        "top_ids": (signal.top_ids.shape[:1], (drafted + steps,)),
        "top_logp": (signal.top_logp.shape, signal.top_ids.shape),
        "rest_mass": (signal.rest_mass.shape, (drafted + steps,)),
        "draft_top_logp": (signal.draft_top_logp.shape, (drafted, *signal.top_ids.shape[1:])),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise SignalError(f"damaged signal record: {name} has shape {found}, expected {wanted}")
    if np.any(signal.step_accepted > signal.step_drafted):
        raise SignalError("damaged signal record: more tokens accepted than drafted")
