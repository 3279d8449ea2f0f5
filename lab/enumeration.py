"""How far what serves is from the target alone: trees are verified, and nothing is sampled.

Every assignment of tokens to a tree's candidates is a row of one batch, with the probability that it is drafted. The
verifier takes its randomness as uniforms, and the intervals of uniforms that lead to each decision are found by
bisection: it is measured as a black box, as it serves. Two models are tables of logits.

Legend: B rows, N candidates, Q distributions, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.verification.proposal import CHOSEN, Proposal, Tree
from decoder.verification.sampling import Sampling, probabilities
from decoder.verification.tree_shape import TreeShape
from decoder.verification.verify import Verification

Floats = NDArray[np.float64]
Setting = tuple[float, int, float]  # temperature, top-k, top-p
V = 3
HALVINGS = 34  # of [0, 1): 6e-11 of it are left
LEFT = 1e-9  # measure that may be no more than what halving leaves
TABLES = 304  # almost everywhere two tokens are left when the first is rejected: with one there is nothing to get wrong
TARGET, DRAFT = 0, 1
SHAPES = {  # the parent of each candidate
    "chain": (0, 1, 2),
    "three at the root": (0, 0, 0),
    "two, then one each": (0, 0, 1, 2),
    "two, then two": (0, 0, 1, 1, 2),
    "siblings after a grandchild": (0, 1, 0, 2, 2),
    "wide below": (0, 1, 1, 1),
}
WAYS = ["replaced", "distinct", "chosen", "chosen before drawn"]
WHOLE = "whole"  # a chain, each candidate drawn from its own distribution, and verified as one
CHOSEN_WHOLE = "whole, chosen"
AHEAD, BEHIND = (
    "whole, chosen ahead",
    "whole, chosen behind",
)  # of drawn ones, and it ends where these say so
CHAINS = [WHOLE, CHOSEN_WHOLE, AHEAD, BEHIND]


def logits(who: int, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """Those of a model behind some tokens, drawn once."""
    return torch.from_numpy(np.random.default_rng([who, TABLES, *tokens]).normal(0, 1.5, V)).to(
        dtype
    )


def way(shape: tuple[int, ...], node: int) -> list[int]:
    """The nodes from below the root to this one."""
    return [] if node == 0 else [*way(shape, shape[node - 1]), node]


def sources(shape: tuple[int, ...], way: str) -> list[int]:
    first = [n == shape.index(parent) for n, parent in enumerate(shape)]
    chosen = {
        "chosen": [True] * len(shape),
        CHOSEN_WHOLE: [True] * len(shape),
        "chosen before drawn": first,
        AHEAD: [n == 0 for n in range(len(shape))],
        BEHIND: [n == len(shape) - 1 for n in range(len(shape))],
    }.get(way, [False] * len(shape))
    return [
        CHOSEN if is_chosen else parent for parent, is_chosen in zip(shape, chosen, strict=True)
    ]


def ends_early(row: tuple[int, ...], way: str) -> bool:
    """A chain of unsteady length: for all but the first tokens of some it is a candidate shorter."""
    return way in (AHEAD, BEHIND) and sum(row[:-1]) % V == 0


def boundary(reaches: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Per row the largest uniform for which `reaches` holds, by bisection of [0, 1)."""
    low, high = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        holds = reaches(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return (low + high) / 2


def outcome_masses(draw: Callable[[Tensor], Tensor], count: int, vocab_size: int) -> Tensor:
    """Measure of the uniforms that `draw` maps to each token, [count, V]. `draw` is non-decreasing in its uniform."""
    edges = [boundary(lambda u, v=v: draw(u) <= v, count) for v in range(vocab_size)]
    return torch.diff(torch.stack([torch.zeros(count, dtype=torch.float64), *edges], 1), dim=1)


@dataclass(frozen=True)
class Case:
    """Rows of one shape: tokens that may be drafted, what the models say of them, and how probable each row is."""

    shape: tuple[int, ...]
    rows: Sequence[tuple[int, ...]]
    setting: Setting
    logits_BTV: Tensor  # the target's
    proposal: Proposal
    probability_B: Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], way: str, setting: Setting, dtype: torch.dtype) -> "Case":
        """All assignments of tokens to a tree's candidates, drawn or chosen in one of `WAYS`."""
        rows, source = list(itertools.product(range(V), repeat=len(shape))), sources(shape, way)
        sampling = of_all(setting, len(rows))
        q_BQV = probabilities(told(DRAFT, shape, rows, dtype), sampling)
        tree = Tree.of(TreeShape(shape), len(rows), way != "replaced", "cpu")
        tree = replace(
            tree, sources_BN=torch.tensor([source] * len(rows)), chains=[way in CHAINS] * len(rows)
        )
        drafted_B = torch.tensor([len(shape) - ends_early(row, way) for row in rows])
        of_tree = None if way == WHOLE else tree
        proposal = Proposal(
            torch.tensor(rows),
            q_BQV[:, : len(shape)] if way == WHOLE else q_BQV,
            [],
            drafted_B,
            of_tree,
        )
        probability_B = torch.tensor(
            [_probability(shape, row, q_BQV[b], source, way) for b, row in enumerate(rows)],
            dtype=torch.float64,
        )
        return cls(shape, rows, setting, told(TARGET, shape, rows, dtype), proposal, probability_B)

    @property
    def whole(self) -> bool:
        tree = self.proposal.tree
        return tree is None or tree.chains[0]

    @property
    def sampling(self) -> Sampling:
        return of_all(self.setting, len(self.rows))

    @property
    def depth(self) -> int:
        return max(len(way(self.shape, node)) for node in range(len(self.shape) + 1))


def of_all(setting: Setting, rows: int) -> Sampling:
    return Sampling.of(*([value] * rows for value in setting), V)  # type: ignore[arg-type]


def told(
    who: int, shape: tuple[int, ...], rows: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> Tensor:
    """What a model says behind every node of every row, [B, T, V]."""
    nodes = range(len(shape) + 1)
    said = [
        logits(who, [row[n - 1] for n in way(shape, node)], dtype) for row in rows for node in nodes
    ]
    return torch.stack(said).view(len(rows), len(nodes), V)


def _probability(
    shape: tuple[int, ...], row: tuple[int, ...], q_QV: Tensor, source: list[int], way: str
) -> float:
    """That a drafter draws these candidates; one that chooses takes the least likely token, whatever is drawn."""
    found = 1.0
    for n, parent in enumerate(shape):
        q = q_QV[parent].double().clone()
        if n == len(shape) - 1 and ends_early(row, way):
            found *= row[n] == 0  # padding
            continue
        if source[n] == CHOSEN:
            found *= row[n] == (int(q.argmin()) + n) % V
            continue
        if way != "replaced":
            for m in range(n):
                if shape[m] == parent and source[m] != CHOSEN:
                    q[row[m]] = 0
        mass = float(q.sum())
        # A drafter that has nothing to draw from gives anything: here always the first token.
        found *= float(q[row[n]]) / mass if mass > 0 else row[n] == 0
    return found


def on(
    device: torch.device | str, judged: Callable[..., Verification]
) -> Callable[..., Verification]:
    """As a verifier serves on this device: everything goes there, and the verdict comes back."""

    def move(value: Any, there: torch.device | str) -> Any:
        if isinstance(value, Tensor):
            return value.to(there)
        if isinstance(value, list):
            return [move(one, there) for one in value]
        if isinstance(value, (Proposal, Sampling, Tree, Verification)):
            return replace(
                value,
                **{field.name: move(getattr(value, field.name), there) for field in fields(value)},
            )
        return value

    return lambda *told: move(judged(*(move(value, device) for value in told)), "cpu")


def emitted(judged: Callable[..., Verification], case: Case, length: int) -> Floats:
    """What the rows add to the joint distribution of the next tokens; the target goes on where a step emits fewer."""
    count, N = len(case.rows), len(case.shape)
    half_B, always, never = torch.full((count,), 0.5, dtype=torch.float64), 0.0, 1 - 2.0**-53

    def run(accept_BN: Tensor, emit_B: Tensor) -> Verification:
        return judged(case.logits_BTV, case.proposal, case.sampling, accept_BN, emit_B)

    def passing(n: int, before_BN: Tensor) -> Tensor:
        """The measure of the uniforms of candidate n that keep it, after these of others, where none behind it is."""

        def passes(u: Tensor) -> Tensor:
            trial_BN = before_BN.clone()
            trial_BN[:, n], trial_BN[:, n + 1 :] = u, never
            verdict = run(trial_BN, half_B)
            return ((verdict.path_BN == n) & (torch.arange(N) < verdict.accepted_B[:, None])).any(1)

        return boundary(passes, count)

    joint: Floats = np.zeros((V,) * length)
    for node in range(N + 1):  # the walk that stops there
        accept_BN, reach_B = torch.zeros(count, N, dtype=torch.float64), case.probability_B.clone()
        path = way(case.shape, node)
        if case.whole:  # the longest prefix of a chain that passes is kept
            for n in range(max(0, node - 1), N):
                pass_B = passing(n, torch.zeros_like(accept_BN))
                reach_B = reach_B * (pass_B if n < node else 1 - pass_B)
            accept_BN[:, node:] = never
        else:
            for n in met(case.shape, path):
                pass_B, kept = passing(n, accept_BN), n + 1 in path
                reach_B = reach_B * (pass_B if kept else 1 - pass_B)
                accept_BN[:, n] = always if kept else never
        emit_BV = outcome_masses(lambda u, a=accept_BN: run(a, u).next_B, count, V)
        verdict = run(accept_BN, half_B)
        for b in range(count):
            if reach_B[b] > LEFT:
                assert verdict.path_BN[b, : verdict.accepted_B[b]].tolist() == [n - 1 for n in path]
                tokens = [case.rows[b][n - 1] for n in path]
                for v in range(V):
                    spread(joint, case, [*tokens, v], float(reach_B[b] * emit_BV[b, v]))
    return joint


def met(shape: tuple[int, ...], path: list[int]) -> Iterator[int]:
    """The candidates that are tried on a walk along these nodes."""
    for n, parent in enumerate(shape):
        onward = next((child for child in path if shape[child - 1] == parent), len(shape) + 1)
        if parent in (0, *path) and n + 1 <= onward:
            yield n


def spread(joint: Floats, case: Case, tokens: list[int], mass: float) -> None:
    if len(tokens) == joint.ndim:
        joint[tuple(tokens)] += mass
        return
    said = logits(TARGET, tokens, case.logits_BTV.dtype)[None, None]
    for v, p in enumerate(probabilities(said, of_all(case.setting, 1))[0, 0].double().tolist()):
        spread(joint, case, [*tokens, v], mass * p)


def distance(judged: Callable[..., Verification], *cases: Case) -> float:
    """Total variation between what is emitted and the target alone; the cases are one drafter's, of several shapes."""
    length = max(case.depth for case in cases) + 1
    found: Floats = sum(emitted(judged, case, length) for case in cases)  # type: ignore[assignment]
    expected = np.zeros_like(found)
    spread(expected, cases[0], [], 1.0)
    return float(np.abs(found - expected).sum() / 2)
