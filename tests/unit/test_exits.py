"""Drafting from a draft's earlier layers: each token has the distribution of the exit that it left by."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder.drafters import Group, exits
from decoder.models import over_slots
from decoder.sampling import Sampling
from tests.unit.test_graph import Context

V, LAYERS, DRAFTED = 40, 3, 6
CONTEXTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def module() -> LlamaForCausalLM:
    torch.manual_seed(1)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.25,
        )
    )  # fmt: skip
    return made.eval()


def group(module: LlamaForCausalLM, uniform_BN: torch.Tensor) -> Group:
    (model,) = over_slots([module], 2, 40, V)
    rows: Any = [Context(list(tokens)) for tokens in CONTEXTS]
    draft: Any = SimpleNamespace(model=model)
    sampling, scheme = Sampling.of([1.0, 1.0], [0, 0], [1.0, 1.0], V), SimpleNamespace()
    return Group(draft, scheme, slice(0, 2), rows, [DRAFTED] * 2, sampling, uniform_BN, V, "cpu")  # type: ignore[arg-type]


def told(module: LlamaForCausalLM, context: list[int]) -> list[torch.Tensor]:
    """What `transformers` says after each layer, behind the context."""
    with torch.no_grad():
        states = module(torch.tensor([context]), output_hidden_states=True).hidden_states[1:]
        *early, last = (state[0, -1] for state in states)  # the last one has been through the norm
        return [module.lm_head(module.model.norm(state)) for state in early] + [module.lm_head(last)]


@pytest.mark.parametrize("sure", [0.0, 0.16, 0.18, 0.2, 2.0])
def test_every_token_is_drawn_from_the_first_exit_that_is_sure(
    module: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, sure: float
) -> None:
    """Each row for itself; the first token comes from all layers, as the context does."""
    monkeypatch.setattr(exits, "SURE", sure)
    asked = group(module, torch.rand(2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    found, deepest = exits.ExitDrafter().propose(asked), []
    for n in range(DRAFTED):
        left = []
        for b, context in enumerate(CONTEXTS):
            said = told(module, [*context, *found.tokens_BN[b, :n].tolist()])
            sure_at = (e for e in range(LAYERS - 1) if n and float(said[e].softmax(-1).max()) >= sure)
            left.append(next(sure_at, LAYERS - 1))
            assert torch.allclose(found.logits_BQV[n][b, 0], said[left[-1]], atol=1e-4), (n, b)
        deepest.append(max(left))
    assert len(set(deepest[1:])) > 1 or sure in (0.0, 2.0)
    assert not (held := len(asked.cells[0])) or deepest[held] == LAYERS - 1, "what is kept has passed all layers"


def test_what_was_kept_is_a_context_like_any_other(module: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step's distributions are those of the whole draft behind whatever was accepted."""
    monkeypatch.setattr(exits, "SURE", 0.16)
    uniform_BN = torch.rand(2, DRAFTED, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    asked = group(module, uniform_BN)
    drafter = exits.ExitDrafter()
    found = drafter.propose(asked)
    kept = [[0, 1, 2, 3], [0, 1]]
    drafter.settle(asked, kept)
    for row, path, tokens in zip(asked.rows, kept, found.tokens_BN.tolist(), strict=True):
        row.tokens += [*(tokens[n] for n in path), 11]
        row.draft_cached = min(row.draft_cached, len(row.tokens) - 1)
    again = drafter.propose(asked)
    for b, row in enumerate(asked.rows):
        assert torch.allclose(again.logits_BQV[0][b, 0], told(module, row.tokens)[-1], atol=1e-4)
