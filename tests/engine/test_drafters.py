"""Every drafter in the engine: exact answers in any batch, and correct signals."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from decoder.drafters.registry import descriptions, drafters
from decoder.policy.draft_cost import DraftCost, DraftCostModel
from decoder.verification.tree_shape import best_shape
from online.drafters import DEFAULT
from online.messages import Query
from tests.engines import Bench, bench, query, target_alone
from tests.tiny import TinyPair

RNG = np.random.default_rng(4)
PROMPTS = [tuple(int(t) for t in RNG.integers(4, 300, length)) for length in (1, 3, 17, 40, 90, 33)]
WISHES: dict[str, dict[str, Any]] = {
    "chain": {"gamma": 4},
    "tree as is best": {"drafter": "tree", "gamma": 9},
    "tree of widths": {"drafter": "tree", "gamma": None, "widths": (3, 2, 1)},
    "tree with replacement": {
        "drafter": "tree",
        "gamma": None,
        "widths": (2, 2),
        "replacement": True,
    },
    "n-grams": {"drafter": "ngrams", "gamma": 5},
    "cascade": {"drafter": "cascade", "gamma": 5},
    "cascade as is best": {"drafter": "cascade", "gamma": None},
    "cascade with masks": {"drafter": "parallel_cascade", "gamma": 5},
    "graph": {"drafter": "graph", "gamma": 9},
    "parallel": {"drafter": "parallel", "gamma": 3},
    "exits": {"drafter": "exits", "gamma": 4},
    "the engine's choice": {"drafter": "auto", "gamma": 4},
}
# A drafter that has no wishes above is tested with a fixed γ.
NAMED = {wish.get("drafter", DEFAULT) for wish in WISHES.values()}
WISHES |= {name: {"drafter": name, "gamma": 4} for name in descriptions() if name not in NAMED}
wishes = pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES.keys())


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    with bench(pair) as made:
        yield made


def mixed(**more: Any) -> list[Query]:
    """All prompts with all wishes, side by side."""
    return [
        query(prompt, f"{name} {i}", **{**wish, "max_tokens": 20 + i, **more})
        for name, wish in WISHES.items()
        for i, prompt in enumerate(PROMPTS)
    ]


def test_greedy_is_the_target_alone_token_for_token(pair: TinyPair, tiny: Bench) -> None:
    """Sequences of all shapes in one batch, against `transformers.generate`."""
    queries = mixed()
    for found, asked in zip(tiny.run(*queries), queries, strict=True):
        assert found.ids == target_alone(pair, asked.prompt_ids, asked.max_tokens), asked.id


@wishes
def test_greedy_alone_is_the_target_alone(
    pair: TinyPair, tiny: Bench, wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence, whose first step encodes its prompt. Cheap drafts are used."""
    monkeypatch.setattr(DraftCostModel, "cost", lambda *_: DraftCost(0.0, 0.02, 0.1))
    accepted = 0
    for prompt in PROMPTS:
        (found,) = tiny.run(query(prompt, **{**wish, "max_tokens": 60}))
        assert found.ids == target_alone(pair, prompt, 60)
        accepted += found.stats.accepted
    # The tiny models repeat little: of a drafter without wishes above, any success will do.
    assert accepted > (20 if wish.get("drafter", DEFAULT) in NAMED else 0)


def test_an_answer_does_not_depend_on_who_shares_the_batch(tiny: Bench) -> None:
    """Sampled: same seed, same tokens, alone and among sequences with other drafters.

    Left out is what depends on more than the seed: trees and exits depend on past acceptance,
    n-grams on other answers, and the engine's choice on speed.
    """
    queries = [
        replace(one, seed=i) for i, one in enumerate(mixed(temperature=0.8, top_p=0.9, top_k=40))
    ]
    seeded = ("chain", "graph", "parallel")
    fixed = [i for i, one in enumerate(queries) if one.drafter in seeded or one.widths][::4]
    alone = [tiny.run(queries[i])[0].ids for i in fixed]
    together = tiny.run(*queries)
    assert [together[i].ids for i in fixed] == alone


@wishes
def test_samples_follow_the_target_through_the_whole_engine(
    pair: TinyPair, wish: dict[str, Any]
) -> None:
    """1,500 answers of three tokens, by chi-square against exact probabilities."""
    model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    prompt, count = (7, 8, 9, 7, 8), 1500
    with bench(pair, slots=64, max_waiting=4000) as many:
        asked = [
            query(
                prompt,
                f"q{i}",
                **{
                    **wish,
                    "temperature": 0.7,
                    "top_k": 3,
                    "seed": i,
                    "max_tokens": 3,
                    "ignore_eos": True,
                },
            )
            for i in range(count)
        ]
        answers = many.run(*asked)
    seen: dict[tuple[int, ...], int] = {}
    for answer in answers:
        seen[tuple(answer.ids)] = seen.get(tuple(answer.ids), 0) + 1
    expected = {(): 1.0}
    for _ in range(3):
        expected = {
            (*ids, token): p * q
            for ids, p in expected.items()
            for token, q in _top(model, (*prompt, *ids), 3, 0.7).items()
        }
    assert set(seen) <= set(expected), "a token that can't be drawn"
    statistic, freedom = 0.0, -1
    for ids, p in expected.items():
        if count * p >= 5:
            statistic += (seen.get(ids, 0) - count * p) ** 2 / (count * p)
            freedom += 1
    assert freedom >= 5
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 12  # far beyond the 1e-6 quantile


def _top(
    model: torch.nn.Module, prompt: tuple[int, ...], k: int, temperature: float
) -> dict[int, float]:
    with torch.no_grad():
        top = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).topk(k)
    return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))


@wishes
def test_signals_are_those_of_the_verified_chain(
    pair: TinyPair, tiny: Bench, wish: dict[str, Any]
) -> None:
    """Accepted path and rejected branches, checked against the target run afresh."""
    (found,) = tiny.run(
        query(
            (7, 8, 9, 7, 8), "logged", **{**wish, "temperature": 1.0, "seed": 3, "max_tokens": 40}
        )
    )
    (signal,) = tiny.signals(1)
    assert signal.output_ids.tolist() == found.ids
    assert signal.step_accepted.sum() == found.stats.accepted
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    contexts = {at: found.ids[:index] for index, at in signal.path()}
    for start, first, count, at in signal.branches():
        branch = signal.branch_ids[first : first + count].tolist()
        for j in range(count):
            contexts[at + j] = found.ids[:start] + branch[: j + 1]
    assert sorted(contexts) == list(range(len(signal.top_ids)))
    for at, context in contexts.items():
        ids = torch.tensor([[7, 8, 9, 7, 8, *context]])
        with torch.no_grad():
            target_logp = target(ids).logits[0, -1].log_softmax(-1)
        assert signal.top_logp[at] == pytest.approx(target_logp.topk(16).values.numpy(), abs=0.02)
    # γ is fixed, so "auto" drafts by a model, too.
    drafter = drafters().get(wish.get("drafter", DEFAULT))
    assert (found.stats.acceptance_rate is None) == (drafter is not None and not drafter.uses_model)


def test_ngrams_draft_without_a_draft(pair: TinyPair, tiny: Bench) -> None:
    """They work while the draft is broken."""
    tiny.engine.between_steps(tiny.engine.batch.drafts["default"].fail)
    prompt = (5, 6, 7, 8) * 6
    asked = [
        query(prompt, drafter, drafter=drafter, max_tokens=60)
        for drafter in ("ngrams", "tree", "cascade")
    ]
    by_name = dict(zip([one.drafter for one in asked], tiny.run(*asked), strict=True))
    assert [found.ids for found in by_name.values()] == [target_alone(pair, prompt, 60)] * 3
    assert by_name["ngrams"].stats.drafted > 0
    assert by_name["tree"].stats.drafted == by_name["cascade"].stats.drafted == 0


def test_trees_take_the_shape_that_past_acceptance_suggests(pair: TinyPair, tiny: Bench) -> None:
    """Long ones from a draft that is mostly right, wide ones from a draft that is mostly wrong."""
    depths = []
    for folder in (pair.draft, pair.spoilt):
        with bench(pair, drafts={"default": folder}) as one:
            asked = [
                query(p, f"q{i}", drafter="tree", gamma=8, max_tokens=60)
                for i, p in enumerate(PROMPTS * 2)
            ]
            one.run(*asked)
            rates = one.engine.batch.drafts["default"].rank_acceptance.rates
            depths.append(best_shape(rates, 8, 16).depth)
    assert depths[0] > depths[1]
