"""Early exit: each token is drawn from the distribution of the exit where it leaves the draft."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder.drafters.base import Drafted, DraftGroup
from decoder.drafters.early_exit import ExitDrafter
from decoder.models.loading import over_slots
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.policy.token_acceptance import (
    CONFIDENCE_BUCKETS,
    Evidence,
    TokenAcceptance,
    exit_passed,
    exit_taken,
)
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling
from tests.exactness.test_graph import Context

V, LAYERS, DRAFTED = 40, 3, 6
CONTEXTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def module() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def group(
    module: LlamaForCausalLM,
    uniform_BN: torch.Tensor,
    rates: TokenAcceptance | None = None,
    cost: DraftCost = NO_COST,
) -> DraftGroup:
    """`rates` has what is known of tokens that left at an exit, or passed it."""
    (model,) = over_slots([module], 2, 40, V)
    draft: Any = SimpleNamespace(model=model, token_acceptance=rates or TokenAcceptance())
    rows: Any = [Context(list(tokens)) for tokens in CONTEXTS]
    for row in rows:
        row.draft, row.acceptance = draft, SimpleNamespace(rate=0.5)
        row.query = SimpleNamespace(temperature=1.0)
    sampling, spec = Sampling.of([1.0, 1.0], [0, 0], [1.0, 1.0], V), SimpleNamespace()
    return DraftGroup(
        draft, spec, slice(0, 2), rows, [DRAFTED] * 2, sampling, uniform_BN, V, "cpu", cost
    )  # type: ignore[arg-type]


def good_from(bucket: int) -> TokenAcceptance:
    """Exits' tokens are accepted from this confidence on. Nothing is known of deeper ones."""
    rates = TokenAcceptance()
    for layers in range(1, LAYERS):
        for confidence in range(CONFIDENCE_BUCKETS):
            for _ in range(400):
                evidence = Evidence(False, exit_taken(layers), confidence)
                rates.record(evidence, confidence >= bucket)
    return rates


def proposal_of(drafted: Drafted) -> Proposal:
    assert drafted.proposal is not None
    return drafted.proposal


def logits_by_layer(module: LlamaForCausalLM, context: list[int]) -> list[torch.Tensor]:
    """The logits of `transformers` after each layer, behind the context."""
    with torch.no_grad():
        states = module(torch.tensor([context]), output_hidden_states=True).hidden_states[1:]
        *early, last = (state[0, -1] for state in states)  # the last one is normed
        return [module.lm_head(module.model.norm(state)) for state in early] + [
            module.lm_head(last)
        ]


@pytest.mark.parametrize("bucket", [0, 2, 3, CONFIDENCE_BUCKETS])
def test_every_token_is_drawn_from_the_first_exit_that_is_good(
    module: LlamaForCausalLM, bucket: int
) -> None:
    """Each sequence for itself; the first token comes from all layers, as the context does."""
    uniform_BN = torch.rand(
        2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    drafted = ExitDrafter().propose(group(module, uniform_BN, good_from(bucket)))
    found, deepest = proposal_of(drafted), []
    for n in range(DRAFTED):
        depths = []
        for b, context in enumerate(CONTEXTS):
            expected = logits_by_layer(module, [*context, *found.tokens_BN[b, :n].tolist()])
            good = (
                layer
                for layer in range(LAYERS - 1)
                if n and int(CONFIDENCE_BUCKETS * expected[layer].softmax(-1).max()) >= bucket
            )
            depths.append(next(good, LAYERS - 1))
            logits_V = found.logits_BQV[n][b, 0]
            assert torch.allclose(logits_V, expected[depths[-1]], atol=1e-4), (n, b)
            assert len(drafted.evidence[b][n]) == min(depths[-1] + 1, LAYERS - 1) * (n > 0)
        deepest.append(max(depths))
    assert len(set(deepest[1:])) > 1 or bucket in (0, CONFIDENCE_BUCKETS)
    cached = len(drafted.cells[0])
    assert not cached or deepest[cached] == LAYERS - 1, "cached tokens have passed all layers"


@pytest.mark.parametrize(("cost", "layers"), [(0.01, LAYERS), (3.0, 1)])
def test_another_layer_has_to_be_worth_its_cost(
    module: LlamaForCausalLM, cost: float, layers: int
) -> None:
    """Where an exit is worse than the layers behind it."""
    uniform_BN = torch.full((2, DRAFTED), 0.5, dtype=torch.float64)
    rates = good_from(CONFIDENCE_BUCKETS)
    drafted = ExitDrafter().propose(group(module, uniform_BN, rates, DraftCost(0.0, 0.0, cost)))
    assert drafted.forwards == pytest.approx(1 + (DRAFTED - 1) * layers / LAYERS)


def test_commit_records_what_was_accepted(module: LlamaForCausalLM) -> None:
    """An unknown exit is taken at first, and no more once its tokens are rejected."""
    rates, forwards = TokenAcceptance(), []
    for seed in range(60):
        uniform_BN = torch.rand(
            2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        asked = group(module, uniform_BN, rates, DraftCost(0.0, 0.0, 0.01))
        drafter = ExitDrafter()
        drafted = drafter.propose(asked)
        assert drafted.forwards is not None
        forwards.append(drafted.forwards)
        # The first token is accepted, and the second one if it comes from all layers, too.
        deep = [
            len(evidence[1]) == LAYERS - 1 and evidence[1][-1].source == exit_passed(LAYERS - 1)
            for evidence in drafted.evidence
        ]
        drafter.commit(asked, drafted, [[0, 1] if all_layers else [0] for all_layers in deep])
    assert forwards[0] == pytest.approx(1 + (DRAFTED - 1) / LAYERS)
    assert np.mean(forwards[-10:]) > 1 + (DRAFTED - 1) * 0.9


def test_accepted_tokens_are_a_context_like_any_other(module: LlamaForCausalLM) -> None:
    """The next step has the whole draft's distribution, however many tokens were accepted."""
    uniform_BN = torch.rand(
        2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    asked = group(module, uniform_BN, good_from(1))
    drafter = ExitDrafter()
    drafted = drafter.propose(asked)
    accepted = [[0, 1, 2, 3], [0, 1]]
    drafter.commit(asked, drafted, accepted)
    drawn = proposal_of(drafted).tokens_BN.tolist()
    for row, path, tokens in zip(asked.seqs, accepted, drawn, strict=True):
        row.tokens += [*(tokens[n] for n in path), 11]
        row.draft_cached = min(row.draft_cached, len(row.tokens) - 1)
    again = proposal_of(drafter.propose(asked))
    for b, row in enumerate(asked.seqs):
        expected = logits_by_layer(module, row.tokens)[-1]
        assert torch.allclose(again.logits_BQV[0][b, 0], expected, atol=1e-4)
