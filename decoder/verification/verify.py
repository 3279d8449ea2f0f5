"""Verification: the emitted tokens follow the target's distribution, whatever was proposed.

Chains are verified by block verification (`chain.py`), trees by recursive rejection (`tree.py`).
On a CPU a compiled version of both serves (`fused.py`). All functions are pure: randomness arrives
as uniforms in [0, 1). A sequence that asks for lenience gives up exactness (`lenience.py`).

Legend: B sequences, N candidates of a sequence at most, T = N + 1 verified positions, V vocabulary.
"""

from torch import Tensor

from decoder.verification.chain import Chains, verify_block, verify_chain_greedy, verify_plain
from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import (
    Sampling,
    Uniforms,
    most_likely,
    probabilities,
    runs_fused,
)
from decoder.verification.token_tree import CHOSEN, Tree
from decoder.verification.tree import verify_tree, verify_tree_greedy


def verify(
    logits_BTV: Tensor,
    proposal: Proposal,
    sampling: Sampling,
    accept_uniform_BN: Tensor,
    emit_uniform_B: Tensor,
    lenient: LenientAcceptance | None = None,
) -> Verification:
    """What a step emits, given the target's logits at the last token and at every candidate."""
    uniforms = Uniforms(accept_uniform_BN, emit_uniform_B)
    if runs_fused(logits_BTV):
        from decoder.verification import fused

        truncated = sampling.any_truncated and not sampling.all_greedy
        probs_BTV = probabilities(logits_BTV, sampling) if truncated else None
        return fused.verify(logits_BTV, probs_BTV, proposal, sampling, uniforms, lenient)
    if sampling.all_greedy:
        return _verify_greedy(most_likely(logits_BTV), proposal)
    probs_BTV = probabilities(logits_BTV, sampling)
    if logits_BTV.shape[1] == 1:
        return verify_plain(probs_BTV[:, 0], uniforms)
    if (tree := proposal.tree) is None or all(tree.chains):
        return verify_block(probs_BTV, Chains.of(proposal), uniforms, lenient)
    return _verify_mixed(probs_BTV, proposal, tree, sampling.greedy_B, uniforms, lenient)


def _verify_greedy(best_BT: Tensor, proposal: Proposal) -> Verification:
    tree = proposal.tree
    if tree is not None and not all(tree.chains):
        return verify_tree_greedy(best_BT, proposal, tree)
    chosen_BG = None if tree is None else tree.sources_BN == CHOSEN
    return verify_chain_greedy(best_BT, proposal.tokens_BN, proposal.drafted_B, chosen_BG)


def _verify_mixed(
    probs_BTV: Tensor,
    proposal: Proposal,
    tree: Tree,
    greedy_B: Tensor,
    uniforms: Uniforms,
    lenient: LenientAcceptance | None,
) -> Verification:
    """Block verification for the sequences that are chains, and the tree rule for the others."""
    chains = [b for b, is_chain in enumerate(tree.chains) if is_chain]
    trees = [b for b, is_chain in enumerate(tree.chains) if not is_chain]
    parts = []
    if chains:
        own = None if lenient is None else lenient.select(chains)
        part = Chains.of(proposal.select(chains))
        found = verify_block(probs_BTV[chains], part, uniforms.select(chains), own)
        parts.append((chains, found))
    own = None if lenient is None else lenient.select(trees)
    found = verify_tree(
        probs_BTV[trees],
        proposal.select(trees),
        tree.select(trees),
        greedy_B[trees],
        uniforms.select(trees),
        own,
    )
    return Verification.cat([*parts, (trees, found)])
