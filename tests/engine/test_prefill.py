"""Prefill in pieces beside running sequences, and reuse of common prefixes.

The tests act at chosen steps, on the engine's own thread: in a change between two steps, or in a
client's callback.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.models.ragged import fit
from decoder.sequence.prefix_cache import MIN_PREFIX_TOKENS
from online.messages import Delta, Query
from tests.engines import Bench, Listener, bench, query, target_alone
from tests.tiny import TinyPair

PIECE = 16
HITS = "vllm:prefix_cache_hits"
RNG = np.random.default_rng(1)


def tokens(length: int) -> tuple[int, ...]:
    """A random prompt, without a common prefix with others."""
    return tuple(int(t) for t in RNG.integers(4, 300, length))


SHORT, LONG, SYSTEM = tokens(5), tokens(200), tokens(100)
QUESTIONS = [(10 + i, *tokens(3 + 4 * i)) for i in range(5)]


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    with bench(pair, prefill_tokens=PIECE) as made:
        yield made


def at_once(tiny: Bench, *queries: Query) -> list[Listener]:
    """Submits queries that the same step admits."""
    listeners = [Listener() for _ in queries]

    def submit() -> None:
        for asked, listener in zip(queries, listeners, strict=True):
            tiny.engine.submit(asked, listener)

    tiny.engine.between_steps(submit)
    return listeners


def after(deltas: int, act: Callable[[], None]) -> tuple[Listener, Callable[[Delta], None]]:
    """A listener, and a callback for it that acts at this many deltas."""
    listener, seen = Listener(), []

    def client(delta: Delta) -> None:
        listener(delta)
        seen.append(delta)
        if len(seen) == deltas:
            act()

    return listener, client


# ── the budget of a step ──


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=40), max_size=8), st.integers(1, 60))
def test_pieces_fit_the_budget_and_only_the_last_is_cut(
    sequences: list[list[int]], budget: int
) -> None:
    """With padding, in order, and as many as fit."""
    pieces = fit(sequences, budget)
    assert len(pieces) * max(map(len, pieces), default=0) <= budget
    assert pieces[:-1] == sequences[: len(pieces)][:-1]
    if pieces:
        assert pieces[-1] == sequences[len(pieces) - 1][: len(pieces[-1])]
        assert pieces[-1], "the first sequence makes progress in every step"
    whole = all(
        len(piece) == len(sequence) for piece, sequence in zip(pieces, sequences, strict=False)
    )
    if whole and len(pieces) < len(sequences):
        assert (len(pieces) + 1) * max(map(len, sequences[: len(pieces) + 1])) > budget
    assert bool(pieces) == bool(sequences)


# ── pieces ──


@pytest.mark.parametrize("ending", [0, 1, 2])
def test_a_running_stream_goes_on_during_a_long_prefill(
    pair: TinyPair, tiny: Bench, ending: int
) -> None:
    """A step emits a token and encodes a piece, also while sequences in lower slots end."""
    order: list[str] = []
    stream, long = Listener(), Listener()

    def note(name: str, listener: Listener) -> Callable[[Delta], None]:
        return lambda delta: (order.append(name), listener(delta))[1]

    def begin() -> None:
        for i in range(ending):
            tiny.engine.submit(query(SHORT, f"ends{i}", gamma=0, max_tokens=3 + i), Listener())
        tiny.engine.submit(query(SHORT, "stream", gamma=0, max_tokens=60), note("stream", stream))
        tiny.engine.submit(query(LONG, "long", gamma=0), note("long", long))

    tiny.engine.between_steps(begin)
    assert long.wait().ids == target_alone(pair, LONG, 24)
    assert stream.wait().ids == target_alone(pair, SHORT, 60)
    pieces = math.ceil((len(LONG) - 1) / PIECE)
    # The stream's own prompt may have been encoded first.
    assert pieces <= order.index("long") <= pieces + 1


@pytest.mark.parametrize("gamma", [0, 4])
def test_prefill_in_pieces_gives_the_targets_answers(
    pair: TinyPair, tiny: Bench, gamma: int
) -> None:
    """Prompts around the size of a piece, together, with and without drafting."""
    prompts = [tokens(length) for length in (1, 2, PIECE - 1, PIECE, PIECE + 1, PIECE + 2, 50, 220)]
    asked = [query(prompt, f"q{i}", gamma=gamma, max_tokens=20) for i, prompt in enumerate(prompts)]
    found = [listener.wait() for listener in at_once(tiny, *asked)]
    assert [f.ids for f in found] == [target_alone(pair, prompt, 20) for prompt in prompts]


def test_cancelling_a_query_during_prefill_changes_no_other_answer(
    pair: TinyPair, tiny: Bench
) -> None:
    """It is cancelled at its third piece, with two more prompts waiting behind it."""
    prompts = [tokens(60), tokens(90)]
    stream, client = after(3, lambda: tiny.engine.cancel("gone"))
    others = [Listener() for _ in prompts]
    gone = Listener()

    def begin() -> None:
        tiny.engine.submit(query(SHORT, "stream", gamma=0, max_tokens=50), client)
        tiny.engine.submit(query(LONG, "gone"), gone)
        for i, (prompt, listener) in enumerate(zip(prompts, others, strict=True)):
            tiny.engine.submit(query(prompt, f"other{i}", gamma=i), listener)

    tiny.engine.between_steps(begin)
    assert (gone.wait().reason, gone.deltas.qsize()) == ("cancelled", 0)
    assert [listener.wait().ids for listener in others] == [
        target_alone(pair, prompt, 24) for prompt in prompts
    ]
    assert stream.wait().ids == target_alone(pair, SHORT, 50)
    # Its encoded pieces are stored, and reused when the prompt comes again.
    hits = tiny.counter(HITS)
    assert tiny.run(query(LONG, "again"))[0].ids == target_alone(pair, LONG, 24)
    assert 0 < tiny.counter(HITS) - hits <= 4 * PIECE


def test_sequences_that_end_do_not_disturb_a_prefill_behind_them(
    pair: TinyPair, tiny: Bench
) -> None:
    """Five sequences end one after another, and the partial context moves to lower slots."""
    few = [query(SHORT, f"few{i}", gamma=0, max_tokens=i + 1) for i in range(5)]
    found = [
        listener.wait()
        for listener in at_once(tiny, *few, query(LONG, "long"), query(SYSTEM, "next"))
    ]
    assert [len(f.ids) for f in found[:5]] == [1, 2, 3, 4, 5]
    assert [f.ids for f in found[5:]] == [
        target_alone(pair, LONG, 24),
        target_alone(pair, SYSTEM, 24),
    ]


# ── reuse ──


def answers(tiny: Bench, **more: object) -> list[list[int]]:
    """Asks the questions behind the system prompt, one after another."""
    return [tiny.run(query((*SYSTEM, *q), f"q{i}", **more))[0].ids for i, q in enumerate(QUESTIONS)]


def expected(pair: TinyPair) -> list[list[int]]:
    return [target_alone(pair, (*SYSTEM, *q), 24) for q in QUESTIONS]


@pytest.mark.parametrize("gamma", [0, 4, None])
def test_a_shared_system_prompt_is_encoded_once(
    pair: TinyPair, tiny: Bench, gamma: int | None
) -> None:
    """Every request but the first reuses all of it, and the answers are the same."""
    assert answers(tiny, gamma=gamma) == expected(pair)
    assert tiny.counter(HITS) == len(SYSTEM) * (len(QUESTIONS) - 1)
    assert tiny.counter("vllm:prefix_cache_queries") == sum(
        len(SYSTEM) + len(q) - 1 for q in QUESTIONS
    )


def test_without_stored_contexts_the_answers_are_the_same(pair: TinyPair) -> None:
    """Requests that follow each other reuse nothing."""
    with bench(pair, prefill_tokens=PIECE, kept_contexts=0) as tiny:
        assert answers(tiny) == expected(pair)
        assert tiny.counter(HITS) == 0


def test_a_live_context_is_shared_without_being_stored(pair: TinyPair) -> None:
    """A running sequence shares its prompt and its output so far."""
    with bench(pair, prefill_tokens=PIECE, kept_contexts=0) as tiny:
        whole = target_alone(pair, SYSTEM, 100)
        second = Listener()
        first, client = after(
            30, lambda: tiny.engine.submit(query((*SYSTEM, *whole[:20], 77), "second"), second)
        )
        tiny.engine.submit(query(SYSTEM, "first", gamma=0, max_tokens=100), client)
        assert first.wait().ids == whole
        assert second.wait().ids == target_alone(pair, (*SYSTEM, *whole[:20], 77), 24)
        assert tiny.counter(HITS) == len(SYSTEM) + 20


def test_a_conversation_finds_its_last_turn(pair: TinyPair, tiny: Bench) -> None:
    """A turn starts with the last one's prompt and answer; rejected drafts do no harm."""
    prompt = SYSTEM[:40]
    for turn in range(4):
        hits = tiny.counter(HITS)
        found = tiny.run(query(prompt, f"turn{turn}", max_tokens=20))[0]
        assert found.ids == target_alone(pair, prompt, 20)
        assert tiny.counter(HITS) - hits == (len(prompt) - 4 if turn else 0)
        prompt = (*prompt, *found.ids, 50 + turn, 60, 70)


def test_the_same_prompt_again_needs_no_prefill(pair: TinyPair, tiny: Bench) -> None:
    """All of it is reused, except for the last token, which the first step feeds."""
    for _ in range(3):
        assert tiny.run(query(LONG))[0].ids == target_alone(pair, LONG, 24)
    assert tiny.counter(HITS) == 2 * (len(LONG) - 1)


def test_a_reused_prompt_is_drafted_for_at_once(pair: TinyPair, tiny: Bench) -> None:
    """The draft's KV cache is reused as well, so no plain steps wait for it to catch up."""
    first, second, third = (tiny.run(query(LONG, max_tokens=50))[0].stats for _ in range(3))
    assert tiny.counter(HITS) == 2 * (len(LONG) - 1)
    assert second.steps < first.steps
    assert (second.steps, second.accepted) == (third.steps, third.accepted)


def test_a_swap_in_between_changes_no_answer_and_no_acceptance(pair: TinyPair) -> None:
    """A stored context has the old version's draft cache: the new one writes its own."""
    with bench(pair, drafts={"default": pair.spoilt}, prefill_tokens=PIECE) as tiny:
        assert answers(tiny) == expected(pair)
        install(tiny, pair.draft)
        hits = tiny.counter(HITS)
        again = [tiny.run(query((*SYSTEM, *q), f"r{i}"))[0] for i, q in enumerate(QUESTIONS)]
        assert [f.ids for f in again] == expected(pair)
        assert tiny.counter(HITS) - hits >= len(SYSTEM) * len(QUESTIONS)
    with bench(pair, prefill_tokens=PIECE, kept_contexts=0) as fresh:
        afresh = [fresh.run(query((*SYSTEM, *q), f"r{i}"))[0] for i, q in enumerate(QUESTIONS)]
    assert sum(f.stats.accepted for f in again) >= 0.9 * sum(f.stats.accepted for f in afresh)


def test_after_a_swap_a_popular_prompt_is_encoded_once_by_the_new_draft(
    pair: TinyPair, tiny: Bench
) -> None:
    """The first request after the swap pays for it; later ones draft from their first step."""
    before = [tiny.run(query(LONG, max_tokens=50))[0].stats.steps for _ in range(2)]
    install(tiny, pair.draft)
    after_swap = [tiny.run(query(LONG, max_tokens=50))[0].stats.steps for _ in range(3)]
    assert after_swap == [*before, before[1]]


def install(tiny: Bench, folder: Path) -> None:
    """Swaps the draft before the next step."""
    draft = tiny.engine.batch.drafts["default"]
    staged = draft.stage(folder)
    tiny.engine.between_steps(lambda: draft.install(staged, draft.version + 1))


def test_a_single_stored_context_is_replaced_again_and_again(pair: TinyPair) -> None:
    """Two prompts in turn evict each other; a prompt that comes twice in a row is found."""
    with bench(pair, prefill_tokens=PIECE, kept_contexts=1) as tiny:
        other = tokens(80)
        for prompt, found in (
            (SYSTEM, 0),
            (other, 0),
            (SYSTEM, 0),
            (SYSTEM, len(SYSTEM) - 1),
            (other, 0),
        ):
            hits = tiny.counter(HITS)
            assert tiny.run(query(prompt))[0].ids == target_alone(pair, prompt, 24)
            assert tiny.counter(HITS) - hits == found


def test_routes_share_no_context(pair: TinyPair) -> None:
    """Neither stored nor live: another route must not learn whether a prompt was seen."""
    with bench(pair, drafts={"a": pair.draft, "b": pair.spoilt}, prefill_tokens=PIECE) as tiny:
        second = Listener()
        first, client = after(
            10, lambda: tiny.engine.submit(query(LONG, "second", route="b"), second)
        )
        tiny.engine.submit(query(LONG, "first", route="a", gamma=0, max_tokens=50), client)
        assert second.wait().ids == target_alone(pair, LONG, 24)
        assert first.wait().ids == target_alone(pair, LONG, 50)
        assert (
            tiny.run(query(SYSTEM, route="a"))[0].ids == tiny.run(query(SYSTEM, route="b"))[0].ids
        )
        assert tiny.counter(HITS) == 0
        tiny.run(query(SYSTEM, route="b"))
        assert tiny.counter(HITS) == len(SYSTEM) - 1


def test_many_requests_over_few_slots_stay_exact(pair: TinyPair) -> None:
    """Forty requests with four prefixes, three slots, two stored contexts, and cancellations."""
    stems = [tokens(MIN_PREFIX_TOKENS - 1), tokens(30), SYSTEM[:60], SYSTEM[:20]]
    prompts = [(*stems[i % 4], *tokens(1 + i % 7)) for i in range(40)]
    asked = [
        query(p, f"q{i}", gamma=(0, 4, None, 2)[i // 4 % 4], max_tokens=3 + i % 11)
        for i, p in enumerate(prompts)
    ]
    with bench(pair, prefill_tokens=PIECE, slots=3, kept_contexts=2) as tiny:
        listeners = [tiny.submit(one) for one in asked]
        for i in range(0, 40, 7):
            tiny.engine.cancel(f"q{i}")
        found = [listener.wait() for listener in listeners]
        assert tiny.counter(HITS) > 0
    for answer, one in zip(found, asked, strict=True):
        whole = target_alone(pair, one.prompt_ids, one.max_tokens)
        assert answer.ids == (whole[: len(answer.ids)] if answer.reason == "cancelled" else whole)
    assert sum(answer.reason == "cancelled" for answer in found) <= 6
