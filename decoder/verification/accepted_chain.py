"""The accepted path of a verified tree as a chain: what signals record of a step.

Legend: B sequences, N candidates of a sequence at most, G tokens of a chain, T = G + 1 verified
positions, V vocabulary.
"""

import torch
from torch import Tensor

from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.token_tree import Tree


def accepted_chain(
    proposal: Proposal, verification: Verification, logits_BTV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence's verified chain: tokens_BG, their number, and the target's logits_BTV.

    Of a tree it is the accepted path, continued by the first candidate of each node.
    """
    if (tree := proposal.tree) is None:
        return proposal.tokens_BN, proposal.drafted_B, logits_BTV
    chain_BG, length_B = _chain_of(tree, proposal, verification)
    nodes_BT = torch.nn.functional.pad(chain_BG + 1, (1, 0))
    row_B1 = torch.arange(len(chain_BG), device=chain_BG.device)[:, None]
    return proposal.tokens_BN.gather(1, chain_BG), length_B, logits_BTV[row_B1, nodes_BT]


def _chain_of(tree: Tree, proposal: Proposal, verification: Verification) -> tuple[Tensor, Tensor]:
    """The candidates of each sequence's chain, padded to the tree's depth, and their number."""
    drafted_B, last = proposal.drafted_B, proposal.candidates - 1
    index_N = torch.arange(proposal.candidates, device=drafted_B.device)
    real_BN = index_N < drafted_B[:, None]
    node_B, length_B = torch.zeros_like(drafted_B), torch.zeros_like(drafted_B)
    goes_on_B = torch.ones_like(drafted_B, dtype=torch.bool)
    chain = []
    for depth in range(tree.depth):
        children_BN = (tree.parents_BN == node_B[:, None]) & real_BN
        goes_on_B = goes_on_B & children_BN.any(1)
        accepted_B = verification.path_BN[:, min(depth, last)]
        first_B = children_BN.long().argmax(1)
        next_B = torch.where(depth < verification.accepted_B, accepted_B, first_B)
        chain.append(next_B)
        length_B += goes_on_B
        node_B = torch.where(goes_on_B, next_B + 1, node_B)
    return torch.stack(chain, 1), length_B
