"""The signal record: what is written is read, and what is not a signal is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from online.errors import SignalError
from online.signals import SIGNAL_VERSION, decode, encode, pseudonym
from tests.signals import signal

RECORDS = Path(__file__).parents[1] / "records"  # of earlier versions, written by their code


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


def test_the_path_holds_emitted_tokens_and_skips_rejected_ones() -> None:
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


@pytest.mark.parametrize(("version", "client"), [(1, ""), (2, "someone")])
def test_records_of_earlier_versions_are_read(version: int, client: str) -> None:
    """What waits in a buffer when the service is updated is not lost. Version 1 knew no client."""
    record = (RECORDS / f"signal-v{version}.safetensors").read_bytes()
    assert f'"signal_version":"{version}"'.encode() in record
    found, today = decode(record), signal(client=client)
    for field in dataclasses.fields(today):
        if field.name not in ("branch_tokens", "acceptance"):
            left, right = getattr(found, field.name), getattr(today, field.name)
            assert np.array_equal(left, right), field.name
    assert found.acceptance == (None if version == 1 else 0.75)
    assert list(found.path()) == list(today.path())
    assert list(found.branches()) == list(today.branches())
    assert decode(encode(found)).step_branch.tolist() == [1, 0]


@pytest.mark.parametrize("branch_tokens", [0, 1, 2, 5])
def test_branches_are_cut_at_the_recipes_length(branch_tokens: int) -> None:
    """Four drafted with one accepted, then three accepted: the first step's branch has three."""
    branch = min(3, branch_tokens)
    made = signal(
        output_ids=np.array([10, 11, 12, 13, 14, 15], np.int32),
        step_start=np.array([0, 2], np.int32),
        step_drafted=np.array([4, 3], np.int32),
        step_accepted=np.array([1, 3], np.int32),
        branch_tokens=branch_tokens,
        branch_ids=np.arange(branch, dtype=np.int32),
        top_ids=np.zeros((6 + branch, 4), np.int32),
        top_logp=np.zeros((6 + branch, 4), np.float16),
        rest_mass=np.zeros(6 + branch, np.float16),
    )
    found = decode(encode(made))
    assert found.step_branch.tolist() == [branch, 0]
    assert list(found.branches()) == ([(1, 0, branch, 2)] if branch else [])
    assert [at for _, at in found.path()] == [0, 1, *range(2 + branch, 6 + branch)]


def test_a_pseudonym_tells_clients_apart_and_names_nobody() -> None:
    """The same for the same name, whatever characters it has; an empty name stays empty."""
    assert pseudonym("alice") == pseudonym("alice") != pseudonym("bob")
    assert "alice" not in pseudonym("alice")
    assert len(pseudonym("\udc80")) == 16
    assert pseudonym("") == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("branch_ids", np.zeros(7, np.int32)),
        ("branch_tokens", 0),
        ("branch_tokens", -1),
        ("step_start", np.zeros(3, np.int32)),
        ("rest_mass", np.zeros(1, np.float16)),
        ("step_accepted", np.array([3, 1], np.int32)),
        ("step_accepted", np.array([-1, 1], np.int32)),
        ("top_logp", np.zeros((5, 9), np.float16)),
    ],
)
def test_lengths_that_do_not_fit_are_refused(field: str, value: object) -> None:
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
