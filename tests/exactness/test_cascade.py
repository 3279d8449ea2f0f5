"""Cascades of n-grams and a model: exact wherever they stop, and cheaper than the model's chain."""

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

from decoder.drafters import cascade, chain_stop, model
from decoder.drafters.base import DraftGroup
from decoder.drafters.chain import Chain
from decoder.models.ragged import integers, ragged
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.policy.token_acceptance import Evidence, TokenAcceptance, draft_token, ngram
from decoder.sequence.ngram_index import NgramGuess
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling
from decoder.verification.token_tree import CHOSEN, Tree
from decoder.verification.tree_shape import chain_shape
from decoder.verification.verify import verify
from lab import enumeration_cases
from lab.enumeration import distance
from lab.enumeration_cases import DRAFT, TARGET, Case, same_sampling, tree_logits
from tests.exactness.test_exactness import LIMIT, SETTINGS, either
from tests.tabular import TableModel

V = 4
CONTEXTS = [[1, 2, 3], [0, 1], [2, 2, 2, 2]]
CACHED, DRAFTED = [1, 1, 0], [4, 2, 3]
SEEN = Evidence(False, ngram(1), 0)
CHEAP, DEAR = DraftCost(0.0, 0.15, 0.1), DraftCost(0.0, 0.4, 0.1)  # of one sequence
Guesses = Callable[[list[int]], NgramGuess | None]


def made(context: list[int], cached: int, limit: int, guess: Guesses, **more: Any) -> Chain:
    """A chain that the model may draw alone, unless `more` says otherwise."""
    given_ = {
        "model_budget": limit,
        "acceptance": 1.0,
        "cost": NO_COST,
        "rates": TokenAcceptance(),
        "greedy": False,
        **more,
    }
    return Chain(context, cached, limit, guess=guess, **given_)


# ── what the model drafts ──


@pytest.mark.parametrize(
    "temperatures", [[0.0] * 3, [1.0] * 3, [0.0, 0.7, 1.3]], ids=["greedy", "sampled", "both"]
)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_guesses_do_not_change_what_the_model_drafts(
    temperatures: list[float], seed: int, guessed: int
) -> None:
    """Unsure guesses: tokens and distributions equal the plain chain's, and so does the cache."""
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
        assert len(CONTEXTS[b]) <= one.cached <= len(whole)
        assert table.context(b)[: one.cached] == whole[: one.cached]


def primed() -> TableModel:
    table = TableModel(V, 3, 3)
    for b, (context, start) in enumerate(zip(CONTEXTS, CACHED, strict=True)):
        if start:
            table.encode([b], torch.tensor([context[:start]]), torch.tensor([0]), start)
    return table


def test_right_guesses_save_forwards() -> None:
    """Guesses that equal the draws: one forward for the chain, and none if the guesses are sure."""
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
        logits_V = enumeration_cases.logits(DRAFT, list(context[1:]), self._dtype)
        found: np.ndarray = logits_V.double().numpy()
        return found


def guess(drafted: list[int]) -> NgramGuess | None:
    """N-grams that are sure of some tokens, and less sure of others."""
    kept = (0.4, 0.95, 0.0)[(sum(drafted) + len(drafted)) % 3]
    return NgramGuess((2 * sum(drafted) + 1) % 3, SEEN, kept) if kept else None


def other(drafted: list[int]) -> NgramGuess | None:
    """Another sequence's n-grams: as sure, of other tokens at other places."""
    return guess([*drafted, len(drafted) + 1])


def known() -> TokenAcceptance:
    """Tokens that the model found likely were accepted, others were not."""
    found = TokenAcceptance()
    for bucket in range(9):
        for _ in range(50):
            found.record(Evidence(False, draft_token(), bucket), bucket >= 4)
    return found


def step(
    uniforms: list[float],
    setting: enumeration_cases.Setting,
    dtype: torch.dtype,
    masks: int = 0,
    beside: Sequence[float] = (),
    each: DraftCost = CHEAP,
) -> Proposal | None:
    """`beside`: uniforms of another sequence of the step, which has its own guesses."""
    count = 2 if beside else 1
    rows = [
        made([0], 0, 3, ours, acceptance=0.6, cost=each, rates=known())
        for ours in (guess, other)[:count]
    ]
    drawn = [[*uniforms, 0.5, 0.5, 0.5][:3], [*beside, 0.5, 0.5, 0.5][:3]][:count]
    uniform_BN = torch.tensor(drawn, dtype=torch.float64)
    sampling, draft, price = (
        same_sampling(setting, count),
        Draft(3, 0, count, dtype=dtype),
        each.scaled(count),
    )
    logits_BQV, probs_BQV, _ = cascade.propose(
        draft, slice(0, count), rows, sampling, uniform_BN, price, masks
    )
    seqs: Any = [SimpleNamespace(tokens=[0])] * count
    unused: Any = None
    group = DraftGroup(
        unused, unused, slice(0, count), seqs, [3] * count, sampling, uniform_BN, 3, "cpu", price
    )
    return chain_stop.drafted_chains(rows, logits_BQV, probs_BQV, group, 0).proposal


def outcomes(setting: enumeration_cases.Setting, dtype: torch.dtype, **more: Any) -> Case:
    """Everything that a step may draft for its first sequence, and how probable it is."""
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
        (0, 1, 2),
        rows,
        setting,
        tree_logits(TARGET, (0, 1, 2), rows, dtype),
        proposal,
        probability_B,
    )


@either
@pytest.mark.parametrize("masks", [0, 2])
@pytest.mark.parametrize("setting", ["plain", "all three"])
def test_what_is_emitted_is_the_targets(setting: str, masks: int, dtype: torch.dtype) -> None:
    """By enumeration of all draws and decisions, over drawn and chosen tokens of all lengths."""
    case = outcomes(SETTINGS[setting], dtype, masks=masks)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert len({*case.proposal.drafted_B.tolist()}) > 1
    assert len({*case.proposal.tree.sources_BN.flatten().tolist()}) > 2
    assert distance(verify, case) <= LIMIT


@either
@pytest.mark.parametrize("masks", [0, 2])
@pytest.mark.parametrize("beside", [(0.1,), (0.9, 0.9, 0.9), (0.2, 0.8, 0.5)])
def test_it_is_exact_beside_another_sequence(
    beside: Sequence[float], masks: int, dtype: torch.dtype
) -> None:
    """The other's length depends on whether the model is asked again, so on the first's draws."""
    case = outcomes(SETTINGS["plain"], dtype, masks=masks, beside=beside, each=DEAR)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert distance(verify, case) <= LIMIT


def test_dropping_drawn_tokens_because_other_chains_are_short_would_not_be_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other chains are short because of what was drawn."""
    monkeypatch.setattr(Chain, "drawn_length", 0)
    assert (
        distance(verify, outcomes(SETTINGS["plain"], torch.float64, beside=(0.1,), each=DEAR))
        > 1e-2
    )


def test_a_candidate_has_to_be_worth_its_place_in_all_sequences() -> None:
    """A sure candidate of one sequence costs all; a request that fixes γ gets it."""
    price = DraftCost(0.0, 0.6, 0.0)

    def longest(*accepted: float, **more: Any) -> int:
        rows = [
            made([0], 0, 6, lambda _, p=p: NgramGuess(1, SEEN, p), model_budget=0, cost=price)
            for p in accepted
        ]
        for name, value in more.items():
            setattr(rows[0], name, value)
        return chain_stop.extend_with_guesses(rows, price)

    assert longest(0.9) == 4  # 0.9^4 is more than 0.6, and 0.9^5 is not
    assert longest(0.4) == 0
    assert longest(0.9, 0.4) == 5  # 0.9^5 + 0.4^5 is
    assert longest(0.4, 0.4) == 1
    assert longest(0.4, 0.9, cost=NO_COST) == 6


def test_drafting_at_all_has_to_be_worth_its_start() -> None:
    """All candidates together have to pay for it; drawn tokens stay."""

    def longest(start: float, drawn: bool = False) -> int:
        one = made(
            [0],
            0,
            3,
            lambda _: NgramGuess(1, SEEN, 0.5),
            cost=DraftCost(0.0, 0.1, 0.0),
            rates=known(),
        )
        if drawn:
            one.add_drawn([1], [0.0], masked=False)
        return chain_stop.extend_with_guesses([one], DraftCost(start, 0.1, 0.0))

    # 0.5 + 0.25 + 0.125 candidates are accepted, for 0.3.
    assert (longest(0.57), longest(0.58)) == (3, 0)
    assert longest(0.58, drawn=True) == 1


def test_the_model_drafts_where_the_sequences_together_gain_its_forward() -> None:
    """One sequence's 0.5 tokens are not worth 0.8, two sequences' are.

    A lagging draft does not draft, and is flagged for catch-up if that would have paid.
    """
    price, no_guess = DraftCost(0.0, 0.1, 0.7), lambda _: None

    def asked(*lags: bool) -> tuple[int, list[int], list[bool]]:
        rows = [
            made([1], 0, 1, no_guess, acceptance=0.5, cost=price, draft_lags=lag) for lag in lags
        ]
        greedy = Sampling.of([0.0] * len(rows), [0] * len(rows), [1.0] * len(rows), V)
        uniform_BN = torch.zeros(len(rows), 1, dtype=torch.float64)
        *_, forwards = cascade.propose(
            TableModel(V, len(rows)), slice(0, len(rows)), rows, greedy, uniform_BN, price
        )
        return forwards, [len(one.tokens) for one in rows], [one.wants_catch_up for one in rows]

    assert asked(False) == (0, [0], [False])
    assert asked(False, False) == (1, [1, 1], [False, False])
    assert asked(False, True) == (0, [0, 0], [False, True])
    assert asked(False, False, True) == (1, [1, 1, 0], [False, False, True])
