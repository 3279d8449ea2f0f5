"""Distillation from signals alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import trainer.batches
from online.signals import Signal
from tests.signals import signal
from tests.tiny import VOCABULARY, TinyPair
from tests.training.conftest import load
from trainer.batches import batches, collate, split_by_memory
from trainer.distill import distill
from trainer.evaluation import evaluate
from trainer.examples import Example, held_out, usable
from trainer.gate import compare_drafts
from trainer.losses import draft_logits, layer_logits, position_losses
from trainer.recipe import Recipe

pytestmark = pytest.mark.usefixtures("short_rehearsals")


def test_a_spoilt_draft_improves_from_signals(pair: TinyPair, answers: list[Signal]) -> None:
    """The gate promotes it on held-out requests."""
    examples, held_out_set = answers[:120], answers[120:]
    before = load(pair.spoilt)
    trained = load(pair.spoilt)
    result = distill(trained, [examples], Recipe(learning_rate=3e-3, epochs=4), pad_id=3)
    assert result.last_loss < result.first_loss
    assert result.positions == 4 * 120 * 24
    assert compare_drafts(before, trained, held_out_set, gamma=4, pad_id=3).promote


def test_batches_beyond_memory_are_trained_in_parts(
    pair: TinyPair, answers: list[Signal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same steps and evaluation, to rounding, with memory for four, or less than one, request."""
    signals = answers[:24]
    found = []
    for room, most in ((2**27, 8), (100 * VOCABULARY, 4), (1, 1)):
        monkeypatch.setattr(trainer.batches, "MAX_LOGITS", room)
        sizes = [
            len(group) for group in split_by_memory([Example.of(s) for s in signals], VOCABULARY, 8)
        ]
        assert sum(sizes) == 24
        assert max(sizes) == most
        module = load(pair.draft)
        result = distill(module, [signals], Recipe(epochs=1, rehearsal=0), pad_id=3)
        found.append((result, evaluate(module, signals, 4, 3).tokens_R))
    for result, tokens_R in found[1:]:
        assert (result.steps, result.positions) == (found[0][0].steps, found[0][0].positions)
        assert result.last_loss == pytest.approx(found[0][0].last_loss, rel=1e-3)
        assert tokens_R == pytest.approx(found[0][1], rel=1e-2)


def test_the_same_seed_makes_the_same_draft(pair: TinyPair, answers: list[Signal]) -> None:
    """A repeated cycle publishes the same artifact."""
    signals = answers[:20]
    made = []
    for _ in range(2):
        module = load(pair.draft)
        distill(module, [signals], Recipe(epochs=1), pad_id=3)
        made.append(module.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_callback_can_stop_training_at_every_step(pair: TinyPair, answers: list[Signal]) -> None:
    """A worker that lost its lease does not train to the end."""

    class Lost(Exception): ...

    calls = []

    def on_step() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Lost

    module = load(pair.draft)
    with pytest.raises(Lost):
        distill(module, [answers[:40]], Recipe(), 3, on_step)


def test_supervised_positions_predict_the_emitted_tokens() -> None:
    """Column c predicts the token at c + 1; rejected positions are not on the path."""
    examples = [
        Example.of(signal("a")),
        Example.of(signal("b", prompt_ids=np.array([9], np.int32))),
    ]
    batch = collate(examples, pad_id=3, device="cpu")
    assert batch.ids_BT.tolist() == [[5, 6, 7, 10, 11, 12, 13], [9, 10, 11, 12, 13, 3, 3]]
    assert batch.mask[1].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert batch.sequence_P.tolist() == [0] * 4 + [1] * 4
    assert batch.column_P.tolist() == [2, 3, 4, 5, 0, 1, 2, 3]
    assert batch.target.ids_PK[:, 0].tolist() == [0, 4, 12, 16] * 2


def test_mixed_k_moves_the_cut_tokens_into_the_rest() -> None:
    """A route whose `signal_top_k` was lowered still trains on old signals."""
    batch = collate(
        [Example.of(signal("a", k=4)), Example.of(signal("b", k=2))], pad_id=3, device="cpu"
    )
    assert batch.target.ids_PK.shape[1] == 2
    assert batch.target.rest_P[:4].tolist() == pytest.approx([0.1 + 0.45] * 4, abs=2e-3)
    assert batch.target.rest_P[4:].tolist() == pytest.approx([0.1] * 4, abs=2e-3)


def test_one_request_in_five_is_held_out_by_its_id() -> None:
    """The same requests every time."""
    ids = [f"cmpl-{i}" for i in range(1000)]
    sides = [held_out(signal(i)) for i in ids]
    assert sides == [held_out(signal(i)) for i in ids]
    assert 150 < sum(sides) < 250


def test_every_signal_is_in_one_batch_of_a_pass(pair: TinyPair) -> None:
    """Grouping by length loses no signal."""
    signals = [signal(f"s{i}", prompt_ids=np.arange(i % 7 + 1, dtype=np.int32)) for i in range(37)]
    examples = [Example.of(s) for s in signals]
    seen = [
        example.signal.request_id
        for group in batches(examples, 8, np.random.default_rng(0))
        for example in group
    ]
    assert sorted(seen) == sorted(s.request_id for s in signals)


@pytest.mark.parametrize(
    "odd",
    [
        {"output_ids": np.zeros(0, np.int32)},
        {"top_ids": np.full((5, 4), 5000, np.int32)},
        {"prompt_ids": np.array([5000], np.int32)},
        {"top_logp": np.full((5, 4), np.nan, np.float16)},
    ],
)
def test_signals_of_another_vocabulary_or_without_numbers_are_left_out(
    odd: dict[str, np.ndarray],
) -> None:
    """They would index beyond the embedding, or poison the loss."""
    assert usable(signal(), 320)
    assert not usable(signal(**odd), 320)


def test_a_recipe_rejects_unknown_fields_and_values() -> None:
    """The error names them, instead of training with the default recipe."""
    assert Recipe.of({"epochs": 8, "divergence": "tvd++"}) == Recipe(epochs=8, divergence="tvd++")
    for chosen, said in (
        ({"epoch": 8}, "no field epoch"),
        ({"epochs": 0}, "epochs"),
        ({"divergence": "x"}, "'x'"),
    ):
        with pytest.raises(ValueError, match=said):
            Recipe.of(chosen)  # type: ignore[arg-type]


def test_selection_trains_on_the_share_with_most_to_gain(
    pair: TinyPair, answers: list[Signal]
) -> None:
    """AdaSPEC: a reference trains first, then the draft, on what the reference could learn."""
    module = load(pair.spoilt)
    result = distill(module, [answers[:16]], Recipe(epochs=1, selected_share=0.4), pad_id=3)
    assert result.positions == pytest.approx(0.4 * 16 * 24, abs=2)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "acceptance", "kl+acceptance"])
def test_temperatures_are_followed(pair: TinyPair, answers: list[Signal], name: str) -> None:
    """Greedy and warm requests are compared at their own temperatures, whatever the divergence."""
    signals = answers[:8]
    signals = [replace(s, temperature=(0.0, 0.7, 1.3)[i % 3]) for i, s in enumerate(signals)]
    module = load(pair.spoilt)
    result = distill(
        module, [signals], Recipe(epochs=6, divergence=name, follow_temperature=True), pad_id=3
    )
    assert result.last_loss < result.first_loss


def test_exit_weight_trains_the_earlier_layers(pair: TinyPair, answers: list[Signal]) -> None:
    """The first of two layers comes closer to the target than without the weight."""
    signals, result = answers[:60], {}
    for weight in (0.0, 1.0):
        module = load(pair.draft)
        distill(module, [signals], Recipe(epochs=4, rehearsal=0, exit_weight=weight), pad_id=3)
        batch = collate([Example.of(one) for one in signals[:20]], 3, "cpu")
        with torch.no_grad():
            said = layer_logits(module, batch)
            assert torch.allclose(said[0], draft_logits(module, batch), atol=1e-4)
            result[weight] = [position_losses(each, batch, Recipe()).mean().item() for each in said]
    assert result[1.0][1] < result[0.0][1] - 0.1
