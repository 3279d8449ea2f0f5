"""The cases of `bench decode`, in blocks of what is compared."""

from lab.bench.systems import Case

CONCURRENCIES = (1, 8, 32, 64)
BATCHES = (8, 32)
PEERS = (("generate", "batched"), ("continuous", "continuous"))
ASSISTED_GAMMAS = (1, 2, 3, 4, 6)
Block = list[tuple[str, Case]]  # (system, case)


def blocks() -> list[Block]:
    """Cases by block; cases of one block are compared, and run at about the same time."""
    return [
        *(_alone(sampled) for sampled in (False, True)),
        *(_together(n) for n in CONCURRENCIES[1:]),
        *(_useless_draft(n) for n in CONCURRENCIES),
    ]


def _alone(sampled: bool) -> Block:
    name, suffix = kind(sampled), " sampled" * sampled
    assisted = [
        Case(f"assisted γ={gamma}, {name}", sampled=sampled, gamma=gamma, drafts=True)
        for gamma in ASSISTED_GAMMAS
    ]
    return [
        ("generate", Case(f"generate, {name}", sampled=sampled)),
        *(("generate", case) for case in assisted),
        ("ours", Case(f"plain, 1{suffix}", sampled=sampled)),
        ("ours", Case(f"speculative, 1{suffix}", sampled=sampled, drafts=True)),
    ]


def _together(n: int) -> Block:
    peers = [(who, Case(f"{name}, {n}", at_once=n)) for who, name in PEERS if n in BATCHES]
    return [
        *peers,
        ("ours", Case(f"plain, {n}", at_once=n)),
        ("ours", Case(f"speculative, {n}", at_once=n, drafts=True)),
    ]


def _useless_draft(n: int) -> Block:
    return [
        ("random", Case(f"plain beside it, {n}", at_once=n)),
        ("random", Case(f"random draft, {n}", at_once=n, drafts=True)),
    ]


def kind(sampled: bool) -> str:
    return "sampled" if sampled else "greedy"
