"""Chains and trees drafted by the draft model, level by level of a shape.

A node's candidates come from the draft's distribution behind it. A sampled sequence draws them,
siblings with or without replacement. A greedy sequence takes the most likely tokens.

Legend: B sequences, T context tokens that the draft's cache lacks (usually 1 or 2), N candidates,
W nodes of a level that have candidates, X those of them that have a candidate of some rank,
K candidates of such a node, Q draft distributions, V vocabulary.
"""

import torch
from torch import Tensor

from decoder.drafters.base import Drafted, Drafter, DraftGroup, Paths, commit_cache, last_logits
from decoder.models.base import LanguageModel
from decoder.models.kv_cache import Slots, TreePositions
from decoder.models.ragged import integers, ragged
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import (
    Sampling,
    at_least_float32,
    most_likely,
    probabilities,
    sample,
)
from decoder.verification.token_tree import Tree
from decoder.verification.tree_level import TreeLevel, span
from decoder.verification.tree_shape import TreeShape, best_shape, shape_of_widths
from online.messages import MAX_CANDIDATES, MAX_GAMMA


class ChainDrafter(Drafter):
    """Drafts one token behind the other."""

    name = "chain"
    in_auto = True

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return chain_spec(gamma, self.name)

    def propose(self, group: DraftGroup) -> Drafted:
        unseen = [seq.tokens[seq.draft_cached :] for seq in group.seqs]
        proposal = propose(
            group.draft.model,
            group.slots,
            ragged(unseen, group.device),
            integers([len(tokens) for tokens in unseen], group.device),
            integers([seq.draft_cached for seq in group.seqs], group.device),
            max(len(seq.tokens) for seq in group.seqs),
            integers(list(group.wanted), group.device),
            group.shape,
            group.sampling,
            group.uniform_BN,
            group.spec.distinct,
        )
        for seq in group.seqs:
            seq.set_draft_cached(len(seq.tokens))
        fed = group.shape.expanded[1:]
        cells = {node - 1: cell for cell, node in enumerate(fed)}
        return Drafted(proposal, group.wanted, cells=[cells] * len(group.seqs))

    def commit(self, group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
        commit_cache(group, drafted, accepted)


class TreeDrafter(ChainDrafter):
    """Drafts trees: of the widths that a request gives, or of the shape that should emit most."""

    name = "tree"
    max_candidates = MAX_CANDIDATES
    in_auto = False

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        if seq.query.widths:
            shape = shape_of_widths(seq.query.widths)
        else:
            shape = best_shape(seq.draft.rank_acceptance.rates, most if gamma else 0, MAX_GAMMA)
        distinct = not seq.query.replacement
        return DraftSpec(self.name, shape, len(shape.parents), distinct)

    def commit(self, group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
        for count, path in zip(drafted.counts, accepted, strict=True):
            for met, rank in group.shape.first(count).met(path):
                group.draft.rank_acceptance.add(met, rank)
        super().commit(group, drafted, accepted)


def propose(
    model: LanguageModel,
    slots: Slots,
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
    """Encodes what each cache lacks of its context, then drafts a tree.

    Afterwards the cache also holds the nodes that have candidates, in order, behind the context.

    Args:
        unseen_BT: context tokens to encode, of which `unseen_B` ≥ 1 are real.
        starts_B: cached context lengths.
        upto: the longest context.
        drafted_B: candidates to verify. Sequences draft the whole shape; verification ignores
            candidates beyond this number.
        distinct: siblings are drawn without replacement.
    """
    logits_BWV = last_logits(model.forward(slots, unseen_BT, starts_B, upto), unseen_B)
    logits_BWV = at_least_float32(logits_BWV)
    starts_B = starts_B + unseen_B
    count = len(unseen_B)
    tokens_BN = torch.zeros((count, len(shape.parents)), dtype=torch.long, device=logits_BWV.device)
    logits: list[Tensor] = []
    sources = 0 if sampling.all_greedy else len(shape.expanded)
    probs_BQV = logits_BWV.new_empty((count, sources, logits_BWV.shape[-1]))
    for level in shape.levels:
        if level.depth:
            upto += len(level.nodes)
            logits_BWV = _forward_level(model, slots, tokens_BN, starts_B, upto, shape, level)
            logits_BWV = at_least_float32(logits_BWV)
        logits.append(logits_BWV)
        probs_BWV = probs_BQV[:, level.first : level.first + len(level.nodes)]
        if not sampling.all_greedy:
            probabilities(logits_BWV, sampling, probs_BWV)
        _choose(tokens_BN, level, logits_BWV, probs_BWV, sampling, uniform_BN, distinct)
    tree = None if shape.is_chain else Tree.of(shape, count, distinct, tokens_BN.device)
    return Proposal(tokens_BN, probs_BQV, logits, drafted_B, tree)


def _forward_level(
    model: LanguageModel,
    slots: Slots,
    tokens_BN: Tensor,
    starts_B: Tensor,
    upto: int,
    shape: TreeShape,
    level: TreeLevel,
) -> Tensor:
    """The draft's logits behind the nodes of a level, [B, W, V]."""
    count, device = len(tokens_BN), tokens_BN.device
    ids_BW = tokens_BN[:, span([node - 1 for node in level.nodes])]
    if shape.is_chain:  # needs no mask
        return model.forward(slots, ids_BW, starts_B + level.depth - 1, upto)
    fed = shape.expanded[1 : level.first + len(level.nodes)]
    visible_WC = shape.visible[list(level.nodes)][:, list(fed)].to(device)
    depth_BW = torch.full((count, len(level.nodes)), level.depth - 1, device=device)
    positions = TreePositions(depth_BW, visible_WC.expand(count, -1, -1))
    return model.forward(slots, ids_BW, starts_B, upto, positions)


def _choose(
    tokens_BN: Tensor,
    level: TreeLevel,
    logits_BWV: Tensor,
    probs_BWV: Tensor,
    sampling: Sampling,
    uniform_BN: Tensor,
    distinct: bool,
) -> None:
    """Writes a level's candidates: the first of each node, then the second, and so on."""
    several = level.widest > 1
    # A greedy sequence beside sampled ones draws a single candidate from all or nothing.
    ranked = sampling.all_greedy or (sampling.any_greedy and several)
    best_BWK = _top_tokens(logits_BWV, level.widest) if ranked else None
    left_BWV = probs_BWV.clone() if several and distinct else probs_BWV
    for k, (having, wanted) in enumerate(level.ranks):
        if not sampling.all_greedy:
            own_BXV = left_BWV[:, having]
            token_BX = sample(own_BXV, uniform_BN[:, wanted])
            if several and distinct:
                left_BWV[:, having] = own_BXV.scatter(2, token_BX[..., None], 0.0)
        if best_BWK is not None:
            best_BX = best_BWK[:, having, min(k, best_BWK.shape[2] - 1)]
            if sampling.all_greedy:
                token_BX = best_BX
            else:
                token_BX = torch.where(sampling.greedy_B[:, None], best_BX, token_BX)
        tokens_BN[:, wanted] = token_BX


def _top_tokens(logits_BWV: Tensor, count: int) -> Tensor:
    """The most likely tokens, [B, W, K]."""
    if count == 1:
        return most_likely(logits_BWV)[..., None]
    best_BWK: Tensor = logits_BWV.topk(min(count, logits_BWV.shape[-1]), -1).indices
    return best_BWK


DRAFTERS = (ChainDrafter(), TreeDrafter())
