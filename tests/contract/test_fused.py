"""The compiled vocabulary operations, against torch's operations in float64."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder.recording.observation import top_tokens
from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling, most_likely, probabilities, sample
from decoder.verification.token_tree import CHOSEN, Tree
from decoder.verification.tree_shape import TreeShape, chain_shape
from decoder.verification.verify import verify
from online.messages import Lenience

SIZES = [3, 64, 1000, 4099]
B, G = 6, 3
TEMPERATURES = [0.0, 1.0, 0.3, 0.0, 2.0, 1.0]
LENIENT = LenientAcceptance.of(
    [None, Lenience("lin", 0.3), None, None, Lenience("exp", 0.4), Lenience("sq", 0.6)]
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sampling(size: int, top_k: int = 0) -> Sampling:
    return Sampling.of(TEMPERATURES, [top_k] * B, [1.0] * B, size)


@pytest.mark.parametrize("size", SIZES)
def test_probabilities_and_samples(size: int) -> None:
    """Both give the same probabilities, the same argmax, and the same samples."""
    logits, uniform = 4 * torch.randn(B, G, size), torch.rand(B, G, dtype=torch.float64)
    logits[1, 0, 1:] = -torch.inf
    room = torch.empty(B, 2 * G, size)
    compiled = probabilities(logits, sampling(size), room[:, G:])
    assert compiled.data_ptr() == room[:, G:].data_ptr(), "written where it was asked for"
    torch.testing.assert_close(
        compiled.double(), probabilities(logits.double(), sampling(size)), rtol=2e-6, atol=1e-7
    )
    assert torch.equal(most_likely(logits), most_likely(logits.double()))
    for drawn in (uniform, torch.zeros_like(uniform)):
        assert torch.equal(sample(compiled, drawn), sample(compiled.double(), drawn))
    last = sample(
        compiled, torch.full_like(uniform, 1 - 2.0**-53)
    )  # where sums in another order may differ
    assert (compiled.gather(-1, last[..., None]) > 0).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("lenient", [None, LENIENT], ids=["exact", "lenient"])
def test_verification(size: int, top_k: int, lenient: LenientAcceptance | None) -> None:
    """Sequences draft nothing, some or all tokens, with drafts near the target or far."""
    reached = set()
    for _ in range(20):
        logits_BTV = 2 * torch.randn(B, G + 1, size)
        draft_BGV = logits_BTV[:, :-1] + torch.rand(B, 1, 1) * torch.randn(B, G, size)
        own = sampling(size, top_k)
        q_BGV = probabilities(draft_BGV.double(), own)
        tokens_BG = sample(q_BGV, torch.rand(B, G, dtype=torch.float64))
        proposal = Proposal(tokens_BG, q_BGV.float(), [], torch.tensor([3, 3, 2, 1, 3, 0]))
        drawn = torch.rand(B, G, dtype=torch.float64), torch.rand(B, dtype=torch.float64)
        reached |= verified_alike(logits_BTV, proposal, own, *drawn, lenient)
    assert reached == set(range(G + 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("distinct", [False, True], ids=["with replacement", "without"])
@pytest.mark.parametrize("lenient", [None, LENIENT], ids=["exact", "lenient"])
def test_verification_of_trees(
    size: int, distinct: bool, lenient: LenientAcceptance | None
) -> None:
    """Candidates were drawn, and some were chosen."""
    shape, reached = TreeShape((0, 0, 0, 1, 1, 2, 4)), set()
    for _ in range(20):
        logits_BTV = 2 * torch.randn(B, 8, size)
        draft_BQV = logits_BTV[:, list(shape.expanded)] + torch.rand(B, 1, 1) * torch.randn(
            B, 4, size
        )
        own, tree = sampling(size), Tree.of(shape, B, distinct, "cpu")
        q_BQV, left_BQV = (probabilities(draft_BQV.double(), own) for _ in range(2))
        tokens = []
        for source in tree.sources_BN[0].tolist():
            tokens.append(sample(left_BQV[:, source], torch.rand(B, dtype=torch.float64)))
            if distinct:
                left_BQV[:, source].scatter_(1, tokens[-1][:, None], 0.0)
        chosen_BN = torch.rand(B, 7) < 0.2
        proposal = Proposal(
            torch.stack(tokens, 1),
            q_BQV.float(),
            [],
            torch.tensor([7, 7, 5, 7, 1, 0]),
            replace(tree, sources_BN=torch.where(chosen_BN, CHOSEN, tree.sources_BN)),
        )
        drawn = torch.rand(B, 7, dtype=torch.float64), torch.rand(B, dtype=torch.float64)
        reached |= verified_alike(logits_BTV, proposal, own, *drawn, lenient)
    assert reached == set(range(shape.depth + 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lenient", [None, LENIENT], ids=["exact", "lenient"])
def test_verification_of_chains_of_drawn_and_chosen_tokens(
    size: int, lenient: LenientAcceptance | None
) -> None:
    """Only drawn tokens have distributions, and some sequences are trees."""
    reached, drawn_of = (
        set(),
        torch.tensor([[0, 1, CHOSEN, 2], [CHOSEN, 0, 1, CHOSEN], [CHOSEN] * 4] * (B // 3)),
    )
    for _ in range(20):
        logits_BTV = 2 * torch.randn(B, 5, size)
        q_BQV = probabilities(
            (logits_BTV[:, :3] + torch.rand(B, 1, 1) * torch.randn(B, 3, size)).double(),
            sampling(size),
        )
        drawn_BN, best_BN = (
            sample(q_BQV[:, [0, 1, 2, 2]], torch.rand(B, 4, dtype=torch.float64)),
            logits_BTV.argmax(-1),
        )
        tokens_BN = torch.where(drawn_of == CHOSEN, best_BN[:, :4], drawn_BN)
        tree = replace(
            Tree.of(chain_shape(4), B, True, "cpu"),
            sources_BN=drawn_of,
            chains=[True] * (B - 1) + [False],
        )
        proposal = Proposal(tokens_BN, q_BQV.float(), [], torch.tensor([4, 3, 4, 4, 4, 4]), tree)
        drawn = torch.rand(B, 4, dtype=torch.float64), torch.rand(B, dtype=torch.float64)
        reached |= verified_alike(logits_BTV, proposal, sampling(size), *drawn, lenient)
    assert reached == set(range(5))


def verified_alike(logits_BTV: Tensor, proposal: Proposal, *more: Any) -> set[int]:
    """Returns the numbers of accepted candidates that occurred."""
    compiled, reference = (
        verify(logits_BTV, proposal, *more),
        verify(logits_BTV.double(), proposal, *more),
    )
    accepted_BN = (
        torch.arange(proposal.candidates) < compiled.accepted_B[:, None]
    )  # the rest of a path is padding
    for field in fields(compiled):
        found, expected = (
            getattr(compiled, field.name).double(),
            getattr(reference, field.name).double(),
        )
        if field.name == "path_BN":
            found, expected = found * accepted_BN, expected * accepted_BN
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=field.name)
    return set(compiled.accepted_B.tolist())


@pytest.mark.parametrize(("size", "k"), [(3, 3), (64, 32), (1000, 32), (4099, 5)])
def test_top_tokens(size: int, k: int) -> None:
    """The recorded top-k tokens and their log-probabilities agree."""
    logits_BTV = 3 * torch.randn(B, G + 1, size)
    logits_BTV[2, 1, k - 1 :] = -torch.inf  # fewer possible tokens than are reported
    count_B = torch.full((B,), G + 1)
    compiled = top_tokens(logits_BTV, count_B, k)
    reference = top_tokens(logits_BTV.double(), count_B, k)
    possible = reference.logp_BTK > -torch.inf  # any of the impossible ones will do
    assert torch.equal(compiled.ids_BTK[possible], reference.ids_BTK[possible])
    for name in ("logp_BTK", "norm_BT"):
        found, expected = getattr(compiled, name).double(), getattr(reference, name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_logits_that_are_no_numbers_stay_within_the_vocabulary() -> None:
    """A broken model emits some token of the vocabulary, and recording it is safe."""
    for broken in (torch.nan, torch.inf, -torch.inf):
        logits_BTV, own = torch.full((B, G + 1, 100), broken), sampling(100)
        proposal = Proposal.empty(B, G, 100, "cpu", greedy=False)
        drawn = torch.rand(B, G, dtype=torch.float64), torch.rand(B, dtype=torch.float64)
        assert verify(logits_BTV, proposal, own, *drawn).next_B.max() < 100
        ids = top_tokens(logits_BTV, torch.full((B,), G + 1), 8).ids_BTK
        assert 0 <= ids.min() <= ids.max() < 100
