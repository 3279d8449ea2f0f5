"""The engine on a tiny pair: exact in any batch, and alive after faults."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from decoder.models.kv_cache import Slots, TreePositions
from online.errors import Overloaded, Unavailable
from tests.device import DEVICE
from tests.engines import Bench, bench, query, target_alone
from tests.tabular import TableModel
from tests.tiny import VOCABULARY, TinyPair

RNG = np.random.default_rng(0)
PROMPTS = [
    tuple(int(t) for t in RNG.integers(4, 300, length))
    for length in (1, 3, 17, 40, 5, 90, 2, 33, 8, 60)
]


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    with bench(pair) as made:
        yield made


# ── exactness ──


@pytest.mark.parametrize("gamma", [0, 1, 3, 7])
def test_greedy_is_the_target_alone_token_for_token(
    pair: TinyPair, tiny: Bench, gamma: int
) -> None:
    """Ten prompts of mixed lengths in one batch, against `transformers.generate` one by one."""
    queries = [query(p, f"q{i}", gamma=gamma, max_tokens=20 + i) for i, p in enumerate(PROMPTS)]
    for found, prompt, asked in zip(tiny.run(*queries), PROMPTS, queries, strict=True):
        assert found.ids == target_alone(pair, prompt, asked.max_tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_does_not_depend_on_its_batch(tiny: Bench, temperature: float) -> None:
    """Same seed, same tokens: alone, and among sequences with other lengths and parameters."""
    mine = [
        query(p, f"m{i}", temperature=temperature, seed=i, top_p=0.9, top_k=40)
        for i, p in enumerate(PROMPTS[:4])
    ]
    alone = [tiny.run(one)[0].ids for one in mine]
    others = [
        query(p, f"o{i}", temperature=1.3, seed=99 + i, gamma=i % 6, max_tokens=3 + 5 * i)
        for i, p in enumerate(PROMPTS)
    ]
    mixed = [one for two in zip(others, [*mine, *[None] * 6], strict=True) for one in two if one]
    together = dict(zip([q.id for q in mixed], tiny.run(*mixed), strict=True))
    assert [together[one.id].ids for one in mine] == alone


def test_samples_follow_the_target_through_the_whole_engine(pair: TinyPair) -> None:
    """A chi-square test of 2,000 two-token answers against the exact probabilities."""
    model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    prompt = PROMPTS[2]
    with bench(pair, slots=64, max_waiting=4000) as many:
        answers = many.run(
            *[
                query(prompt, f"q{i}", temperature=0.7, top_k=5, seed=i, max_tokens=2, gamma=2)
                for i in range(2000)
            ]
        )
    second: dict[tuple[int, int], int] = {}
    for answer in answers:
        if len(answer.ids) == 2:
            second[answer.ids[0], answer.ids[1]] = second.get((answer.ids[0], answer.ids[1]), 0) + 1
    statistic, freedom = 0.0, -1
    first_p = _top_k(model, prompt)
    for first, p in first_p.items():
        for following, p2 in _top_k(model, (*prompt, first)).items():
            expected = 2000 * p * p2
            if expected >= 5:
                statistic += (second.get((first, following), 0) - expected) ** 2 / expected
                freedom += 1
    assert freedom >= 6
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 12  # far beyond the 1e-6 quantile


def _top_k(model: torch.nn.Module, prompt: tuple[int, ...]) -> dict[int, float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    top = (logits / 0.7).topk(5)
    return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))


def test_a_swap_in_the_middle_changes_acceptance_and_no_token(pair: TinyPair) -> None:
    """A spoilt draft is installed while sequences run: greedy output stays the target's."""
    with bench(pair, drafts={"default": pair.draft}) as tiny:
        expected = [target_alone(pair, p, 120) for p in PROMPTS[:4]]
        before = tiny.run(*[query(p, f"b{i}", max_tokens=120) for i, p in enumerate(PROMPTS[:4])])
        running = [
            tiny.submit(query(p, f"q{i}", max_tokens=120)) for i, p in enumerate(PROMPTS[:4])
        ]
        draft = tiny.engine.batch.drafts["default"]
        staged = draft.stage(pair.spoilt)
        swapped = tiny.engine.between_steps(lambda: draft.install(staged, 2))
        found = [listener.wait() for listener in running]
        assert swapped.done()
        swapped.result()
        assert [f.ids for f in found] == expected
        again = tiny.run(*[query(p, f"r{i}", max_tokens=120) for i, p in enumerate(PROMPTS[:4])])
        assert [f.ids for f in again] == expected
        assert [f.stats.versions for f in again] == [[(0, len(f.ids), 2)] for f in again]
        assert sum(f.stats.accepted for f in again) < sum(f.stats.accepted for f in before) / 2


# ── what a query asks for ──


def test_every_sequence_has_its_own_route_gamma_and_length(pair: TinyPair) -> None:
    """Two routes with their own drafts in one batch; statistics are kept by sequence."""
    with bench(pair, drafts={"good": pair.draft, "bad": pair.spoilt}) as tiny:
        good, bad, plain = tiny.run(
            query(PROMPTS[3], "g", route="good", max_tokens=60),
            query(PROMPTS[3], "b", route="bad", max_tokens=60),
            query(PROMPTS[3], "p", route="bad", max_tokens=60, gamma=0),
        )
    assert good.ids == bad.ids == plain.ids
    assert good.stats.steps < bad.stats.steps <= plain.stats.steps
    assert plain.stats.drafted == 0
    assert plain.stats.acceptance_rate is None


def test_max_tokens_holds_however_many_tokens_a_step_accepts(tiny: Bench) -> None:
    """A step that could emit five tokens emits only the missing ones."""
    for wanted in range(1, 8):
        found = tiny.run(query(PROMPTS[1], f"q{wanted}", max_tokens=wanted))[0]
        assert (len(found.ids), found.reason) == (wanted, "length")
        assert found.stats.versions[-1][1] == wanted


def test_stop_strings_and_stop_tokens_end_a_sequence(tiny: Bench) -> None:
    """The stop string is cut off; a stop token counts but has no text."""
    whole = tiny.run(query(PROMPTS[2], "whole", max_tokens=40))[0]
    stop = whole.text[5:8]
    cut = tiny.run(query(PROMPTS[2], "cut", max_tokens=40, stop=(stop,)))[0]
    assert (cut.reason, cut.text) == ("stop", whole.text[: whole.text.index(stop)])
    token = whole.ids[7]
    ended = tiny.run(query(PROMPTS[2], "ended", max_tokens=40, stop_token_ids=(token,)))[0]
    assert (ended.reason, ended.ids) == ("stop", whole.ids[: whole.ids.index(token) + 1])


def test_end_of_text_stops_unless_it_is_ignored(pair: TinyPair) -> None:
    """`ignore_eos` decodes through <|end|>."""
    with bench(pair, target=_Always(0)) as tiny:
        stopped, ignored = tiny.run(query(name="a"), query(name="b", ignore_eos=True))
    assert (stopped.reason, stopped.ids) == ("stop", [0])
    assert (ignored.reason, ignored.ids) == ("length", [0] * 24)


def test_logprobs_are_the_targets_own(pair: TinyPair, tiny: Bench) -> None:
    """At temperature 1, for emitted tokens and the most likely ones, whatever was drafted."""
    found = tiny.run(query(PROMPTS[2], logprobs=3))[0]
    model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[2], *found.ids]])).logits[
            0, len(PROMPTS[2]) - 1 : -1
        ]
    logp = logits.log_softmax(-1)
    assert len(found.logprobs) == len(found.ids)
    for i, entry in enumerate(found.logprobs):
        assert entry.logprob == pytest.approx(logp[i, found.ids[i]].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == logp[i].topk(3).indices.tolist()


# ── signals ──


def test_signals_hold_the_targets_distribution_of_every_verified_position(
    pair: TinyPair, tiny: Bench
) -> None:
    """On the emitted path and on rejected branches, compared with the model on each context."""
    found = tiny.run(query(PROMPTS[2], "logged", temperature=1.0, seed=3, max_tokens=40))[0]
    (signal,) = tiny.signals(1)
    assert signal.output_ids.tolist() == found.ids
    assert signal.step_accepted.sum() == found.stats.accepted
    assert (signal.step_accepted < signal.step_drafted).any(), "nothing was rejected"
    model = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    contexts = {at: found.ids[:index] for index, at in signal.path()}
    for start, first, count, at in signal.branches():
        branch = signal.branch_ids[first : first + count].tolist()
        for j in range(count):
            contexts[at + j] = found.ids[:start] + branch[: j + 1]
    assert sorted(contexts) == list(range(len(signal.top_ids)))
    for at, context in contexts.items():
        with torch.no_grad():
            logits_V = model(torch.tensor([[*PROMPTS[2], *context]])).logits[0, -1]
        top = logits_V.log_softmax(-1).topk(16)
        assert signal.top_ids[at].tolist() == top.indices.tolist()
        assert signal.top_logp[at] == pytest.approx(top.values.numpy(), abs=0.02)
        assert signal.rest_mass[at] == pytest.approx(1 - top.values.exp().sum().item(), abs=2e-3)


@pytest.mark.parametrize("branch_tokens", [0, 1, 2])
def test_signals_hold_the_recorded_part_of_a_rejected_branch(
    pair: TinyPair, branch_tokens: int
) -> None:
    """By default none of it; a recorded part equals that of a signal with whole branches."""
    asked = query(PROMPTS[2], "logged", temperature=1.0, seed=3, max_tokens=40)
    signals = []
    for recorded in (16, branch_tokens):
        with bench(pair, branch_tokens=recorded) as tiny:
            tiny.run(asked)
            signals += tiny.signals(1)
    whole, cut = signals
    assert (whole.step_branch > branch_tokens).any(), "no branch is longer: nothing is cut"
    assert cut.step_branch.tolist() == whole.step_branch.clip(max=branch_tokens).tolist()
    same = dict(zip((at for _, at in cut.path()), (at for _, at in whole.path()), strict=True))
    if branch_tokens:
        for left, right in zip(cut.branches(), whole.branches(), strict=True):
            assert (left[0], left[2]) == (right[0], min(branch_tokens, right[2]))
            left_ids, right_ids = cut.branch_ids[left[1] :], whole.branch_ids[right[1] :]
            assert left_ids[: left[2]].tolist() == right_ids[: left[2]].tolist()
            same |= {left[3] + j: right[3] + j for j in range(left[2])}
    assert sorted(same) == list(range(len(cut.top_ids)))
    for left, right in same.items():
        assert cut.top_ids[left].tolist() == whole.top_ids[right].tolist()
        assert cut.top_logp[left].tolist() == whole.top_logp[right].tolist()


def test_signals_hold_the_acceptance_rate(tiny: Bench) -> None:
    """Of the request, as its client receives it; None without compared positions."""
    drafted, plain = query(name="drafted"), query(name="plain", gamma=0, max_tokens=4)
    answers = tiny.run(drafted, plain)
    found = {s.request_id: s.acceptance for s in tiny.signals(2)}
    assert found["drafted"] == answers[0].stats.acceptance_rate
    assert found["plain"] is None


def test_requests_that_must_not_be_stored_leave_no_signal(pair: TinyPair) -> None:
    """`store: false` and closed routes; another request is stored."""
    with bench(pair, drafts={"default": pair.draft, "closed": pair.draft}) as tiny:
        tiny.run(query(name="a", store=False), query(name="b", route="closed"))
        tiny.run(query(name="kept"))
        assert [signal.request_id for signal in tiny.signals(1)] == ["kept"]
        assert tiny.buffer.depth("closed").signals == 0


# ── joining, leaving, failing ──


def test_cancelled_sequences_free_their_slots(pair: TinyPair) -> None:
    """With one slot, cancelling a long answer admits the next query."""
    with bench(pair, slots=1) as tiny:
        long = tiny.submit(query(name="long", max_tokens=200, ignore_eos=True))
        short = tiny.submit(query(name="short", max_tokens=2))
        waiting = tiny.submit(query(name="never", max_tokens=200))
        tiny.engine.cancel("never")
        tiny.engine.cancel("long")
        assert {long.wait().reason, waiting.wait().reason} == {"cancelled"}
        assert short.wait().reason == "length"


def test_a_full_queue_refuses_queries(pair: TinyPair) -> None:
    """At once, as HTTP 429."""
    with bench(pair, slots=1, max_waiting=2) as tiny:
        running = tiny.submit(query(name="r", max_tokens=200, ignore_eos=True))
        deadline = time.monotonic() + 10
        while not tiny.engine.running and time.monotonic() < deadline:
            time.sleep(0.001)
        for name in ("w0", "w1"):
            tiny.submit(query(name=name, max_tokens=200, ignore_eos=True))
        with pytest.raises(Overloaded):
            tiny.submit(query(name="w2"))
        for name in ("r", "w0", "w1"):
            tiny.engine.cancel(name)
        running.wait()


def test_a_draft_that_fails_is_not_used_until_the_next_swap(pair: TinyPair, tiny: Bench) -> None:
    """Its sequences go on without drafting, exactly; the next version drafts again."""
    draft = tiny.engine.batch.drafts["default"]
    working, draft.model = draft.model, Failing(draft.model)  # type: ignore[assignment]
    found = tiny.run(query(PROMPTS[4], "while failing"))[0]
    assert found.ids == target_alone(pair, PROMPTS[4], 24)
    assert found.stats.drafted == 0
    assert draft.failed_within(60)
    draft.model = working
    staged = draft.stage(pair.draft)
    tiny.engine.between_steps(lambda: draft.install(staged, 5)).result()
    assert tiny.run(query(PROMPTS[4], "after"))[0].stats.accepted > 0


def test_a_failing_step_ends_its_sequences_and_not_the_engine(pair: TinyPair) -> None:
    """One failed forward ends its batch; three in a row, and the engine is dead."""
    target = _Always(9)
    with bench(pair, target=target) as tiny:
        target.fails = 1
        assert tiny.run(query(name="unlucky"))[0].reason == "error"
        assert tiny.run(query(name="lucky"))[0].reason == "length"
        assert tiny.engine.alive
        target.fails = 3
        for i in range(3):
            assert tiny.run(query(name=f"x{i}"))[0].reason == "error"
        with pytest.raises(Unavailable):
            tiny.submit(query(name="too late"))


def test_a_client_that_raises_does_not_reach_the_engine(tiny: Bench) -> None:
    """A closed event loop raises in the callback: the sequence ends, others go on."""

    def gone(delta: object) -> None:
        raise RuntimeError("Event loop is closed")

    tiny.engine.submit(query(name="gone", max_tokens=100, ignore_eos=True), gone)
    assert tiny.run(query(name="here"))[0].reason == "length"


def test_a_change_that_raises_reaches_its_caller_and_no_sequence(tiny: Bench) -> None:
    """The future holds the result or the error; running sequences go on."""
    running = tiny.submit(query(name="running", max_tokens=100, ignore_eos=True))

    def broken() -> None:
        raise ArithmeticError("broken change")

    with pytest.raises(ArithmeticError, match="broken change"):
        tiny.engine.between_steps(broken).result(10)
    assert tiny.engine.between_steps(lambda: 7).result(10) == 7
    assert running.wait().reason == "length"
    faults = tiny.metrics.registry.get_sample_value(
        "slipstream_engine_faults_total", {"part": "engine"}
    )
    assert not faults


def test_a_change_after_the_end_is_cancelled(pair: TinyPair) -> None:
    """So its caller does not wait for an engine that has stopped."""
    with bench(pair) as tiny:
        pass
    assert tiny.engine.between_steps(lambda: None).cancelled()


def test_shutting_down_ends_every_query(pair: TinyPair) -> None:
    """Running and waiting ones alike get a last delta."""
    with bench(pair, slots=1) as tiny:
        listeners = [
            tiny.submit(query(name=f"q{i}", max_tokens=200, ignore_eos=True)) for i in range(3)
        ]
    assert {listener.wait(5).reason for listener in listeners} <= {"error", "length"}


class _Always(TableModel):
    """A target that always prefers one token; its next `fails` forwards raise."""

    def __init__(self, token: int) -> None:
        super().__init__(VOCABULARY, seed=0)
        self._token, self.fails = token, 0

    def logits(self, context: object) -> np.ndarray:
        return np.where(np.arange(VOCABULARY) == self._token, 5.0, 0.0)

    def forward(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Tensor:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("out of memory")
        return super().forward(slots, ids_BT, starts_B, upto, tree).float().to(DEVICE)


class Failing:
    """A draft model whose forward raises."""

    def __init__(self, model: object) -> None:
        self._model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def forward(self, *args: object, **more: object) -> Tensor:
        raise RuntimeError("the draft is broken")
