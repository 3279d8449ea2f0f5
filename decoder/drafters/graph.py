"""Graph-structured drafting (arXiv 2407.16207): hypotheses that have come to the same tokens share what follows them.

Level by level the draft model says what follows the strongest hypotheses, and candidates are drawn from that. One whose
last tokens another hypothesis has, too, is not drafted on: what is drafted behind that one stands behind it as well. So
fewer tokens go through the draft than are drafted on. For verification the graph is unrolled into the tree that it
stands for: every candidate is verified behind its own ancestors.

Lossless, where the paper is so for greedy decoding only. Hypotheses of a sampled sequence share what follows only with those
of their own depth. So all that decides the way to a node of depth d, which hypotheses there are, which of them share,
which are drafted on, was drawn before anything behind nodes of depth d was: behind any of them, whomever it shares
with, stand fresh draws from a distribution that is known, if not the draft's own for that context. That is all that
verification asks for. A weak hypothesis is kept, only not drafted on: to drop what was drawn would be to draw from
something else. Of a greedy sequence nothing is drawn, and hypotheses of all depths share.

Legend: B sequences, W hypotheses of a level that are drafted on, C cells that they have been fed to, K candidates behind
each, N candidates of a sequence at most, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from decoder.device.transfer import to_host, upload
from decoder.drafters.base import DraftGroup, begin, keep
from decoder.models.kv_cache import TreePositions
from decoder.models.ragged import integers, ragged
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec
from decoder.verification.proposal import Proposal, Tree
from decoder.verification.sampling import at_least_float32, probabilities, sample
from decoder.verification.tree_shape import chain_shape
from online.messages import MAX_GAMMA

SHARED = 2  # last tokens that two hypotheses have to have in common
WIDTH = 2  # candidates behind a hypothesis
BEAM = 2  # hypotheses of a depth that are drafted on: the likeliest


@dataclass(slots=True)
class Hypothesis:
    parent: "Hypothesis | None"
    token: int  # of the root the sequence's last one
    chance: float = 1.0  # as the draft sees it
    source: int = -1  # the distribution that it was drawn from
    cells: tuple[int, ...] = ()  # where its ancestors and it were fed to; empty: it was not
    children: "list[Hypothesis]" = field(default_factory=list)
    like: "Hypothesis | None" = None  # the one whose children are its, too

    @property
    def last(self) -> tuple[int, ...]:
        tokens: list[int] = []
        at: Hypothesis | None = self
        while at is not None and len(tokens) < SHARED:
            tokens.append(at.token)
            at = at.parent
        return tuple(tokens)


class Graph:
    """One sequence's hypotheses."""

    def __init__(self, last_token: int, greedy: bool) -> None:
        self.root = Hypothesis(None, last_token)
        self.frontier = [self.root]
        self.grown = 0  # hypotheses that have been drafted on
        self._greedy = greedy
        self._known: dict[
            tuple[int, ...], Hypothesis
        ] = {}  # that are drafted on, by their last tokens

    def grow(
        self, drawn: Sequence[int], chances: Sequence[float], first: int, wide: int, most: int
    ) -> None:
        """Takes so many candidates behind each hypothesis of the frontier; those to be drafted on are the next one.

        `most` are drafted on in all. `first` is the first one's distribution.
        """
        level: list[Hypothesis] = []
        for w, node in enumerate(self.frontier):
            for k in range(wide * w, wide * (w + 1)):
                level.append(Hypothesis(node, drawn[k], node.chance * chances[k], first + w))
                node.children.append(level[-1])
        self.grown += len(self.frontier)
        beam = min(BEAM, most - self.grown)
        if not self._greedy:
            self._known.clear()
        self.frontier = []
        for hypothesis in sorted(level, key=lambda each: -each.chance):
            hypothesis.like = self._known.get(hypothesis.last)
            if hypothesis.like is None and len(self.frontier) < beam:
                self._known[hypothesis.last] = hypothesis
                self.frontier.append(hypothesis)

    def unrolled(self, candidates: int) -> "list[tuple[Hypothesis, int]]":
        """The tree, level by level: what stands at each of its nodes, and the node before; as far as there is room."""
        found: list[tuple[Hypothesis, int]] = []
        level = [(0, self.root)]
        for _ in range(MAX_GAMMA):
            below = []
            for number, node in level:
                for child in (node.like or node).children:
                    if len(found) == candidates:
                        return found
                    found.append((child, number))
                    below.append((len(found), child))
            level = below
        return found


class GraphDrafter:
    """A `Drafter`."""

    uses_model = waits = True

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return DraftSpec("graph", chain_shape(max(most, MAX_GAMMA)), most if gamma else 0)

    def propose(self, group: DraftGroup) -> Proposal:
        graphs = [
            Graph(seq.tokens[-1], greedy)
            for seq, greedy in zip(group.seqs, group.sampling.greedy_B.tolist(), strict=True)
        ]
        logits_BQV, probs_BQV = grow(group, graphs)
        trees = [graph.unrolled(count) for graph, count in zip(graphs, group.drafted, strict=True)]
        group.drafted[:] = map(len, trees)
        group.cells[:] = [_held(tree) for tree in trees]
        tokens_BN = ragged([[node.token for node, _ in tree] for tree in trees], group.device)
        drafted_B = integers(group.drafted, group.device)
        return Proposal(tokens_BN, probs_BQV, logits_BQV, drafted_B, _joined(trees, group.device))

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        keep(group, kept)


def grow(group: DraftGroup, graphs: Sequence[Graph]) -> tuple[list[Tensor], Tensor]:
    """Level by level, as far as the sequences' uniforms go. Returns what the draft said behind each hypothesis."""
    wide, fed = min(WIDTH, max(group.drafted)), 0
    room = [
        max(1, count // wide) for count in group.drafted
    ]  # hypotheses that a sequence may draft on
    logits: list[Tensor] = []
    probs: list[Tensor] = []
    logits_BWV = begin(group)
    while True:
        logits.append(at_least_float32(logits_BWV))
        probs.append(
            logits[-1] if group.sampling.all_greedy else probabilities(logits[-1], group.sampling)
        )
        drawn = _draw(logits[-1], probs[-1], group, [graph.grown for graph in graphs], wide)
        told = to_host(*(each.flatten(1) for each in drawn))
        for graph, most, tokens, chances in zip(graphs, room, *told, strict=True):
            graph.grow(tokens, chances, fed, wide, most)
        fed += logits_BWV.shape[1]
        if not (width := max(len(graph.frontier) for graph in graphs)):
            break
        logits_BWV = _forward(group, graphs, fed - 1, width)
    probs_BQV = torch.cat(probs, 1)
    return logits, probs_BQV[:, :0] if group.sampling.all_greedy else probs_BQV


def _draw(
    logits_BWV: Tensor, probs_BWV: Tensor, group: DraftGroup, grown: list[int], wide: int
) -> tuple[Tensor, Tensor]:
    """Candidates, without replacement, and how likely they seemed, [B, W, K] each."""
    sampling, uniform_BN = group.sampling, group.uniform_BN
    tokens_BWK: Tensor = logits_BWV.topk(wide, -1).indices
    if not sampling.all_greedy:
        # A sequence's uniforms are its hypotheses' own, however many others have beside them.
        ordinal_BW = integers(grown, group.device)[:, None] + torch.arange(
            logits_BWV.shape[1], device=group.device
        )
        left_BWV, drawn = probs_BWV.clone(), []
        for k in range(wide):
            place_BW = (wide * ordinal_BW + k).clamp(max=uniform_BN.shape[1] - 1)
            drawn.append(sample(left_BWV, uniform_BN.gather(1, place_BW)))
            left_BWV.scatter_(2, drawn[-1][..., None], 0.0)
        tokens_BWK = torch.where(
            sampling.greedy_B[:, None, None], tokens_BWK, torch.stack(drawn, -1)
        )
    return tokens_BWK, logits_BWV.softmax(-1).gather(2, tokens_BWK)


def _forward(group: DraftGroup, graphs: Sequence[Graph], cells: int, width: int) -> Tensor:
    """What the draft says behind the frontiers, of which `width` hypotheses a sequence are fed behind so many others."""
    count = len(graphs)
    ids_BW, depth_BW = np.zeros((count, width), np.int64), np.zeros((count, width), np.int64)
    visible_BWC = np.zeros((count, width, cells + width), np.bool_)
    visible_BWC[:, :, cells:] = np.eye(width, dtype=np.bool_)  # padding sees itself
    for b, graph in enumerate(graphs):
        for w, node in enumerate(graph.frontier):
            assert node.parent is not None
            node.cells = (*node.parent.cells, cells + w)
            ids_BW[b, w], depth_BW[b, w] = node.token, len(node.cells) - 1
            visible_BWC[b, w, list(node.cells)] = True
    nodes = TreePositions(upload(depth_BW, group.device), upload(visible_BWC, group.device))
    starts, upto = (
        [len(seq.tokens) for seq in group.seqs],
        max(len(seq.tokens) for seq in group.seqs),
    )
    return group.draft.model.forward(
        group.slots,
        upload(ids_BW, group.device),
        integers(starts, group.device),
        upto + cells + width,
        nodes,
    )


def _held(tree: Iterable[tuple[Hypothesis, int]]) -> dict[int, int]:
    """Of candidates that were fed behind their own ancestors, the cell. Others stand behind hypotheses like theirs."""
    held: dict[int, int] = {}
    own: dict[int, tuple[int, ...]] = {0: ()}
    for n, (node, parent) in enumerate(tree):
        if node.cells and own.get(parent) == node.cells[:-1]:
            held[n], own[n + 1] = node.cells[-1], node.cells
    return held


def _joined(trees: Sequence[Sequence[tuple[Hypothesis, int]]], device: torch.device | str) -> Tree:
    count, most = len(trees), max(map(len, trees))
    parents_BN, sources_BN = np.zeros((count, most), np.int64), np.zeros((count, most), np.int64)
    visible_BTT = np.repeat(np.eye(most + 1, dtype=np.bool_)[None], count, 0)
    for b, tree in enumerate(trees):
        for n, (node, parent) in enumerate(tree):
            parents_BN[b, n], sources_BN[b, n] = parent, node.source
            visible_BTT[b, n + 1] |= visible_BTT[b, parent]
    visible = upload(visible_BTT, device)
    distinct_B = torch.ones(count, dtype=torch.bool, device=device)
    depth = int(visible_BTT.sum(-1).max()) - 1
    return Tree(
        upload(parents_BN, device),
        upload(sources_BN, device),
        distinct_B,
        visible,
        depth,
        True,
        [False] * count,
    )
