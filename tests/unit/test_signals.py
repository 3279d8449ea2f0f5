"""The signal record: what is written is read, and what is not a signal is refused."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from online.errors import SignalError
from online.signals import SIGNAL_VERSION, decode, encode, pseudonym
from tests.signals import signal


def test_a_signal_survives_the_wire() -> None:
    """Every field, with its type."""
    before = signal(client="someone")
    after = decode(encode(before))
    for field in dataclasses.fields(before):
        left, right = getattr(before, field.name), getattr(after, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            assert np.array_equal(left, right), field.name
        else:
            assert left == right


def test_ids_beyond_two_bytes_survive_too() -> None:
    """Vocabularies over 65,536 tokens travel as four bytes."""
    assert (
        decode(encode(signal(output_ids=np.array([1, 200_000, 3, 4], np.int32)))).output_ids[1]
        == 200_000
    )


def test_path_walks_emitted_tokens_and_skips_rejected_ones() -> None:
    """Step one accepts one of two and emits two; position 2 is off the path."""
    assert list(signal().path()) == [(0, 0), (1, 1), (2, 3), (3, 4)]


def test_path_ends_with_the_output() -> None:
    """A stop token inside a step cuts the step short."""
    assert list(signal(output_ids=np.array([10, 11, 12], np.int32)).path()) == [
        (0, 0),
        (1, 1),
        (2, 3),
    ]


def test_an_unknown_version_is_refused() -> None:
    """Refused, not guessed."""
    record = safetensors.numpy.save(
        {"a": np.zeros(1)}, {"signal_version": str(SIGNAL_VERSION + 1), "signal": "{}"}
    )
    with pytest.raises(SignalError, match=f"version {SIGNAL_VERSION + 1} is unknown"):
        decode(record)


def test_records_of_version_1_are_read_as_nobodys() -> None:
    """What waits in a buffer when the service is updated is not lost; it did not know its client."""
    record = encode(signal(client="someone"))
    header = json.loads(
        json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])["__metadata__"]["signal"]
    )
    assert header.pop("client") == "someone"
    old = safetensors.numpy.save(
        safetensors.numpy.load(record), {"signal_version": "1", "signal": json.dumps(header)}
    )
    assert decode(old).client == ""
    assert decode(old).output_ids.tolist() == signal().output_ids.tolist()


def test_a_pseudonym_tells_clients_apart_and_names_nobody() -> None:
    """The same for the same name, whatever characters it has; nobody stays nobody."""
    assert pseudonym("alice") == pseudonym("alice") != pseudonym("bob")
    assert "alice" not in pseudonym("alice")
    assert len(pseudonym("\udc80")) == 16
    assert pseudonym("") == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("draft_ids", np.zeros(7, np.int32)),
        ("rest_mass", np.zeros(1, np.float16)),
        ("step_accepted", np.array([3, 1], np.int32)),
        ("draft_top_logp", np.zeros((3, 9), np.float16)),
    ],
)
def test_lengths_that_do_not_fit_are_refused(field: str, value: np.ndarray) -> None:
    """A damaged record never reaches training."""
    with pytest.raises(SignalError, match="damaged"):
        decode(encode(signal(**{field: value})))


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 4000), value=st.integers(0, 255), cut=st.integers(0, 4000))
def test_damaged_bytes_raise_a_signal_error_and_nothing_else(at: int, value: int, cut: int) -> None:
    """Any byte changed, any length cut off: SignalError, or a record that still fits together."""
    record = bytearray(encode(signal()))
    record[at % len(record)] = value
    for damaged in (
        bytes(record),
        bytes(record)[: cut % len(record)],
        b"",
        json.dumps({}).encode(),
    ):
        try:
            decode(damaged)
        except SignalError:
            pass
