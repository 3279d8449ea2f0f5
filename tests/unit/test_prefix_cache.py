"""Prefix reuse: which kept context a new row begins with, and which ones are kept."""

from hypothesis import given
from hypothesis import strategies as st

from decoder.sequence.prefix_cache import (
    MIN_PREFIX_TOKENS,
    CachedContext,
    PrefixCache,
    common_prefix_length,
)

FIRST = 8  # the first slot that is not a row's


def numbers(length: int, start: int = 0) -> list[int]:
    """A context like no other that starts elsewhere."""
    return list(range(start, start + length))


def finished(tokens: list[int], route: str = "a", slot: int = 0) -> CachedContext:
    return CachedContext(slot, route, tokens, draft_cached=len(tokens), draft_version=3)


def found_slot(prefixes: PrefixCache, tokens: list[int], route: str = "a") -> int | None:
    """The slot whose context `tokens` would begin with."""
    found = prefixes.find(route, tokens, 0, [])
    return None if found is None else found[0].slot


# ── how much two contexts share ──


@given(
    st.lists(st.integers(0, 2)),
    st.lists(st.integers(0, 2)),
    st.integers(0, 12),
    st.lists(st.integers(0, 2)),
)
def test_common_prefix_is_counted_as_one_by_one(
    one: list[int], other: list[int], least: int, shared: list[int]
) -> None:
    """Against a loop over tokens; what is shorter than asked for counts as nothing."""
    one, other = [*shared, *one], [*shared, *other]
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    assert common_prefix_length(one, other, least) == (length if length >= least else 0)


# ── finding ──


def test_the_longest_common_beginning_wins() -> None:
    """Among kept contexts and live ones alike, whatever their order."""
    prefixes = PrefixCache(range(FIRST, FIRST + 2))
    prompt = numbers(60)
    prefixes.store(finished([*prompt[:20], 99, 99]))
    prefixes.store(finished([*prompt[:40], 99, 99]))
    assert prefixes.find("a", prompt, 0, [])[1] == 40  # type: ignore[index]
    live = [finished([*prompt[:length], 99], slot=slot) for slot, length in enumerate((30, 50, 45))]
    context, length = prefixes.find("a", prompt, 0, live)  # type: ignore[misc]
    assert (context.slot, length) == (1, 50)


def test_the_whole_prompt_may_be_found() -> None:
    """A prompt that was seen before, and one that is the beginning of one."""
    prefixes = PrefixCache(range(FIRST, FIRST + 1))
    prefixes.store(finished(numbers(40)))
    assert prefixes.find("a", numbers(40), 0, [])[1] == 40  # type: ignore[index]
    assert prefixes.find("a", numbers(25), 0, [])[1] == 25  # type: ignore[index]


def test_contexts_are_shared_within_a_route_only() -> None:
    """Not with another route's kept context, nor with its live one."""
    prefixes = PrefixCache(range(FIRST, FIRST + 1))
    prefixes.store(finished(numbers(40), route="a"))
    assert prefixes.find("b", numbers(40), 0, [finished(numbers(40), route="a")]) is None
    assert prefixes.find("a", numbers(40), 0, []) is not None


def test_less_than_is_worthwhile_is_not_shared() -> None:
    """One token below the limit is encoded afresh; the limit itself is copied."""
    live = [finished(numbers(MIN_PREFIX_TOKENS))]
    assert PrefixCache(range(0)).find("a", numbers(MIN_PREFIX_TOKENS - 1), 0, live) is None
    assert (
        PrefixCache(range(0)).find("a", [*numbers(MIN_PREFIX_TOKENS - 1), 99, 99], 0, live) is None
    )
    assert PrefixCache(range(0)).find("a", [*numbers(MIN_PREFIX_TOKENS), 99], 0, live) == (
        live[0],
        MIN_PREFIX_TOKENS,
    )


# ── keeping ──


def test_a_kept_context_gets_a_slot_of_its_own() -> None:
    """Each of them another one, until there are no more."""
    prefixes = PrefixCache(range(FIRST, FIRST + 3))
    slots = [prefixes.store(finished(numbers(20, start))) for start in (0, 100, 200)]
    assert sorted(slots) == [FIRST, FIRST + 1, FIRST + 2]  # type: ignore[type-var]
    assert [found_slot(prefixes, numbers(20, start)) for start in (0, 100, 200)] == slots


def test_the_least_recently_used_context_makes_room() -> None:
    """Being found counts as use, and so does being what another row ended with."""
    prefixes = PrefixCache(range(FIRST, FIRST + 3))
    slots = {start: prefixes.store(finished(numbers(20, start))) for start in (0, 100, 200)}
    assert found_slot(prefixes, numbers(20, 0)) == slots[0]
    assert prefixes.store(finished(numbers(20, 100))) is None
    assert prefixes.store(finished(numbers(20, 300))) == slots[200]
    assert found_slot(prefixes, numbers(20, 200)) is None
    assert [found_slot(prefixes, numbers(20, start)) for start in (0, 100)] == [
        slots[0],
        slots[100],
    ]
    assert prefixes.store(finished(numbers(20, 400))) == slots[200], "nobody has used 300 since"


def test_a_conversation_that_went_on_replaces_its_beginning() -> None:
    """Its next turn takes over the slot; nobody else has to make room."""
    prefixes = PrefixCache(range(FIRST, FIRST + 2))
    other = prefixes.store(finished(numbers(20, 500)))
    first = prefixes.store(finished(numbers(20)))
    assert prefixes.store(finished(numbers(35))) == first
    assert prefixes.find("a", numbers(50), 0, [])[1] == 35  # type: ignore[index]
    assert found_slot(prefixes, numbers(20, 500)) == other


def test_what_a_kept_context_contains_is_not_kept_again() -> None:
    """Neither the same context, nor a beginning of it."""
    prefixes = PrefixCache(range(FIRST, FIRST + 2))
    assert prefixes.store(finished(numbers(40))) is not None
    assert prefixes.store(finished(numbers(40))) is None
    assert prefixes.store(finished(numbers(20))) is None


def test_routes_neither_replace_nor_contain_each_other() -> None:
    """The same tokens of another route are another context."""
    prefixes = PrefixCache(range(FIRST, FIRST + 2))
    mine, theirs = (
        prefixes.store(finished(numbers(40))),
        prefixes.store(finished(numbers(40), route="b")),
    )
    assert {mine, theirs} == {FIRST, FIRST + 1}
    assert (found_slot(prefixes, numbers(40)), found_slot(prefixes, numbers(40), "b")) == (
        mine,
        theirs,
    )


def test_nothing_shorter_than_worthwhile_is_kept() -> None:
    """It could never be found."""
    prefixes = PrefixCache(range(FIRST, FIRST + 1))
    assert prefixes.store(finished(numbers(MIN_PREFIX_TOKENS - 1))) is None
    assert prefixes.store(finished(numbers(MIN_PREFIX_TOKENS))) == FIRST


def test_without_slots_nothing_is_kept() -> None:
    """Contexts are still shared with live rows."""
    prefixes = PrefixCache(range(FIRST, FIRST))
    assert prefixes.store(finished(numbers(40))) is None
    assert found_slot(prefixes, numbers(40)) is None
    assert prefixes.find("a", numbers(40), 0, [finished(numbers(40))]) is not None


def test_clearing_forgets_contexts_and_frees_their_slots() -> None:
    """After a fault nobody knows what the slots hold."""
    prefixes = PrefixCache(range(FIRST, FIRST + 2))
    for start in (0, 100):
        prefixes.store(finished(numbers(20, start)))
    prefixes.clear()
    assert found_slot(prefixes, numbers(20)) is None
    assert {prefixes.store(finished(numbers(20, start))) for start in (0, 100)} == {
        FIRST,
        FIRST + 1,
    }


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=24), st.booleans()),
        max_size=40,
    )
)
def test_two_kept_contexts_never_share_a_slot(history: list[tuple[str, list[int], bool]]) -> None:
    """Whatever comes and is looked up: a found context is the latest that was copied to its slot, on its route."""
    prefixes = PrefixCache(range(FIRST, FIRST + 3))
    held: dict[int, tuple[str, list[int]]] = {}
    for route, tail, looks in history:
        tokens = [*[7] * (MIN_PREFIX_TOKENS - 4), *tail]
        if not looks:
            if (slot := prefixes.store(finished(tokens, route))) is not None:
                held[slot] = route, tokens
        elif (found := prefixes.find(route, tokens, 0, [])) is not None:
            context, length = found
            assert held[context.slot] == (route, context.tokens)
            assert tokens[:length] == context.tokens[:length]
            assert length == max(
                common_prefix_length(kept, tokens, 1) for at, kept in held.values() if at == route
            )
    assert set(held) <= {FIRST, FIRST + 1, FIRST + 2}
