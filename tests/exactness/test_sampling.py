"""From logits to tokens: the corners that the enumeration does not reach."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoder.device.transfer import pack, unpack
from decoder.verification.sampling import Sampling, probabilities, sample


def of(temperature: float, top_k: int = 0, top_p: float = 1.0, vocabulary: int = 6) -> Sampling:
    return Sampling.of([temperature], [top_k], [top_p], vocabulary)


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1), min_size=2, max_size=8).filter(lambda w: sum(w) > 1e-3),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_token_of_probability_zero_is_never_sampled(weights: list[float], uniform: float) -> None:
    """Not at either end of the uniform either."""
    probs = torch.tensor([weights]) / sum(weights)
    assert probs[0, sample(probs, torch.tensor([uniform], dtype=torch.float64))] > 0


def test_greedy_takes_the_first_of_equals() -> None:
    """As argmax does, so that draft and target break ties alike."""
    assert probabilities(torch.tensor([[1.0, 3.0, 3.0, 0.0, 0.0, 0.0]]), of(0)).tolist() == [
        [0, 1, 0, 0, 0, 0]
    ]


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    """1e-30 divides logits beyond float32."""
    probs = probabilities(torch.tensor([[50.0, 49.0, -50.0, 0.0, 0.0, 0.0]]), of(1e-30))
    assert torch.isfinite(probs).all()
    assert probs[0, 0] == 1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_still_make_a_distribution(broken: float) -> None:
    """A broken draft proposes something; verification corrects it."""
    probs = probabilities(torch.tensor([[broken, 1.0, 2.0, broken, 0.0, 0.0]]), of(1.0))
    assert torch.isfinite(probs).all()
    assert probs.sum().item() == pytest.approx(1)


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    """0.5 + 0.3 reaches 0.7 only with the second token; the third is out."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    kept = probabilities(logits, of(1.0, top_p=0.7, vocabulary=3))
    assert kept[0].tolist() == pytest.approx([0.625, 0.375, 0], abs=1e-6)


def test_rows_keep_their_own_parameters() -> None:
    """A greedy row, a truncated one and a free one in one batch."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 6)))
    mixed = Sampling.of([0, 1, 0.7], [0, 2, 0], [1, 1, 1], 6)
    together = probabilities(logits, mixed)
    for i, alone in enumerate([of(0), of(1, 2), of(0.7)]):
        assert torch.allclose(together[i : i + 1], probabilities(logits[i : i + 1], alone))


def test_numbers_of_several_tensors_travel_as_one() -> None:
    """One transfer to the host preserves tensors of every type and shape."""
    tensors = (
        torch.tensor([2**40 + 1, 3]),
        torch.tensor([0.1, 0.2]),
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
    )
    assert unpack(pack(tensors), tensors) == [tensor.tolist() for tensor in tensors]
    empty = tensors[0], torch.empty(2, 0, dtype=torch.long)
    assert unpack(pack(empty), empty) == [[2**40 + 1, 3], [[], []]]
