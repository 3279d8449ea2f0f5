"""Graph-structured drafting (arXiv 2407.16207): hypotheses with equal last tokens share children.

The draft model extends the likeliest hypotheses level by level. A hypothesis whose last tokens
equal those of an extended hypothesis is not extended itself; it shares that hypothesis' children.
So the draft encodes fewer tokens than it proposes. For verification the graph is unrolled into a
tree, and every candidate is verified behind its own ancestors.

The paper is lossless for greedy decoding only; this is lossless for sampling, too. Sampled
sequences share within a depth only. Everything that decides the path to a node of depth d (which
hypotheses exist, share, or are extended) was drawn before the children of depth-d nodes. So those
children are fresh draws from a known distribution, whichever hypothesis they stand behind, and
verification needs no more than that. Unlikely hypotheses stay in the tree, because dropping drawn
tokens would change the distribution. Greedy sequences draw nothing and share across depths.

Legend: B sequences, W hypotheses of a level that are extended, C cells of the draft's cache that
hold hypotheses, K children of a hypothesis, N candidates of a sequence at most, Q draft
distributions, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from decoder.device.transfer import to_host, upload
from decoder.drafters.base import (
    Drafted,
    Drafter,
    DraftGroup,
    Paths,
    commit_cache,
    encode_contexts,
)
from decoder.drafters.hypotheses import Graph, cached_cells, tree_of
from decoder.models.kv_cache import TreePositions
from decoder.models.ragged import integers, ragged
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import at_least_float32, probabilities, sample
from decoder.verification.tree_shape import chain_shape
from online.messages import MAX_CANDIDATES, MAX_GAMMA

WIDTH = 2  # children of an extended hypothesis


class GraphDrafter(Drafter):
    """Drafts graphs, unrolled to trees."""

    name = "graph"
    max_candidates = MAX_CANDIDATES

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return DraftSpec(self.name, chain_shape(max(most, MAX_GAMMA)), most if gamma else 0)

    def propose(self, group: DraftGroup) -> Drafted:
        greedy = group.sampling.greedy_B.tolist()
        graphs = [Graph(seq.tokens[-1], greedy[b]) for b, seq in enumerate(group.seqs)]
        logits_BQV, probs_BQV = extend(group, graphs)
        unrolled = [graphs[b].unrolled(count) for b, count in enumerate(group.wanted)]
        counts = list(map(len, unrolled))
        tokens = [[hypothesis.token for hypothesis, _ in nodes] for nodes in unrolled]
        proposal = Proposal(
            ragged(tokens, group.device),
            probs_BQV,
            logits_BQV,
            integers(counts, group.device),
            tree_of(unrolled, group.device),
        )
        return Drafted(proposal, counts, cells=[cached_cells(nodes) for nodes in unrolled])

    def commit(self, group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
        commit_cache(group, drafted, accepted)


def extend(group: DraftGroup, graphs: Sequence[Graph]) -> tuple[list[Tensor], Tensor]:
    """Extends the graphs level by level until each has the candidates that it may have.

    Returns the draft's logits behind the extended hypotheses, in pieces of [B, W, V], and their
    probabilities, [B, Q, V].
    """
    width = min(WIDTH, max(group.wanted))
    limits = [max(1, count // width) for count in group.wanted]
    logits: list[Tensor] = []
    probs: list[Tensor] = []
    extended = 0
    logits_BWV = encode_contexts(group)
    while True:
        logits.append(at_least_float32(logits_BWV))
        probs.append(
            logits[-1] if group.sampling.all_greedy else probabilities(logits[-1], group.sampling)
        )
        drawn = _draw(logits[-1], probs[-1], group, [graph.extended for graph in graphs], width)
        token_lists, prob_lists = to_host(*(each.flatten(1) for each in drawn))
        for b, graph in enumerate(graphs):
            graph.extend(token_lists[b], prob_lists[b], extended, width, limits[b])
        extended += logits_BWV.shape[1]
        if not (widest := max(len(graph.frontier) for graph in graphs)):
            break
        logits_BWV = _forward(group, graphs, extended - 1, widest)
    probs_BQV = torch.cat(probs, 1)
    return logits, probs_BQV[:, :0] if group.sampling.all_greedy else probs_BQV


def _draw(
    logits_BWV: Tensor, probs_BWV: Tensor, group: DraftGroup, extended: list[int], width: int
) -> tuple[Tensor, Tensor]:
    """Children, without replacement, and the draft's probability of each: [B, W, K] both."""
    sampling, uniform_BN = group.sampling, group.uniform_BN
    tokens_BWK: Tensor = logits_BWV.topk(width, -1).indices
    if not sampling.all_greedy:
        # A hypothesis has its own uniforms, however many other sequences extend beside it.
        order_W = torch.arange(logits_BWV.shape[1], device=group.device)
        ordinal_BW = integers(extended, group.device)[:, None] + order_W
        left_BWV = probs_BWV.clone()
        drawn: list[Tensor] = []
        for k in range(width):
            index_BW = (width * ordinal_BW + k).clamp(max=uniform_BN.shape[1] - 1)
            drawn.append(sample(left_BWV, uniform_BN.gather(1, index_BW)))
            left_BWV.scatter_(2, drawn[-1][..., None], 0.0)
        greedy_B11 = sampling.greedy_B[:, None, None]
        tokens_BWK = torch.where(greedy_B11, tokens_BWK, torch.stack(drawn, -1))
    return tokens_BWK, logits_BWV.softmax(-1).gather(2, tokens_BWK)


def _forward(group: DraftGroup, graphs: Sequence[Graph], cells: int, width: int) -> Tensor:
    """Encodes the frontiers into `width` new cells behind `cells` earlier ones: [B, W, V]."""
    count = len(graphs)
    ids_BW = np.zeros((count, width), np.int64)
    depth_BW = np.zeros((count, width), np.int64)
    visible_BWC = np.zeros((count, width, cells + width), np.bool_)
    visible_BWC[:, :, cells:] = np.eye(width, dtype=np.bool_)  # padding sees itself
    for b, graph in enumerate(graphs):
        for w, hypothesis in enumerate(graph.frontier):
            assert hypothesis.parent is not None
            hypothesis.cells = (*hypothesis.parent.cells, cells + w)
            ids_BW[b, w] = hypothesis.token
            depth_BW[b, w] = len(hypothesis.cells) - 1
            visible_BWC[b, w, list(hypothesis.cells)] = True
    starts = [len(seq.tokens) for seq in group.seqs]
    return group.draft.model.forward(
        group.slots,
        upload(ids_BW, group.device),
        integers(starts, group.device),
        max(starts) + cells + width,
        TreePositions(upload(depth_BW, group.device), upload(visible_BWC, group.device)),
    )


DRAFTERS = (GraphDrafter(),)
