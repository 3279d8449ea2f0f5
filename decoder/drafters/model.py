"""Drafting by the draft model: level by level of a shape, each node's candidates from what the model says behind it.

Of a sampled sequence they are drawn, siblings with or without replacement; of a greedy one they are the most likely tokens.

Legend: B sequences, T tokens not yet in the draft's cache (1 or 2 as a rule), N candidates, W nodes of a level that have
candidates, K candidates of such a node, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decoder.drafters.base import DraftGroup, behind, keep
from decoder.models.base import LanguageModel
from decoder.models.kv_cache import Slots, TreePositions
from decoder.models.ragged import integers, ragged
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal, Tree
from decoder.verification.sampling import (
    Sampling,
    at_least_float32,
    most_likely,
    probabilities,
    sample,
)
from decoder.verification.tree_shape import TreeLevel, TreeShape, best_shape, shape_of_widths, span
from online.messages import MAX_GAMMA


class ModelDrafter:
    """A `Drafter` of chains and trees."""

    uses_model = waits = True

    def __init__(self, trees: bool) -> None:
        self._trees = trees

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        if not self._trees:
            return chain_spec(gamma)
        if seq.query.widths:
            shape = shape_of_widths(seq.query.widths)
        else:
            shape = best_shape(seq.draft.rank_acceptance.rates, most if gamma else 0, MAX_GAMMA)
        return DraftSpec("tree", shape, len(shape.parents), distinct=not seq.query.replacement)

    def propose(self, group: DraftGroup) -> Proposal:
        unseen = [seq.tokens[seq.draft_cached :] for seq in group.seqs]
        proposal = propose(
            group.draft.model,
            group.slots,
            ragged(unseen, group.device),
            integers([len(tokens) for tokens in unseen], group.device),
            integers([seq.draft_cached for seq in group.seqs], group.device),
            max(len(seq.tokens) for seq in group.seqs),
            integers(list(group.drafted), group.device),
            group.shape,
            group.sampling,
            group.uniform_BN,
            group.spec.distinct,
        )
        fed = group.shape.expanded[1:]
        group.cells[:] = [{node - 1: cell for cell, node in enumerate(fed)}] * len(group.seqs)
        for seq in group.seqs:
            seq.set_draft_cached(len(seq.tokens))
        return proposal

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        if self._trees:
            for count, path in zip(group.drafted, kept, strict=True):
                for met, rank in group.shape.first(count).met(path):
                    group.draft.rank_acceptance.add(met, rank)
        keep(group, kept)


def propose(
    model: LanguageModel,
    seqs: Slots,
    unseen_BT: Tensor,
    unseen_B: Tensor,
    starts_B: Tensor,
    upto: int,
    drafted_B: Tensor,
    shape: TreeShape,
    sampling: Sampling,
    uniform_BN: Tensor,
    distinct: bool = True,
) -> Proposal:
    """Feeds each sequence what its cache lacks (`unseen_BT`, `unseen_B` ≥ 1 of them real), then drafts a tree.

    `starts_B` are the cached lengths, `upto` the longest context after the first feed. Sequences with `drafted_B` below the
    shape's size draft along; what they draft beyond is ignored by verification. The draft's cache holds the nodes that
    have candidates, in their order, but the root, which is a part of the context.
    """
    logits_BWV = model.forward(seqs, unseen_BT, starts_B, upto)
    logits_BWV = at_least_float32(behind(logits_BWV, unseen_B))
    starts_B = starts_B + unseen_B
    count, vocabulary = len(unseen_B), logits_BWV.shape[-1]
    tokens_BN = torch.zeros((count, len(shape.parents)), dtype=torch.long, device=logits_BWV.device)
    logits: list[Tensor] = []
    probs_BQV = logits_BWV.new_empty(
        (count, 0 if sampling.all_greedy else len(shape.expanded), vocabulary)
    )
    for level in shape.levels:
        if level.depth:
            upto += len(level.nodes)
            logits_BWV = _grow(model, seqs, tokens_BN, starts_B, upto, shape, level)
        logits_BWV = at_least_float32(logits_BWV)
        logits.append(logits_BWV)
        probs_BWV = probs_BQV[:, level.first : level.first + len(level.nodes)]
        if not sampling.all_greedy:
            probabilities(logits_BWV, sampling, probs_BWV)
        _choose(tokens_BN, level, logits_BWV, probs_BWV, sampling, uniform_BN, distinct)
    tree = None if shape.is_chain else Tree.of(shape, count, distinct, tokens_BN.device)
    return Proposal(tokens_BN, probs_BQV, logits, drafted_B, tree)


def _grow(
    model: LanguageModel,
    seqs: Slots,
    tokens_BN: Tensor,
    starts_B: Tensor,
    upto: int,
    shape: TreeShape,
    level: TreeLevel,
) -> Tensor:
    """What the draft says behind the nodes of a level."""
    count, device = len(tokens_BN), tokens_BN.device
    ids_BW = tokens_BN[:, span([node - 1 for node in level.nodes])]
    if shape.is_chain:  # contexts as ever
        return model.forward(seqs, ids_BW, starts_B + level.depth - 1, upto)
    fed = shape.expanded[1 : level.first + len(level.nodes)]
    visible_WC = shape.visible[list(level.nodes)][:, list(fed)].to(device)
    depth_BW = torch.full((count, len(level.nodes)), level.depth - 1, device=device)
    return model.forward(
        seqs, ids_BW, starts_B, upto, TreePositions(depth_BW, visible_WC.expand(count, -1, -1))
    )


def _choose(
    tokens_BN: Tensor,
    level: TreeLevel,
    logits_BWV: Tensor,
    probs_BWV: Tensor,
    sampling: Sampling,
    uniform_BN: Tensor,
    distinct: bool,
) -> None:
    """The candidates of a level's nodes: the first of each, then the second of those that have one, and so on."""
    several = level.widest > 1
    ranked = sampling.all_greedy or (
        sampling.any_greedy and several
    )  # else a greedy sequence draws from all or nothing
    best_BWK = _best(logits_BWV, level.widest) if ranked else None
    left_BWV = probs_BWV.clone() if several and distinct else probs_BWV
    for k, (having, wanted) in enumerate(level.ranks):
        if not sampling.all_greedy:
            own_BXV = left_BWV[:, having]
            token_BX = sample(own_BXV, uniform_BN[:, wanted])
            if several and distinct:
                left_BWV[:, having] = own_BXV.scatter(2, token_BX[..., None], 0.0)
        if best_BWK is not None:
            best_BX = best_BWK[:, having, min(k, best_BWK.shape[2] - 1)]
            token_BX = (
                best_BX
                if sampling.all_greedy
                else torch.where(sampling.greedy_B[:, None], best_BX, token_BX)
            )
        tokens_BN[:, wanted] = token_BX


def _best(logits_BWV: Tensor, count: int) -> Tensor:
    """The most likely tokens, [B, W, K]."""
    if count == 1:
        return most_likely(logits_BWV)[..., None]
    best_BWK: Tensor = logits_BWV.topk(min(count, logits_BWV.shape[-1]), -1).indices
    return best_BWK
