"""Chains of n-grams and a model: exact wherever they stop, and in fewer forwards what an ordinary chain would be."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decoder.drafters import cascade, model
from decoder.drafters import chain as chains
from decoder.drafters.base import DraftGroup
from decoder.drafters.chain import Chain
from decoder.models.ragged import integers, ragged
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.policy.token_acceptance import Evidence, TokenAcceptance, draft_token, ngram
from decoder.sequence.ngram_index import NgramGuess
from decoder.verification.proposal import CHOSEN, Proposal, Tree
from decoder.verification.sampling import Sampling
from decoder.verification.tree_shape import chain_shape
from decoder.verification.verify import verify
from lab import enumeration
from lab.enumeration import DRAFT, TARGET, Case, distance, of_all, told
from tests.exactness.test_exactness import LIMIT, SETTINGS, either
from tests.tabular import TableModel

V = 4
CONTEXTS = [[1, 2, 3], [0, 1], [2, 2, 2, 2]]
CACHED, DRAFTED = [1, 1, 0], [4, 2, 3]
SEEN = Evidence(False, ngram(1), 0)
CHEAP, DEAR = DraftCost(0.0, 0.15, 0.1), DraftCost(0.0, 0.4, 0.1)  # of one row
Guesses = Callable[[list[int]], NgramGuess | None]


def made(context: list[int], held: int, most: int, guess: Guesses, **more: Any) -> Chain:
    """One that is the model's alone, unless said otherwise."""
    given_ = {
        "lead": most,
        "acceptance": 1.0,
        "share": NO_COST,
        "known": TokenAcceptance(),
        "greedy": False,
        **more,
    }
    return Chain(context, held, most, guess=guess, **given_)


# ── what the model drafts ──


@pytest.mark.parametrize(
    "temperatures", [[0.0] * 3, [1.0] * 3, [0.0, 0.7, 1.3]], ids=["greedy", "sampled", "both"]
)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_guesses_do_not_change_what_the_model_drafts(
    temperatures: list[float], seed: int, guessed: int
) -> None:
    """Where n-grams are not sure of them: the chain's tokens from its distributions, and the cache holds it."""
    rng = np.random.default_rng(guessed)
    uniform_BN = torch.from_numpy(np.random.default_rng(seed).random((3, 4)))
    sampling = Sampling.of(temperatures, [0, 3, 0], [1.0, 1.0, 0.8], V)
    rows, drafted_B = slice(0, 3), integers(DRAFTED, "cpu")
    fed = [context[start:] for context, start in zip(CONTEXTS, CACHED, strict=True)]
    starts_B, longest = integers(CACHED, "cpu"), max(map(len, CONTEXTS))
    unseen_BT, unseen_B = ragged(fed, "cpu"), integers(list(map(len, fed)), "cpu")
    shaped = drafted_B, chain_shape(4), sampling, uniform_BN
    expected = model.propose(primed(), rows, unseen_BT, unseen_B, starts_B, longest, *shaped)

    def guess(drafted: list[int]) -> NgramGuess | None:
        return NgramGuess(int(rng.integers(V)), SEEN, 0.9) if rng.random() < 0.7 else None

    table = primed()
    rows_of = [made(*asked, guess) for asked in zip(CONTEXTS, CACHED, DRAFTED, strict=True)]
    logits_BQV, probs_BQV, _ = cascade.propose(table, rows, rows_of, sampling, uniform_BN)
    for b, (one, count) in enumerate(zip(rows_of, DRAFTED, strict=True)):
        assert one.tokens == expected.tokens_BN[b, :count].tolist()
        for ours, theirs in (
            (probs_BQV, expected.probs_BQV),
            (torch.cat(logits_BQV, 1), torch.cat(expected.logits_BQV, 1)),
        ):
            assert torch.equal(ours[b, :count], theirs[b, :count])
        whole = [*CONTEXTS[b], *one.tokens]
        assert len(CONTEXTS[b]) <= one.held <= len(whole)
        assert table.context(b)[: one.held] == whole[: one.held]


def primed() -> TableModel:
    table = TableModel(V, 3, 3)
    for b, (context, start) in enumerate(zip(CONTEXTS, CACHED, strict=True)):
        if start:
            table.encode([b], torch.tensor([context[:start]]), torch.tensor([0]), start)
    return table


def test_right_guesses_save_forwards() -> None:
    """All tokens of a chain from one forward, where the guesses are what is drawn; from none, where they are sure."""
    greedy, uniform_BN = Sampling.of([0.0], [0], [1.0], V), torch.zeros(1, 4, dtype=torch.float64)

    def drafted(guess: Guesses, **more: Any) -> tuple[list[int], int]:
        one = made([1, 2], 0, 4, guess, **more)
        return one.tokens, cascade.propose(TableModel(V, 3), [0], [one], greedy, uniform_BN)[2]

    right, forwards = drafted(lambda _: None)
    assert forwards == 4

    def guess(drafted: list[int]) -> NgramGuess:
        return NgramGuess(right[len(drafted)], SEEN, 0.9)

    assert drafted(guess) == (right, 1)
    assert drafted(guess, acceptance=0.9) == (right, 0)


# ── where it stops ──


class Draft(TableModel):
    def logits(self, context: Sequence[int]) -> np.ndarray:
        return enumeration.logits(DRAFT, list(context[1:]), self._dtype).double().numpy()  # type: ignore[no-any-return]


def guess(drafted: list[int]) -> NgramGuess | None:
    """Sure of some, less so of others."""
    kept = (0.4, 0.95, 0.0)[(sum(drafted) + len(drafted)) % 3]
    return NgramGuess((2 * sum(drafted) + 1) % 3, SEEN, kept) if kept else None


def other(drafted: list[int]) -> NgramGuess | None:
    """Of another row: as sure, of other tokens, and not at the same places."""
    return guess([*drafted, len(drafted) + 1])


def known() -> TokenAcceptance:
    """What seemed likely to the model was kept, and nothing else."""
    found = TokenAcceptance()
    for share in range(9):
        for _ in range(50):
            found.record(Evidence(False, draft_token(), share), share >= 4)
    return found


def step(
    uniforms: list[float],
    setting: enumeration.Setting,
    dtype: torch.dtype,
    masks: int = 0,
    beside: Sequence[float] = (),
    each: DraftCost = CHEAP,
) -> Proposal | None:
    """`beside`: uniforms of another row that shares the step and has its own guesses."""
    count = 2 if beside else 1
    rows = [
        made([0], 0, 3, ours, lead=3, acceptance=0.6, share=each, known=known())
        for ours in (guess, other)[:count]
    ]
    drawn = [[*uniforms, 0.5, 0.5, 0.5][:3], [*beside, 0.5, 0.5, 0.5][:3]][:count]
    uniform_BN = torch.tensor(drawn, dtype=torch.float64)
    sampling, draft, price = (
        of_all(setting, count),
        Draft(3, 0, count, dtype=dtype),
        each.scaled(count),
    )
    logits_BQV, probs_BQV, _ = cascade.propose(
        draft, slice(0, count), rows, sampling, uniform_BN, price, masks
    )
    those: Any = [SimpleNamespace(tokens=[0])] * count
    nothing: Any = None
    group = DraftGroup(
        nothing, nothing, slice(0, count), those, [3] * count, sampling, uniform_BN, 3, "cpu", price
    )
    return chains.finished(rows, logits_BQV, probs_BQV, group)


def outcomes(setting: enumeration.Setting, dtype: torch.dtype, **more: Any) -> Case:
    """Everything that a step may draft for its first row, and how probable it is."""
    pending: list[tuple[list[float], float]] = [([], 1.0)]
    ends: list[tuple[list[int], list[int], Tensor, float]] = []
    while pending:
        uniforms, probability = pending.pop()
        found, n = step(uniforms, setting, dtype, **more), len(uniforms)
        count = 0 if found is None else int(found.drafted_B[0])
        if found is None or n >= count:
            empty_QV = torch.zeros((0, 3), dtype=dtype)
            tokens = [] if found is None else found.tokens_BN[0, :count].tolist()
            sources = [] if found is None else _sources(found)[:count]
            ends.append(
                (tokens, sources, empty_QV if found is None else found.probs_BQV[0], probability)
            )
        elif (source := _sources(found)[n]) == CHOSEN:
            pending.append(([*uniforms, 0.5], probability))
        else:
            q = found.probs_BQV[0, source].double()
            for token in range(3):
                if q[token] > 0:
                    middle = float(q[:token].sum() + q[token] / 2) / float(q.sum())
                    pending.append(([*uniforms, middle], probability * float(q[token] / q.sum())))
    return _case(ends, setting, dtype)


def _sources(found: Proposal) -> list[int]:
    return (
        list(range(found.candidates)) if found.tree is None else found.tree.sources_BN[0].tolist()
    )


def _case(
    ends: Sequence[tuple[list[int], list[int], Tensor, float]], setting: Any, dtype: torch.dtype
) -> Case:
    rows = [tuple([*tokens, 0, 0, 0][:3]) for tokens, _, _, _ in ends]
    q_BQV = torch.zeros((len(ends), 3, 3), dtype=dtype)
    for b, (_, _, q_QV, _) in enumerate(ends):
        q_BQV[b, : len(q_QV)] = q_QV
    tree = Tree.of(chain_shape(3), len(ends), False, "cpu")
    tree = replace(
        tree, sources_BN=torch.tensor([[*sources, 0, 0, 0][:3] for _, sources, _, _ in ends])
    )
    drafted_B = torch.tensor([len(tokens) for tokens, _, _, _ in ends])
    proposal = Proposal(torch.tensor(rows), q_BQV, [], drafted_B, tree)
    probability_B = torch.tensor(
        [probability for _, _, _, probability in ends], dtype=torch.float64
    )
    return Case(
        (0, 1, 2), rows, setting, told(TARGET, (0, 1, 2), rows, dtype), proposal, probability_B
    )


@either
@pytest.mark.parametrize("masks", [0, 2])
@pytest.mark.parametrize("setting", ["plain", "all three"])
def test_what_is_emitted_is_the_targets(setting: str, masks: int, dtype: torch.dtype) -> None:
    """By enumeration of all draws and decisions. Chains of all lengths come up, of drawn and of chosen tokens."""
    case = outcomes(SETTINGS[setting], dtype, masks=masks)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert len({*case.proposal.drafted_B.tolist()}) > 1
    assert len({*case.proposal.tree.sources_BN.flatten().tolist()}) > 2
    assert distance(verify, case) <= LIMIT


@either
@pytest.mark.parametrize("masks", [0, 2])
@pytest.mark.parametrize("beside", [(0.1,), (0.9, 0.9, 0.9), (0.2, 0.8, 0.5)])
def test_it_is_exact_beside_another_row(
    beside: Sequence[float], masks: int, dtype: torch.dtype
) -> None:
    """How long that one gets depends on whether the model is asked again, and so on what the first one has drawn."""
    case = outcomes(SETTINGS["plain"], dtype, masks=masks, beside=beside, each=DEAR)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert distance(verify, case) <= LIMIT


def test_to_leave_out_what_was_drawn_for_others_being_short_would_not_be_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are short for what was drawn."""
    monkeypatch.setattr(Chain, "fixed", 0)
    assert (
        distance(verify, outcomes(SETTINGS["plain"], torch.float64, beside=(0.1,), each=DEAR))
        > 1e-2
    )


def test_a_candidate_has_to_be_worth_its_place_in_all_rows() -> None:
    """What one row is sure of, others pay for; a request that says how much to draft has it."""
    price = DraftCost(0.0, 0.6, 0.0)

    def longest(*kept: float, **more: Any) -> int:
        rows = [
            made([0], 0, 6, lambda _, kept=one: NgramGuess(1, SEEN, kept), lead=0, share=price)
            for one in kept
        ]
        for name, value in more.items():
            setattr(rows[0], name, value)
        return chains.complete(rows, price)

    assert longest(0.9) == 4  # 0.9^4 is more than 0.6, and 0.9^5 is not
    assert longest(0.4) == 0
    assert longest(0.9, 0.4) == 5  # 0.9^5 + 0.4^5 is
    assert longest(0.4, 0.4) == 1
    assert longest(0.4, 0.9, share=NO_COST) == 6


def test_drafting_at_all_has_to_be_worth_its_start() -> None:
    """All candidates together; what has been drawn stays."""

    def longest(start: float, drawn: bool = False) -> int:
        one = made(
            [0],
            0,
            3,
            lambda _: NgramGuess(1, SEEN, 0.5),
            share=DraftCost(0.0, 0.1, 0.0),
            known=known(),
        )
        if drawn:
            one.draw([1], [0.0], masked=False)
        return chains.complete([one], DraftCost(start, 0.1, 0.0))  # 0.5 + 0.25 + 0.125 are kept

    assert (longest(0.57), longest(0.58)) == (3, 0)
    assert longest(0.58, drawn=True) == 1


def test_the_model_is_asked_where_the_rows_together_gain_its_forward() -> None:
    """One row's 0.5 is not worth 0.8, two rows' are; whose draft lags is not asked, and is caught up if that pays."""
    price, nobody = DraftCost(0.0, 0.1, 0.7), lambda _: None

    def asked(*lags: bool) -> tuple[int, list[int], list[bool]]:
        rows = [made([1], 0, 1, nobody, acceptance=0.5, share=price, lags=lag) for lag in lags]
        greedy = Sampling.of([0.0] * len(rows), [0] * len(rows), [1.0] * len(rows), V)
        uniform_BN = torch.zeros(len(rows), 1, dtype=torch.float64)
        *_, forwards = cascade.propose(
            TableModel(V, len(rows)), slice(0, len(rows)), rows, greedy, uniform_BN, price
        )
        return forwards, [len(one.tokens) for one in rows], [one.missed for one in rows]

    assert asked(False) == (0, [0], [False])
    assert asked(False, False) == (1, [1, 1], [False, False])
    assert asked(False, True) == (0, [0, 0], [False, True])
    assert asked(False, False, True) == (1, [1, 1, 0], [False, False, True])
