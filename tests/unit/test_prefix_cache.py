"""Prefix reuse: which context a new sequence copies, and which contexts are stored."""

from hypothesis import given
from hypothesis import strategies as st

from decoder.sequence.prefix_cache import (
    MIN_PREFIX_TOKENS,
    CachedContext,
    PrefixCache,
    common_prefix_length,
)

FIRST = 8  # the first slot of the cache


def numbers(length: int, start: int = 0) -> list[int]:
    """Shares no prefix with one of another start."""
    return list(range(start, start + length))


def finished(tokens: list[int], route: str = "a", slot: int = 0) -> CachedContext:
    return CachedContext(slot, route, tokens, draft_cached=len(tokens), draft_version=3)


def found_slot(cache: PrefixCache, tokens: list[int], route: str = "a") -> int | None:
    """The slot that a sequence with these tokens copies from."""
    found = cache.find(route, tokens, 0, [])
    return None if found is None else found[0].slot


def shared_length(cache: PrefixCache, tokens: list[int]) -> int:
    """The length of the prefix that a sequence of route "a" reuses."""
    found = cache.find("a", tokens, 0, [])
    return 0 if found is None else found[1]


# ── common prefixes ──


@given(
    st.lists(st.integers(0, 2)),
    st.lists(st.integers(0, 2)),
    st.integers(0, 12),
    st.lists(st.integers(0, 2)),
)
def test_common_prefix_length_equals_that_of_a_loop(
    one: list[int], other: list[int], least: int, shared: list[int]
) -> None:
    """A prefix below the minimum counts as none."""
    one, other = [*shared, *one], [*shared, *other]
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    assert common_prefix_length(one, other, least) == (length if length >= least else 0)


# ── finding ──


def test_the_longest_common_prefix_wins() -> None:
    """Among stored and live contexts, in any order."""
    cache = PrefixCache(range(FIRST, FIRST + 2))
    prompt = numbers(60)
    cache.store(finished([*prompt[:20], 99, 99]))
    cache.store(finished([*prompt[:40], 99, 99]))
    assert shared_length(cache, prompt) == 40
    live = [finished([*prompt[:length], 99], slot=slot) for slot, length in enumerate((30, 50, 45))]
    assert cache.find("a", prompt, 0, live) == (live[1], 50)


def test_of_equal_prefixes_the_one_with_most_draft_cache_wins() -> None:
    """Only what the present draft version has encoded counts."""
    live = [
        CachedContext(0, "a", numbers(40), draft_cached=10, draft_version=2),
        CachedContext(1, "a", numbers(40), draft_cached=20, draft_version=2),
        CachedContext(2, "a", numbers(40), draft_cached=40, draft_version=1),
    ]
    cache = PrefixCache(range(0))
    assert cache.find("a", numbers(40), 2, live) == (live[1], 40)
    assert cache.find("a", numbers(40), 1, live) == (live[2], 40)


def test_the_whole_prompt_may_be_found() -> None:
    """A prompt that was seen before, and one that is a prefix of another."""
    cache = PrefixCache(range(FIRST, FIRST + 1))
    cache.store(finished(numbers(40)))
    assert shared_length(cache, numbers(40)) == 40
    assert shared_length(cache, numbers(25)) == 25


def test_contexts_are_shared_within_a_route_only() -> None:
    """Neither stored nor live contexts of another route are found."""
    cache = PrefixCache(range(FIRST, FIRST + 1))
    cache.store(finished(numbers(40), route="a"))
    assert cache.find("b", numbers(40), 0, [finished(numbers(40), route="a")]) is None
    assert cache.find("a", numbers(40), 0, []) is not None


def test_a_prefix_below_the_minimum_is_not_shared() -> None:
    """One token less is encoded again; the minimum itself is copied."""
    live = [finished(numbers(MIN_PREFIX_TOKENS))]
    assert PrefixCache(range(0)).find("a", numbers(MIN_PREFIX_TOKENS - 1), 0, live) is None
    assert (
        PrefixCache(range(0)).find("a", [*numbers(MIN_PREFIX_TOKENS - 1), 99, 99], 0, live) is None
    )
    assert PrefixCache(range(0)).find("a", [*numbers(MIN_PREFIX_TOKENS), 99], 0, live) == (
        live[0],
        MIN_PREFIX_TOKENS,
    )


# ── storing ──


def test_each_stored_context_has_its_own_slot() -> None:
    """Until there are no more slots."""
    cache = PrefixCache(range(FIRST, FIRST + 3))
    slots = [cache.store(finished(numbers(20, start))) for start in (0, 100, 200)]
    assert sorted(slots) == [FIRST, FIRST + 1, FIRST + 2]  # type: ignore[type-var]
    assert [found_slot(cache, numbers(20, start)) for start in (0, 100, 200)] == slots


def test_the_least_recently_used_context_is_evicted() -> None:
    """Being found counts as use, and so does covering another finished context."""
    cache = PrefixCache(range(FIRST, FIRST + 3))
    slots = {start: cache.store(finished(numbers(20, start))) for start in (0, 100, 200)}
    assert found_slot(cache, numbers(20, 0)) == slots[0]
    assert cache.store(finished(numbers(20, 100))) is None
    assert cache.store(finished(numbers(20, 300))) == slots[200]
    assert found_slot(cache, numbers(20, 200)) is None
    assert [found_slot(cache, numbers(20, start)) for start in (0, 100)] == [
        slots[0],
        slots[100],
    ]
    assert cache.store(finished(numbers(20, 400))) == slots[200], "300 was not used since"


def test_the_next_turn_of_a_conversation_replaces_the_last_one() -> None:
    """In the same slot, so that no other context is evicted."""
    cache = PrefixCache(range(FIRST, FIRST + 2))
    other = cache.store(finished(numbers(20, 500)))
    first = cache.store(finished(numbers(20)))
    assert cache.store(finished(numbers(35))) == first
    assert shared_length(cache, numbers(50)) == 35
    assert found_slot(cache, numbers(20, 500)) == other


def test_a_context_that_is_already_stored_is_not_stored_again() -> None:
    """Neither the same context, nor a prefix of it."""
    cache = PrefixCache(range(FIRST, FIRST + 2))
    assert cache.store(finished(numbers(40))) is not None
    assert cache.store(finished(numbers(40))) is None
    assert cache.store(finished(numbers(20))) is None


def test_contexts_of_two_routes_are_stored_apart() -> None:
    """The same tokens on another route are another context."""
    cache = PrefixCache(range(FIRST, FIRST + 2))
    mine, theirs = (
        cache.store(finished(numbers(40))),
        cache.store(finished(numbers(40), route="b")),
    )
    assert {mine, theirs} == {FIRST, FIRST + 1}
    assert (found_slot(cache, numbers(40)), found_slot(cache, numbers(40), "b")) == (
        mine,
        theirs,
    )


def test_a_context_below_the_minimum_is_not_stored() -> None:
    """It could never be found."""
    cache = PrefixCache(range(FIRST, FIRST + 1))
    assert cache.store(finished(numbers(MIN_PREFIX_TOKENS - 1))) is None
    assert cache.store(finished(numbers(MIN_PREFIX_TOKENS))) == FIRST


def test_without_slots_nothing_is_stored() -> None:
    """Contexts of live sequences are still shared."""
    cache = PrefixCache(range(FIRST, FIRST))
    assert cache.store(finished(numbers(40))) is None
    assert found_slot(cache, numbers(40)) is None
    assert cache.find("a", numbers(40), 0, [finished(numbers(40))]) is not None


def test_clearing_drops_contexts_and_frees_their_slots() -> None:
    """After a fault the content of the slots is unknown."""
    cache = PrefixCache(range(FIRST, FIRST + 2))
    for start in (0, 100):
        cache.store(finished(numbers(20, start)))
    cache.clear()
    assert found_slot(cache, numbers(20)) is None
    assert {cache.store(finished(numbers(20, start))) for start in (0, 100)} == {
        FIRST,
        FIRST + 1,
    }


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=24), st.booleans()),
        max_size=40,
    )
)
def test_two_stored_contexts_never_share_a_slot(history: list[tuple[str, list[int], bool]]) -> None:
    """A found context is the last one copied to its slot, and its prefix the longest."""
    cache = PrefixCache(range(FIRST, FIRST + 3))
    held: dict[int, tuple[str, list[int]]] = {}
    for route, tail, looks in history:
        tokens = [*[7] * (MIN_PREFIX_TOKENS - 4), *tail]
        if not looks:
            if (slot := cache.store(finished(tokens, route))) is not None:
                held[slot] = route, tokens
        elif (found := cache.find(route, tokens, 0, [])) is not None:
            context, length = found
            assert held[context.slot] == (route, context.tokens)
            assert tokens[:length] == context.tokens[:length]
            assert length == max(
                common_prefix_length(kept, tokens, 1) for at, kept in held.values() if at == route
            )
    assert set(held) <= {FIRST, FIRST + 1, FIRST + 2}
