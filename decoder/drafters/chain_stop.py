"""Where a batch's chains stop, and the proposal that they make.

All sequences of a step share its forwards. So a candidate, or a forward of the draft, has to pay
for all sequences together.

Legend: B sequences, N candidates of a sequence at most, Q draft distributions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from torch import Tensor

from decoder.drafters.base import Drafted, DraftGroup
from decoder.drafters.chain import Chain
from decoder.models.ragged import integers, ragged
from decoder.policy.draft_cost import DraftCost
from decoder.sequence.sequence import LiveSequence
from decoder.verification.proposal import Proposal
from decoder.verification.token_tree import Tree
from decoder.verification.tree_shape import chain_shape
from online.messages import MAX_GAMMA


def length_limit(seq: LiveSequence, most: int) -> int:
    """Candidates that a sequence may draft. These chains stop by themselves: sure guesses are free.

    A request that fixes γ gets exactly that.
    """
    return MAX_GAMMA if most and seq.query.gamma is None else most


def start_chains(group: DraftGroup) -> list[Chain]:
    """The group's empty chains."""
    cost = group.cost.scaled(1 / len(group.seqs))
    return [
        Chain.of(seq, limit, cost, group)
        for seq, limit in zip(group.seqs, group.wanted, strict=True)
    ]


def drafted_chains(
    chains: Sequence[Chain],
    logits_BQV: list[Tensor],
    probs_BQV: Tensor,
    group: DraftGroup,
    forwards: int,
) -> Drafted:
    """Lets n-grams extend the chains, then makes them a proposal."""
    length = extend_with_guesses(chains, group.cost)
    counts = [min(len(chain.tokens), length) for chain in chains]
    proposal = _proposal(chains, counts, logits_BQV, probs_BQV, group) if any(counts) else None
    evidence = [[[evident] for evident in chain.evidence] for chain in chains]
    return Drafted(proposal, counts, forwards, evidence=evidence)


def _proposal(
    chains: Sequence[Chain],
    counts: list[int],
    logits_BQV: list[Tensor],
    probs_BQV: Tensor,
    group: DraftGroup,
) -> Proposal:
    most, device = max(counts), group.device
    tokens_BN = ragged([chain.tokens[:most] for chain in chains], device)
    drafted_B = integers(counts, device)
    sources = [chain.sources[:most] for chain in chains]
    if all(own == list(range(len(own))) for own in sources):
        # The model drew every token: a plain chain.
        return Proposal(tokens_BN, probs_BQV[:, :most], logits_BQV[:most], drafted_B)
    tree = Tree.of(chain_shape(most), len(chains), False, device)
    tree = replace(tree, sources_BN=ragged(sources, device))
    return Proposal(tokens_BN, probs_BQV, logits_BQV, drafted_B, tree)


def extend_with_guesses(chains: Sequence[Chain], cost: DraftCost) -> int:
    """N-grams extend the chains while a candidate is worth its place. Returns the longest length.

    Drawn tokens stay, and so do all tokens of a chain whose length the request fixes.
    """
    drawn_length = max(chain.drawn_length for chain in chains)
    length, gain = 0, 0.0
    while expected := sum(chain.accepted_at(length) for chain in chains):
        required = length < drawn_length or any(
            chain.fixed_length and length < len(chain.tokens) for chain in chains
        )
        if expected < cost.per_candidate and not required:
            break
        length += 1
        gain += expected - cost.per_candidate
    worthwhile = gain >= cost.per_step or any(chain.fixed_length for chain in chains)
    return length if drawn_length or worthwhile else 0


def tokens_worth_a_forward(chains: Sequence[Chain], cost: DraftCost, masks: int) -> int:
    """Tokens of each chain that the next forward of the model should draw; 0: none is worth it.

    `masks` are the tokens that one forward may draw beside the first. `cost` has a start where
    nothing is drafted yet.
    """
    if any(chain.fixed_length for chain in chains):
        return 1 + masks
    prospects = [chain.model_prospects(masks) for chain in chains]
    expected = [sum(place) for place in zip_longest(*prospects, fillvalue=0.0)]
    # Expected tokens fall from place to place, so these are the first ones.
    gains = [tokens - cost.per_candidate for tokens in expected if tokens >= cost.per_candidate]
    return len(gains) if sum(gains) >= cost.per_forward + cost.per_step else 0
