"""The draft's logits at supervised positions, and its divergence from the target there.

Legend: P supervised positions · E hidden size · V vocabulary.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from trainer.batches import TrainingBatch
from trainer.divergences import divergence
from trainer.recipe import Recipe
from trainer.truncated import draft_classes

MIN_TEMPERATURE = 0.5  # colder requests are compared at this temperature


def accepts_positions(module: nn.Module) -> bool:
    """Whether the forward takes token positions; without them no branch can be trained."""
    return "position_ids" in inspect.signature(module.forward).parameters


def draft_logits(module: nn.Module, batch: TrainingBatch) -> Tensor:
    """The draft's logits at the supervised positions [P, V]."""
    # The head is most of a draft's cost: skip it before the first supervised position.
    first = int(batch.column_P.min())
    kept = batch.ids_BT.shape[1] - first
    logits_BTV = module(**_inputs(batch), logits_to_keep=kept).logits
    logits_PV: Tensor = logits_BTV[batch.sequence_P, batch.column_P - first].float()
    return logits_PV


def layer_logits(module: nn.Module, batch: TrainingBatch) -> list[Tensor]:
    """The logits of every layer, by the draft's own norm and head; the last layer comes first.

    Early exits as in S2D (arXiv 2407.01955).

    Raises:
        ValueError: the model is not structured like Llama.
    """
    body: Any = getattr(module, "model", None)
    if not isinstance(getattr(body, "norm", None), nn.Module):
        raise ValueError("recipe: exit_weight requires a draft with Llama's structure")
    _, *states = body(**_inputs(batch), output_hidden_states=True).hidden_states
    *early, last_PE = (state_BTE[batch.sequence_P, batch.column_P] for state_BTE in states)
    normed = [
        last_PE,
        *(body.norm(state_PE) for state_PE in early),
    ]  # the last is normed already
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    return [head(state_PE).float() for state_PE in normed]


def _inputs(batch: TrainingBatch) -> dict[str, Any]:
    inputs = {
        "input_ids": batch.ids_BT,
        "attention_mask": batch.mask,
        "use_cache": False,
    }
    if batch.mask.ndim == 4:
        inputs["position_ids"] = batch.position_BT
    return inputs


def draft_loss(module: nn.Module, batch: TrainingBatch, recipe: Recipe) -> Tensor:
    """The recipe's loss at every supervised position [P]."""
    if not recipe.exit_weight:
        return position_losses(draft_logits(module, batch), batch, recipe)
    logits = layer_logits(module, batch)
    last_P, *early = (position_losses(logits_PV, batch, recipe) for logits_PV in logits)
    total_P = last_P + recipe.exit_weight * sum(early)
    return total_P / (1 + recipe.exit_weight * len(early))


def position_losses(logits_PV: Tensor, batch: TrainingBatch, recipe: Recipe) -> Tensor:
    """The recipe's divergence at every supervised position [P]."""
    target = batch.target
    if recipe.follow_temperature:
        temperature_P = batch.temperature_B.clamp(min=MIN_TEMPERATURE)[batch.sequence_P]
        target = target.at(temperature_P)
        logits_PV = logits_PV / temperature_P[:, None]
    measure = divergence(recipe.divergence, recipe.beta)
    return measure(target.classes_PC, draft_classes(logits_PV, target.ids_PK))
