"""Drafting from a draft's earlier layers: each token has the distribution of the exit that it left by."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder.drafters import early_exit as exits
from decoder.drafters.base import DraftGroup
from decoder.models.loading import over_slots
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.policy.token_acceptance import (
    CONFIDENCE_BUCKETS,
    Evidence,
    TokenAcceptance,
    exit_passed,
    exit_taken,
)
from decoder.verification.sampling import Sampling
from tests.exactness.test_graph import Context

V, LAYERS, DRAFTED = 40, 3, 6
CONTEXTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def module() -> LlamaForCausalLM:
    torch.manual_seed(1)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.4,
        )
    )  # fmt: skip
    return made.eval()


def group(
    module: LlamaForCausalLM,
    uniform_BN: torch.Tensor,
    kept: TokenAcceptance | None = None,
    price: DraftCost = NO_COST,
) -> DraftGroup:
    """What is known of tokens that left at an exit, or did not, is in `kept`; nothing is known to be accepted less."""
    (model,) = over_slots([module], 2, 40, V)
    draft: Any = SimpleNamespace(model=model, token_acceptance=kept or TokenAcceptance())
    rows: Any = [Context(list(tokens)) for tokens in CONTEXTS]
    for row in rows:
        row.draft, row.acceptance = draft, SimpleNamespace(rate=0.5)
        row.query = SimpleNamespace(temperature=1.0)
    sampling, scheme = Sampling.of([1.0, 1.0], [0, 0], [1.0, 1.0], V), SimpleNamespace()
    return DraftGroup(
        draft, scheme, slice(0, 2), rows, [DRAFTED] * 2, sampling, uniform_BN, V, "cpu", price
    )  # type: ignore[arg-type]


def good_from(share: int) -> TokenAcceptance:
    """Tokens of exits are kept where the exit was so sure, and not otherwise; those that went on, sometimes."""
    known = TokenAcceptance()
    for passed in range(1, LAYERS):
        for at in range(CONFIDENCE_BUCKETS):
            for _ in range(400):
                known.record(Evidence(False, exit_taken(passed), at), at >= share)
    return known


def told(module: LlamaForCausalLM, context: list[int]) -> list[torch.Tensor]:
    """What `transformers` says after each layer, behind the context."""
    with torch.no_grad():
        states = module(torch.tensor([context]), output_hidden_states=True).hidden_states[1:]
        *early, last = (state[0, -1] for state in states)  # the last one has been through the norm
        return [module.lm_head(module.model.norm(state)) for state in early] + [
            module.lm_head(last)
        ]


@pytest.mark.parametrize("share", [0, 2, 3, CONFIDENCE_BUCKETS])
def test_every_token_is_drawn_from_the_first_exit_that_is_good(
    module: LlamaForCausalLM, share: int
) -> None:
    """Each row for itself; the first token comes from all layers, as the context does."""
    uniform_BN = torch.rand(
        2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    asked = group(module, uniform_BN, good_from(share))
    found, deepest = exits.ExitDrafter().propose(asked), []
    for n in range(DRAFTED):
        depths = []
        for b, context in enumerate(CONTEXTS):
            said = told(module, [*context, *found.tokens_BN[b, :n].tolist()])
            good = (
                e
                for e in range(LAYERS - 1)
                if n and int(CONFIDENCE_BUCKETS * said[e].softmax(-1).max()) >= share
            )
            depths.append(next(good, LAYERS - 1))
            assert torch.allclose(found.logits_BQV[n][b, 0], said[depths[-1]], atol=1e-4), (n, b)
            assert len(asked.evidence[b][n]) == min(depths[-1] + 1, LAYERS - 1) * (n > 0)
        deepest.append(max(depths))
    assert len(set(deepest[1:])) > 1 or share in (0, CONFIDENCE_BUCKETS)
    assert not (held := len(asked.cells[0])) or deepest[held] == LAYERS - 1, (
        "what is kept has passed all layers"
    )


@pytest.mark.parametrize(("price", "layers"), [(0.01, LAYERS), (3.0, 1)])
def test_another_layer_has_to_be_worth_its_price(
    module: LlamaForCausalLM, price: float, layers: int
) -> None:
    """Where an exit is worse than what comes after it."""
    uniform_BN = torch.full((2, DRAFTED), 0.5, dtype=torch.float64)
    asked = group(module, uniform_BN, good_from(CONFIDENCE_BUCKETS), DraftCost(0.0, 0.0, price))
    exits.ExitDrafter().propose(asked)
    assert asked.forwards == pytest.approx(1 + (DRAFTED - 1) * layers / LAYERS)


def test_what_became_of_tokens_is_learnt(module: LlamaForCausalLM) -> None:
    """At an exit that nothing is known of tokens are drawn; when they turn out bad, no more."""
    known, forwards = TokenAcceptance(), []
    for seed in range(60):
        uniform_BN = torch.rand(
            2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        asked = group(module, uniform_BN, known, DraftCost(0.0, 0.0, 0.01))
        drafter = exits.ExitDrafter()
        drafter.propose(asked)
        assert asked.forwards is not None
        forwards.append(asked.forwards)
        path = [
            0
        ]  # the first one, from all layers, is kept, and the second one never but where it is from these, too
        deep = [
            len(one[1]) == LAYERS - 1 and one[1][-1].source == exit_passed(LAYERS - 1)
            for one in asked.evidence
        ]
        drafter.settle(asked, [[*path, 1] if all_layers else path for all_layers in deep])
    assert forwards[0] == pytest.approx(1 + (DRAFTED - 1) / LAYERS)
    assert np.mean(forwards[-10:]) > 1 + (DRAFTED - 1) * 0.9


def test_what_was_kept_is_a_context_like_any_other(module: LlamaForCausalLM) -> None:
    """The next step's distributions are those of the whole draft behind whatever was accepted."""
    uniform_BN = torch.rand(
        2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    asked = group(module, uniform_BN, good_from(1))
    drafter = exits.ExitDrafter()
    found = drafter.propose(asked)
    kept = [[0, 1, 2, 3], [0, 1]]
    drafter.settle(asked, kept)
    for row, path, tokens in zip(asked.seqs, kept, found.tokens_BN.tolist(), strict=True):
        row.tokens += [*(tokens[n] for n in path), 11]
        row.draft_cached = min(row.draft_cached, len(row.tokens) - 1)
    again = drafter.propose(asked)
    for b, row in enumerate(asked.seqs):
        assert torch.allclose(again.logits_BQV[0][b, 0], told(module, row.tokens)[-1], atol=1e-4)
