"""Rejected branches, trained in the same forward as the path that they leave."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from decoder.drafters.registry import teaching_by_route
from online.settings import Settings
from online.signals import Signal
from tests.signals import signal
from tests.tiny import TinyPair
from tests.training.conftest import load
from trainer.batches import collate
from trainer.distill import distill
from trainer.examples import BRANCH, MASK, Example
from trainer.losses import accepts_positions, draft_logits, position_losses
from trainer.recipe import Recipe
from trainer.recipe_search import CANDIDATES, configured_recipe

pytestmark = pytest.mark.usefixtures("short_rehearsals")


def drafted(request_id: str = "r", prompt: tuple[int, ...] = (5, 6, 7)) -> Signal:
    """Three steps of three drafted tokens: one accepted, none, all. 12 positions."""
    return signal(
        request_id,
        prompt_ids=np.array(prompt, np.int32),
        output_ids=np.array([10, 11, 12, 13, 14, 15, 16], np.int32),
        step_start=np.array([0, 2, 3], np.int32),
        step_drafted=np.array([3, 3, 3], np.int32),
        step_accepted=np.array([1, 0, 3], np.int32),
        branch_ids=np.array([90, 91, 80, 81, 82], np.int32),
        top_ids=np.arange(12 * 4, dtype=np.int32).reshape(12, 4),
        top_logp=np.full((12, 4), np.log(0.2), np.float16),
        rest_mass=np.full(12, 0.2, np.float16),
    )


def contexts(drafts: Signal) -> dict[int, list[int]]:
    """By position: the tokens that it was verified after, written from the contract of a signal."""
    prompt, output = drafts.prompt_ids.tolist(), drafts.output_ids.tolist()
    found: dict[int, list[int]] = {}
    first = 0
    for start, accepted, branch in zip(
        drafts.step_start, drafts.step_accepted, drafts.step_branch, strict=True
    ):
        own = drafts.branch_ids[first : first + branch].tolist()
        for j in range(accepted + 1):
            found[len(found)] = [*prompt, *output[: start + j]]
        for j in range(branch):
            found[len(found)] = [*prompt, *output[: start + accepted], *own[: j + 1]]
        first += branch
    return found


def test_a_branch_is_what_was_drafted_and_rejected() -> None:
    """Where it leaves the path, its first token, its length, the position after its first token."""
    assert list(drafted().branches()) == [(1, 0, 2, 2), (2, 2, 3, 5)]


@pytest.mark.parametrize("branch_tokens", [0, 1, 2, 16])
def test_every_supervised_position_is_computed_in_its_own_context(
    pair: TinyPair, branch_tokens: int
) -> None:
    """A forward with a tree mask gives the logits of a forward of each context alone."""
    signals = [
        drafted("a"),
        drafted("b", prompt=(9,)),
        signal("c", prompt_ids=np.arange(4, 20, dtype=np.int32)),
    ]
    module = load(pair.draft)
    examples = [Example.of(s, branch_tokens) for s in signals]
    with torch.no_grad():
        together_PV = draft_logits(module, collate(examples, 3, "cpu"))
        n = 0
        for example in examples:
            of = contexts(example.signal)
            for logged in example.verified_P:
                alone_V = module(torch.tensor([of[int(logged)]])).logits[0, -1]
                assert torch.allclose(together_PV[n], alone_V, atol=1e-4)
                n += 1
    assert n == len(together_PV)


def test_branches_add_their_positions_once() -> None:
    """All verified positions are on the path or on a branch, none twice."""
    example = Example.of(drafted(), branch_tokens=16)
    assert sorted(example.verified_P.tolist()) == list(range(12))
    assert (example.kind_P == BRANCH).sum() == 5
    assert (Example.of(drafted(), branch_tokens=1).kind_P == BRANCH).sum() == 2


def test_an_answer_that_ended_inside_a_draft_has_no_branch_there() -> None:
    """A stop string cuts accepted tokens. What came after was never emitted: no rejection."""
    cut = replace(drafted(), output_ids=np.array([10], np.int32))
    assert list(cut.branches()) == []
    assert Example.of(cut, 16).verified_P.tolist() == [0]


def test_branch_weight_zero_learns_what_the_path_alone_teaches(
    pair: TinyPair, answers: list[Signal]
) -> None:
    """The weight is a weight: with none, branches change nothing but rounding."""
    made = []
    for recipe in (Recipe(epochs=1), Recipe(epochs=1, branch_tokens=4, branch_weight=0.0)):
        module = load(pair.draft)
        distill(module, [[*answers[:7], drafted("x")]], recipe, pad_id=3)
        made.append(module.state_dict())
    assert all(torch.allclose(made[0][name], made[1][name], atol=1e-4) for name in made[0])


def test_branches_are_learnt_from(pair: TinyPair) -> None:
    """With a weight they count as positions and change the draft."""
    module = load(pair.draft)
    told = distill(
        module, [[drafted()]], Recipe(epochs=2, branch_tokens=4, branch_weight=0.5), pad_id=3
    )
    assert told.positions == 2 * 12


@pytest.mark.parametrize("drafter", [None, "tree", "parallel", "exits", "auto"])
def test_decoders_record_as_much_of_branches_as_any_recipe_learns_from(
    drafter: str | None,
) -> None:
    """The configured recipe of every drafter, and whatever else a cycle may choose."""
    for recipe, expected in (({}, 0), ({"branch_tokens": 4}, 4)):
        told = {"recipe": recipe, "drafters": {"default": {"drafter": drafter}}}
        configured = Settings.model_validate(told)
        base = configured_recipe(configured, teaching_by_route(configured)["default"], 0)
        assert configured.branch_tokens == base.branch_tokens == expected
        assert {replace(base, **change).branch_tokens for change in CANDIDATES} == {expected}
    with pytest.raises(ValidationError):
        _ = Settings(recipe={"branch_tokens": -1}).branch_tokens


def test_models_that_count_positions_themselves_get_no_branches() -> None:
    """A forward without position_ids can't be told where a branch's token stands."""

    class Alibi(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None: ...

    assert not accepts_positions(Alibi())


def test_masks_hold_the_places_of_what_follows(pair: TinyPair) -> None:
    """Each mask is computed as in a forward of the context and the masks before it."""
    taught_by = signal("m", prompt_ids=np.array([5, 6, 7], np.int32))
    module = load(pair.draft)
    example, text = Example.of(taught_by, 0, 3, 3), [5, 6, 7, *taught_by.output_ids.tolist()]
    path = [place for place, _ in taught_by.path()]
    expected = [
        (start, path[at + k])
        for at, start in enumerate(path)
        if at % 2 == 1
        for k in range(min(3, len(path) - at))
    ]
    with torch.no_grad():
        masked = example.kind_P == MASK
        assert masked.sum() == len(expected)
        found_PV = draft_logits(
            module, collate([example, Example.of(signal("longer"), 0, 2, 3)], 3, "cpu")
        )
        for n, (start, place) in zip(np.flatnonzero(masked), expected, strict=True):
            fed = [*text[: 3 + start - 1], *[3] * (place - start + 1)]
            assert torch.allclose(found_PV[n], module(torch.tensor([fed])).logits[0, -1], atol=1e-4)
            assert example.verified_P[n] == dict(taught_by.path())[place]


def test_masks_are_learnt_from(pair: TinyPair, answers: list[Signal]) -> None:
    """Two places ahead, the draft comes nearer to the target than one trained without masks."""
    signals, told = answers[:60], {}
    for masks in (0, 2):
        module = load(pair.draft)
        distill(module, [signals], Recipe(epochs=4, rehearsal=0, masks=masks), pad_id=3)
        batch = collate([Example.of(one, 0, 2, 3) for one in signals[:20]], 3, "cpu")
        with torch.no_grad():
            loss_P = position_losses(draft_logits(module, batch), batch, Recipe())
        told[masks] = loss_P[batch.kind_P == MASK].mean().item()
    assert told[2] < told[0] - 0.1
