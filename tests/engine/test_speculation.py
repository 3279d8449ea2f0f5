"""γ left to the engine: the answers stay the target's, and probes measure unused drafts."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import decoder.policy.gamma
from decoder.policy.acceptance import PRIOR_RATE
from decoder.policy.draft_cost import PRIOR_COST, DraftCost, DraftCostModel
from decoder.policy.token_acceptance import Evidence, draft_token
from decoder.verification.sampling import Sampling, probabilities
from online.messages import Query
from tests.engines import Bench, Finished, bench, query, reference, target_alone
from tests.tiny import VOCABULARY, TinyPair

RNG = np.random.default_rng(2)
PROMPTS = [tuple(int(t) for t in RNG.integers(4, 300, length)) for length in (3, 17, 90, 40)]
DRAFTS = "vllm:spec_decode_num_drafts"
LENGTH = 80
NEAR_TIE = 0.25  # logits of about 8, of which bfloat16 has eight bits


def free(prompt: tuple[int, ...], name: str = "q", **more: object) -> Query:
    """A query that leaves γ to the engine."""
    return query(prompt, name, **{"gamma": None, "max_tokens": LENGTH, **more})


def set_step_times(tiny: Bench, plain: float, drafted: float) -> None:
    """Replaces the step times: on the tiny pair, drafting costs too much ever to pay.

    `plain` and `drafted` (with γ = 4) are multiples of a plain step.
    """
    times = tiny.engine.batch.controller.step_times

    def change() -> None:
        for batch_size in times.batch_sizes:
            step = float(times.seconds(batch_size)[0])
            times.calibrate(batch_size, {0: plain * step, 4: drafted * step})

    tiny.engine.between_steps(change)


PLAIN_IS_SLOW = (30.0, 5.0)
DRAFTS_ARE_FAST = (1.0, 1.1)  # until real steps correct it


def install(tiny: Bench, folder: Path) -> None:
    """Swaps the draft before the next step."""
    draft = tiny.engine.batch.drafts["default"]
    staged = draft.stage(folder)
    tiny.engine.between_steps(lambda: draft.install(staged, draft.version + 1))


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    with bench(pair) as made:
        yield made


@pytest.mark.parametrize("costs", [(1.0, 5.0), PLAIN_IS_SLOW, DRAFTS_ARE_FAST])
@pytest.mark.parametrize("kind", ["draft", "spoilt"])
def test_answers_are_the_targets_whatever_gamma_is_chosen(
    pair: TinyPair, kind: str, costs: tuple[float, float]
) -> None:
    """Token for token, for a good draft and a bad one, with plain steps, drafted steps and both."""
    with bench(pair, drafts={"default": getattr(pair, kind)}) as tiny:
        set_step_times(tiny, *costs)
        found = tiny.run(*[free(prompt, f"q{i}") for i, prompt in enumerate(PROMPTS)])
    assert [f.ids for f in found] == [target_alone(pair, prompt, LENGTH) for prompt in PROMPTS]


def test_a_good_draft_is_used_where_it_pays(tiny: Bench) -> None:
    """Most tokens come from drafts, in far fewer steps than tokens."""
    set_step_times(tiny, *PLAIN_IS_SLOW)
    stats = tiny.run(free(PROMPTS[1]))[0].stats
    assert stats.accepted > stats.steps
    assert stats.steps < LENGTH / 2


def test_with_a_spoilt_draft_plain_steps_dominate(pair: TinyPair) -> None:
    """It is tried, and then no longer used, although drafting is thought to be fast."""
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 50]
    with bench(pair, drafts={"default": pair.spoilt}) as tiny:
        set_step_times(tiny, *DRAFTS_ARE_FAST)
        stats = [
            f.stats
            for f in tiny.run(*[free(p, f"q{i}", max_tokens=200) for i, p in enumerate(prompts)])
        ]
        steps = sum(one.steps for one in stats)
        assert steps > 0.9 * len(prompts) * 200
        assert 0 < tiny.counter(DRAFTS) < 0.5 * steps


def test_a_swap_while_the_engine_chooses_changes_no_answer(pair: TinyPair) -> None:
    """From spoilt to good: running sequences stay exact, and the new draft is used at once."""
    with bench(pair, drafts={"default": pair.spoilt}) as tiny:
        set_step_times(tiny, *PLAIN_IS_SLOW)
        listeners = [
            tiny.submit(free(prompt, f"q{i}", max_tokens=150)) for i, prompt in enumerate(PROMPTS)
        ]
        install(tiny, pair.draft)
        assert [listener.wait().ids for listener in listeners] == [
            target_alone(pair, p, 150) for p in PROMPTS
        ]
        again = tiny.run(free(PROMPTS[1]))[0]
    assert again.ids == target_alone(pair, PROMPTS[1], LENGTH)
    assert again.stats.accepted > again.stats.steps


@pytest.mark.parametrize(
    "change", [install, lambda tiny, folder: None], ids=["swapped", "unchanged"]
)
def test_a_cascade_uses_a_draft_again_after_a_swap(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, change: Callable[[Bench, Path], None]
) -> None:
    """The acceptance of the spoilt draft's tokens does not count against the next version."""
    monkeypatch.setattr(DraftCostModel, "cost", lambda *_: DraftCost(0.0, 0.05, 0.2))
    asked = {"drafter": "cascade", "max_tokens": 200, "temperature": 1.0}
    with bench(pair, drafts={"default": pair.spoilt}) as tiny:
        set_step_times(tiny, *PLAIN_IS_SLOW)
        for _ in range(300):
            tiny.engine.batch.drafts["default"].token_acceptance.record(
                Evidence(False, draft_token(), None), False
            )
        assert tiny.run(free(PROMPTS[1], "before", **asked))[0].stats.compared == 0
        change(tiny, pair.draft)
        again = tiny.run(free(PROMPTS[1], "then", **asked))[0].stats
    assert (again.compared > 0.8 * again.steps) == (change is install)


def test_drafts_that_share_a_step_share_its_cost(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the gain of one sequence need not pay for the time of the whole batch."""
    monkeypatch.setattr(
        DraftCostModel, "cost", lambda self, size: DraftCost(0.05, 0.05, 0.3).scaled(size)
    )
    with bench(pair, drafts={"default": pair.draft, "own": pair.draft}, slots=4) as tiny:
        asked = [
            free(PROMPTS[1], f"q{i}", drafter="cascade", temperature=1.0, seed=i) for i in range(4)
        ]
        found = tiny.run(replace(asked[0], route="own", max_tokens=20), *asked[1:])
    assert all(one.stats.compared > 0 for one in found)


def test_sequences_with_and_without_their_own_gamma_share_a_batch(
    pair: TinyPair, tiny: Bench
) -> None:
    """Each drafts the γ it asks for, even above the engine's maximum."""
    asked = [
        free(p, f"q{i}", gamma=gamma)
        for i, (p, gamma) in enumerate(zip(PROMPTS, (None, 0, 7, 2), strict=True))
    ]
    found = tiny.run(*asked)
    assert [f.ids for f in found] == [target_alone(pair, prompt, LENGTH) for prompt in PROMPTS]
    assert found[1].stats.drafted == 0
    assert found[2].stats.drafted > 4 * found[2].stats.steps
    assert 0 < found[3].stats.drafted <= 2 * found[3].stats.steps


def test_a_maximum_of_zero_makes_every_step_plain(pair: TinyPair) -> None:
    """Except for sequences that ask for their own γ."""
    with bench(pair, gamma=0) as tiny:
        mine, other = tiny.run(free(PROMPTS[0], "mine"), free(PROMPTS[1], "other", gamma=3))
    assert [mine.ids, other.ids] == [target_alone(pair, prompt, LENGTH) for prompt in PROMPTS[:2]]
    assert mine.stats.drafted == 0
    assert other.stats.drafted > 0


# ── probes ──


@pytest.mark.parametrize(("kind", "low", "high"), [("draft", 0.5, 1.0), ("spoilt", 0.0, 0.3)])
def test_probes_measure_the_acceptance_of_an_unused_draft(
    pair: TinyPair, kind: str, low: float, high: float
) -> None:
    """Little or nothing is drafted, because it does not pay; acceptance is still known."""
    with bench(pair, drafts={"default": getattr(pair, kind)}) as tiny:
        set_step_times(tiny, 1.0, 5.0)
        stats = tiny.run(free(PROMPTS[1], max_tokens=200))[0].stats
    assert stats.drafted < 40
    assert stats.acceptance_rate is not None
    assert low <= stats.acceptance_rate <= high


def test_a_short_answer_is_not_probed(tiny: Bench) -> None:
    """A few tokens say too little about a draft to be worth running it."""
    set_step_times(tiny, 1.0, 5.0)
    stats = tiny.run(free(PROMPTS[1], max_tokens=6))[0].stats
    assert (stats.drafted, stats.acceptance_rate) == (0, None)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 5)])
def test_probes_measure_the_overlap_of_the_distributions(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, temperature: float, top_k: int
) -> None:
    """Probing at every step gives the mean of Σ min(p, q) that `transformers` gives."""
    monkeypatch.setattr(decoder.policy.gamma, "PROBE_SHARE", 100.0)
    asked = [
        free(
            (40 + i, *PROMPTS[1]),
            f"q{i}",
            temperature=temperature,
            top_k=top_k,
            seed=i,
            ignore_eos=True,
        )
        for i in range(16)
    ]
    with bench(pair, gamma=0) as tiny:
        found = tiny.run(*asked)
    compared = sum(f.stats.compared for f in found)
    assert compared > 0.5 * len(asked) * LENGTH
    exact = np.concatenate([overlaps(pair, one, f) for one, f in zip(asked, found, strict=True)])
    probed = sum(f.stats.overlap for f in found) / compared
    assert probed == pytest.approx(
        float(exact.mean()), abs=float(5 * exact.std() / compared**0.5) + 0.02
    )


def overlaps(pair: TinyPair, asked: Query, found: Finished) -> np.ndarray:
    """Σ_x min(p(x), q(x)) at every token of an answer."""
    context = torch.tensor([[*asked.prompt_ids, *found.ids]])
    sampling = Sampling.of([asked.temperature], [asked.top_k], [asked.top_p], VOCABULARY)
    with torch.no_grad():
        p, q = (
            probabilities(
                reference(folder)(context).logits[:, len(asked.prompt_ids) - 1 : -1], sampling
            )
            for folder in (pair.target, pair.draft)
        )
    return torch.minimum(p, q).sum(-1)[0].numpy()  # type: ignore[no-any-return]


# ── before the first request ──


def test_calibration_at_start_leaves_no_trace(pair: TinyPair, tiny: Bench) -> None:
    """Step times are known; metrics, acceptance and stored contexts are as new."""
    times = tiny.engine.batch.controller.step_times
    draft = tiny.engine.batch.drafts["default"]
    for batch_size in times.batch_sizes:
        assert max(times.seconds(batch_size)) < 0.5, "not calibrated: a step takes one second"
    assert draft.acceptance.rate == pytest.approx(PRIOR_RATE)
    assert tiny.engine.batch.controller.draft_cost(4) == pytest.approx(4 * PRIOR_COST)
    assert (tiny.counter("vllm:generation_tokens"), tiny.counter(DRAFTS), tiny.engine.running) == (
        0,
        0,
        0,
    )
    assert tiny.run(query((1,) * 20, gamma=0))[0].ids == target_alone(pair, (1,) * 20, 24)
    assert tiny.counter("vllm:prefix_cache_hits") == 0


# ── bfloat16 ──


@pytest.mark.parametrize("gamma", [0, 4])
def test_bfloat16_answers_are_the_targets_up_to_near_ties(pair: TinyPair, gamma: int) -> None:
    """Each token is within rounding of the most likely one by `transformers` in bfloat16."""
    model = reference(pair.target, torch.bfloat16)
    with bench(pair, dtype="bfloat16") as tiny:
        asked = [
            query(prompt, f"q{i}", gamma=gamma, max_tokens=60) for i, prompt in enumerate(PROMPTS)
        ]
        found = tiny.run(*asked)
    agreed = 0
    for prompt, answer in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits_TV = (
                model(torch.tensor([[*prompt, *answer.ids]]))
                .logits[0, len(prompt) - 1 : -1]
                .float()
            )
        emitted_T = logits_TV.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert (emitted_T >= logits_TV.amax(1) - NEAR_TIE).all()
        agreed += int((logits_TV.argmax(1) == torch.tensor(answer.ids)).sum())
    assert agreed > 0.9 * sum(len(answer.ids) for answer in found)
    if gamma:
        assert sum(answer.stats.accepted for answer in found) > 0


@pytest.mark.parametrize(
    "drafter", ["chain", "tree", "graph", "cascade", "parallel", "parallel_cascade", "exits"]
)
def test_bfloat16_is_sampled_with_every_drafter(pair: TinyPair, drafter: str) -> None:
    """A float32 kernel once wrote into a bfloat16 buffer, which killed the process."""
    with bench(pair, dtype="bfloat16") as tiny:
        asked = [
            query(p, f"q{i}", temperature=1.0, seed=i, drafter=drafter)
            for i, p in enumerate(PROMPTS)
        ]
        found = tiny.run(*asked)
        assert [answer.reason for answer in found] == ["length"] * len(asked)
        assert tiny.counter("slipstream_engine_faults") == 0
    assert sum(answer.stats.drafted for answer in found) > 0
