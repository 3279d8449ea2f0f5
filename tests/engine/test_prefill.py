"""Prompts: encoded in pieces beside running streams, and not twice where they begin alike.

What the engine does in which step is seen from its own thread: a change between two steps, or a client's callback.
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
    """A prompt that shares no beginning with another one."""
    return tuple(int(t) for t in RNG.integers(4, 300, length))


SHORT, LONG, SYSTEM = tokens(5), tokens(200), tokens(100)
QUESTIONS = [(10 + i, *tokens(3 + 4 * i)) for i in range(5)]


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    with bench(pair, prefill_tokens=PIECE) as made:
        yield made


def at_once(tiny: Bench, *queries: Query) -> list[Listener]:
    """Queries that are taken in by the same step."""
    listeners = [Listener() for _ in queries]

    def submit() -> None:
        for asked, listener in zip(queries, listeners, strict=True):
            tiny.engine.submit(asked, listener)

    tiny.engine.between_steps(submit)
    return listeners


def after(deltas: int, act: Callable[[], None]) -> tuple[Listener, Callable[[Delta], None]]:
    """A listener, and a client for it that acts when it has this many deltas."""
    listener, seen = Listener(), []

    def client(delta: Delta) -> None:
        listener(delta)
        seen.append(delta)
        if len(seen) == deltas:
            act()

    return listener, client


# ── what fits into a step ──


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=40), max_size=8), st.integers(1, 60))
def test_pieces_fit_the_budget_and_only_the_last_is_cut(
    sequences: list[list[int]], budget: int
) -> None:
    """Padded as they are fed; in order, with no more left out than has to be."""
    pieces = fit(sequences, budget)
    assert len(pieces) * max(map(len, pieces), default=0) <= budget
    assert pieces[:-1] == sequences[: len(pieces)][:-1]
    if pieces:
        assert pieces[-1] == sequences[len(pieces) - 1][: len(pieces[-1])]
        assert pieces[-1], "the first sequence gets on in every step"
    whole = all(
        len(piece) == len(sequence) for piece, sequence in zip(pieces, sequences, strict=False)
    )
    if whole and len(pieces) < len(sequences):
        assert (len(pieces) + 1) * max(map(len, sequences[: len(pieces) + 1])) > budget
    assert bool(pieces) == bool(sequences)


# ── pieces ──


@pytest.mark.parametrize("ending", [0, 1, 2])
def test_a_running_stream_goes_on_while_a_long_prompt_comes_in(
    pair: TinyPair, tiny: Bench, ending: int
) -> None:
    """One token a step for the stream, one piece a step of the prompt, also where rows before them end meanwhile."""
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
    assert pieces <= order.index("long") <= pieces + 1, (
        "the stream's own prompt may have come first"
    )


@pytest.mark.parametrize("gamma", [0, 4])
def test_prompts_in_pieces_are_answered_as_the_target_would(
    pair: TinyPair, tiny: Bench, gamma: int
) -> None:
    """Prompts around the size of a piece, all at once, with and without drafting."""
    prompts = [tokens(length) for length in (1, 2, PIECE - 1, PIECE, PIECE + 1, PIECE + 2, 50, 220)]
    asked = [query(prompt, f"q{i}", gamma=gamma, max_tokens=20) for i, prompt in enumerate(prompts)]
    found = [listener.wait() for listener in at_once(tiny, *asked)]
    assert [f.ids for f in found] == [target_alone(pair, prompt, 20) for prompt in prompts]


def test_a_prompt_cancelled_in_the_middle_leaves_its_neighbours_alone(
    pair: TinyPair, tiny: Bench
) -> None:
    """The stream's third token comes with the prompt's third piece: whoever waits behind it is answered exactly."""
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
    # What was encoded of it is kept, and the rest comes when it is asked for again.
    hits = tiny.counter(HITS)
    assert tiny.run(query(LONG, "again"))[0].ids == target_alone(pair, LONG, 24)
    assert 0 < tiny.counter(HITS) - hits <= 4 * PIECE


def test_rows_that_end_before_a_waiting_prompt_do_not_disturb_it(
    pair: TinyPair, tiny: Bench
) -> None:
    """Rows of one to five tokens ahead of it end one after another, and the half-encoded context moves up."""
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
    """The questions about the long system prompt, one after another."""
    return [tiny.run(query((*SYSTEM, *q), f"q{i}", **more))[0].ids for i, q in enumerate(QUESTIONS)]


def expected(pair: TinyPair) -> list[list[int]]:
    return [target_alone(pair, (*SYSTEM, *q), 24) for q in QUESTIONS]


@pytest.mark.parametrize("gamma", [0, 4, None])
def test_a_shared_system_prompt_is_encoded_once(
    pair: TinyPair, tiny: Bench, gamma: int | None
) -> None:
    """All but the first request find the whole of it, and answer as they would without."""
    assert answers(tiny, gamma=gamma) == expected(pair)
    assert tiny.counter(HITS) == len(SYSTEM) * (len(QUESTIONS) - 1)
    assert tiny.counter("vllm:prefix_cache_queries") == sum(
        len(SYSTEM) + len(q) - 1 for q in QUESTIONS
    )


def test_without_kept_contexts_the_answers_are_the_same(pair: TinyPair) -> None:
    """And nothing is found, where requests come one after another."""
    with bench(pair, prefill_tokens=PIECE, kept_contexts=0) as tiny:
        assert answers(tiny) == expected(pair)
        assert tiny.counter(HITS) == 0


def test_a_live_context_is_shared_without_being_kept(pair: TinyPair) -> None:
    """A row that runs lends its prompt, and what it has answered so far."""
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
    """Prompt and answer of one turn are the next one's beginning, also with the rejected drafts behind them."""
    prompt = SYSTEM[:40]
    for turn in range(4):
        hits = tiny.counter(HITS)
        found = tiny.run(query(prompt, f"turn{turn}", max_tokens=20))[0]
        assert found.ids == target_alone(pair, prompt, 20)
        assert tiny.counter(HITS) - hits == (len(prompt) - 4 if turn else 0)
        prompt = (*prompt, *found.ids, 50 + turn, 60, 70)


def test_the_same_prompt_again_needs_no_encoding(pair: TinyPair, tiny: Bench) -> None:
    """All of it but the last token, which is the first step's input."""
    for _ in range(3):
        assert tiny.run(query(LONG))[0].ids == target_alone(pair, LONG, 24)
    assert tiny.counter(HITS) == 2 * (len(LONG) - 1)


def test_a_reused_prompt_is_drafted_from_at_once(pair: TinyPair, tiny: Bench) -> None:
    """The draft's part of a context is taken over as well: no plain steps while the draft catches up."""
    first, second, third = (tiny.run(query(LONG, max_tokens=50))[0].stats for _ in range(3))
    assert tiny.counter(HITS) == 2 * (len(LONG) - 1)
    assert second.steps < first.steps
    assert (second.steps, second.accepted) == (third.steps, third.accepted)


def test_a_swap_in_between_changes_no_answer_and_no_acceptance(pair: TinyPair) -> None:
    """The draft's part of a kept context is the old version's: the new one writes its own."""
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
    """The first request after the swap pays for it; those after it are drafted from the first step on, as before."""
    before = [tiny.run(query(LONG, max_tokens=50))[0].stats.steps for _ in range(2)]
    install(tiny, pair.draft)
    after_swap = [tiny.run(query(LONG, max_tokens=50))[0].stats.steps for _ in range(3)]
    assert after_swap == [*before, before[1]]


def install(tiny: Bench, folder: Path) -> None:
    """Swaps the draft before the next step."""
    draft = tiny.engine.batch.drafts["default"]
    staged = draft.stage(folder)
    tiny.engine.between_steps(lambda: draft.install(staged, draft.version + 1))


def test_a_single_kept_context_makes_room_again_and_again(pair: TinyPair) -> None:
    """Two prompts in turn drive each other out; the one that comes twice in a row is found."""
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
    """Neither kept nor live: whether a prompt was seen is not another route's business."""
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


def test_requests_that_come_together_over_few_slots_stay_exact(pair: TinyPair) -> None:
    """Forty requests of four families over three slots and two kept contexts, with cancellations among them."""
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
