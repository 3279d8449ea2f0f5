"""Distillation: a draft learns from logged distributions. No target anywhere."""

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from online.signals import Signal
from trainer.batches import Example, TrainingBatch, batches, collate, split_by_memory
from trainer.divergences import Divergence, divergence, draft_classes
from trainer.rehearsal import Rehearsal

COLDEST = (
    0.5  # temperature that all colder answers are learnt at, where a recipe follows temperatures
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a candidate is made; kept with its version."""

    divergence: str = "forward_kl"
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the divergences that have one
    branch_tokens: Annotated[int, Field(ge=0)] = (
        0  # learnt from of every rejected branch: the draft's own samples
    )
    branch_weight: Annotated[float, Field(ge=0)] = (
        0.1  # of a position on one; on the emitted path it is 1
    )
    masks: Annotated[int, Field(ge=0)] = (
        0  # mask tokens in a row that are learnt from, for drafting in one forward
    )
    mask_weight: Annotated[float, Field(ge=0)] = 0.5  # of a place that one holds
    exit_weight: Annotated[float, Field(ge=0)] = (
        0.0  # of what earlier layers say; the last one's has 1
    )
    follow_temperature: bool = False  # compare at the request's temperature instead of at 1
    selected_share: Annotated[float, Field(gt=0, le=1)] = (
        1.0  # AdaSPEC: those positions with the most to gain
    )
    rehearsal: Annotated[float, Field(ge=0)] = (
        0.5  # weight of what a former draft could do, on its own samples
    )
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    epochs: Annotated[int, Field(ge=1)] = 8
    batch_signals: Annotated[int, Field(ge=1)] = 8
    warmup_steps: Annotated[int, Field(ge=0)] = 4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0

    @classmethod
    def of(cls, chosen: Mapping[str, str | bool | int | float]) -> "Recipe":
        """The default recipe, but for what is chosen.

        Raises:
            ValueError: a field that recipes do not have, or a value that it can't have; both are named.
        """
        if unknown := set(chosen) - {field.name for field in fields(cls)}:
            raise ValueError(f"recipe: no field {', '.join(sorted(unknown))}")
        checked: Recipe = TypeAdapter(cls).validate_python(dict(chosen))
        divergence(checked.divergence, checked.beta)
        return checked

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Distilled:
    steps: int
    positions: int
    first_loss: float
    last_loss: float
    seconds: float


def draft_logits(module: nn.Module, batch: TrainingBatch) -> Tensor:
    """The draft's logits at the supervised positions [P, V]."""
    first = int(
        batch.column_P.min()
    )  # Most of the draft is its head: prompts before that column do without it.
    kept = batch.ids_BT.shape[1] - first
    placed = {"position_ids": batch.position_BT} if batch.mask.ndim == 4 else {}
    out: Tensor = module(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask,
        use_cache=False,
        logits_to_keep=kept,
        **placed,
    ).logits
    return out[batch.sequence_P, batch.column_P - first].float()


def layer_logits(module: nn.Module, batch: TrainingBatch) -> list[Tensor]:
    """The same from every layer, the last one first: all by the draft's own norm and head (S2D, arXiv 2407.01955).

    Raises:
        ValueError: the model does not have its layers, its norm and its head where Llama has them.
    """
    body: Any = getattr(module, "model", None)
    if not isinstance(getattr(body, "norm", None), nn.Module):
        raise ValueError("recipe: exit_weight is for drafts that are built as Llama is")
    placed = {"position_ids": batch.position_BT} if batch.mask.ndim == 4 else {}
    states = body(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask,
        use_cache=False,
        output_hidden_states=True,
        **placed,
    ).hidden_states
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    *early, last = (state[batch.sequence_P, batch.column_P] for state in states[1:])
    return [
        head(state_PE).float() for state_PE in (last, *(body.norm(state_PE) for state_PE in early))
    ]


def accepts_positions(module: nn.Module) -> bool:
    """Whether the model can be told where a token stands; those that count by themselves get no branches."""
    return "position_ids" in inspect.signature(module.forward).parameters


def position_losses(
    logits_PV: Tensor, batch: TrainingBatch, measure: Divergence, follow_temperature: bool
) -> Tensor:
    """The divergence at every supervised position [P]."""
    target = batch.target
    if follow_temperature:
        temperature_P = batch.temperature_B.clamp(min=COLDEST)[batch.sequence_P]
        target, logits_PV = target.at(temperature_P), logits_PV / temperature_P[:, None]
    return measure(target.classes_PC, draft_classes(logits_PV, target.ids_PK))


def distill(
    module: nn.Module,
    passes: Sequence[Sequence[Signal]],
    recipe: Recipe,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
    earlier_draft: nn.Module | None = None,
) -> Distilled:
    """Trains `module` (float32) in place. `on_step` is called at every step and may raise to end it.

    `passes` are what the first, the second, … epoch learns from; epochs beyond them begin with the first again.
    `earlier_draft` is the draft whose knowledge is rehearsed; by default what `module` is now.
    """
    started = time.monotonic()
    more = (recipe.branch_tokens, recipe.masks) if accepts_positions(module) else (0, 0)
    made = {
        id(signal): Example.of(signal, *more, pad_id) for signals in passes for signal in signals
    }
    examples = [[made[id(signal)] for signal in signals] for signals in passes]
    reference = None
    if recipe.selected_share < 1:
        reference = copy.deepcopy(module)
        _train(reference, examples, recipe, pad_id, on_step)
    rehearsal = (
        Rehearsal(earlier_draft or copy.deepcopy(module), examples[0], recipe.seed)
        if recipe.rehearsal
        else None
    )
    told, positions = _train(module, examples, recipe, pad_id, on_step, reference, rehearsal)
    edge = max(1, len(told) // 10)
    first, last = float(np.mean(told[:edge])), float(np.mean(told[-edge:]))
    return Distilled(len(told), positions, first, last, time.monotonic() - started)


def _train(
    module: nn.Module,
    passes: Sequence[Sequence[Example]],
    recipe: Recipe,
    pad_id: int,
    on_step: Callable[[], None],
    reference: nn.Module | None = None,
    rehearsal: Rehearsal | None = None,
) -> tuple[list[float], int]:
    """The loss of every step, and how many positions were learnt from, passes counted."""
    device = next(module.parameters()).device
    measure = divergence(recipe.divergence, recipe.beta)
    total = step_count(passes, recipe)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, recipe.warmup_steps, total)
    )
    told: list[float] = []
    positions = 0
    module.train()
    for group in epoch_batches(passes, recipe):
        on_step()
        optimizer.zero_grad()
        told.append(0.0)
        whole = sum(len(example.column_P) for example in group)
        for part in split_by_memory(group, module.config.vocab_size, recipe.batch_signals):  # type: ignore[union-attr, arg-type]
            batch = collate(part, pad_id, device)
            loss_P = _loss(module, batch, measure, recipe)
            weight_P = torch.tensor([1.0, recipe.branch_weight, recipe.mask_weight], device=device)[
                batch.kind_P
            ]
            if reference is not None:
                weight_P = weight_P * _selected(loss_P, batch, measure, recipe, reference)
            loss = (loss_P * weight_P).sum() / weight_P.sum() * (len(loss_P) / whole)
            loss.backward()  # type: ignore[no-untyped-call]
            told[-1] += loss.item()
            positions += int((weight_P > 0).sum())
        if rehearsal is not None:
            (recipe.rehearsal * rehearsal.loss(module)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
    module.eval()
    return told, positions


def _loss(module: nn.Module, batch: TrainingBatch, measure: Divergence, recipe: Recipe) -> Tensor:
    if not recipe.exit_weight:
        return position_losses(
            draft_logits(module, batch), batch, measure, recipe.follow_temperature
        )
    last, *early = (
        position_losses(said, batch, measure, recipe.follow_temperature)
        for said in layer_logits(module, batch)
    )
    return (last + recipe.exit_weight * sum(early)) / (1 + recipe.exit_weight * len(early))


def epoch_batches(passes: Sequence[Sequence[Example]], recipe: Recipe) -> Iterator[list[Example]]:
    """Every batch of every epoch."""
    rng = np.random.default_rng(recipe.seed)
    for examples in islice(cycle(passes), recipe.epochs):
        yield from batches(examples, recipe.batch_signals, rng)


def step_count(passes: Sequence[Sequence[object]], recipe: Recipe) -> int:
    """How many batches that are."""
    return sum(
        math.ceil(len(examples) / recipe.batch_signals)
        for examples in islice(cycle(passes), recipe.epochs)
    )


@torch.no_grad()
def _selected(
    loss_P: Tensor, batch: TrainingBatch, measure: Divergence, recipe: Recipe, reference: nn.Module
) -> Tensor:
    """1 for the share of positions where the draft lags most behind a reference that has learnt already (AdaSPEC).

    arXiv 2510.19779: what the reference could not learn either would only use up a small draft's capacity.
    """
    learnt_P = position_losses(
        draft_logits(reference, batch), batch, measure, recipe.follow_temperature
    )
    gain_P = loss_P.detach() - learnt_P
    kept = max(1, round(recipe.selected_share * len(gain_P)))
    return (gain_P >= gain_P.topk(kept).values[-1]).to(gain_P.dtype)


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
