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
from trainer.batches import Lesson, TrainingBatch, batches, collate, fitting
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
    """The draft's logits at the supervised positions [N, V]."""
    first = int(
        batch.column_N.min()
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
    return out[batch.row_N, batch.column_N - first].float()


def exit_logits(module: nn.Module, batch: TrainingBatch) -> list[Tensor]:
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
    *early, last = (state[batch.row_N, batch.column_N] for state in states[1:])
    return [
        head(state_NE).float() for state_NE in (last, *(body.norm(state_NE) for state_NE in early))
    ]


def takes_branches(module: nn.Module) -> bool:
    """Whether the model can be told where a token stands; those that count by themselves get no branches."""
    return "position_ids" in inspect.signature(module.forward).parameters


def losses(
    logits_NV: Tensor, batch: TrainingBatch, measure: Divergence, follow_temperature: bool
) -> Tensor:
    """The divergence at every supervised position [N]."""
    truth = batch.truth
    if follow_temperature:
        temperature_N = batch.temperature_B.clamp(min=COLDEST)[batch.row_N]
        truth, logits_NV = truth.at(temperature_N), logits_NV / temperature_N[:, None]
    return measure(truth.classes_NC, draft_classes(logits_NV, truth.ids_NK))


def distill(
    module: nn.Module,
    passes: Sequence[Sequence[Signal]],
    recipe: Recipe,
    pad_id: int,
    still_wanted: Callable[[], None] = lambda: None,
    former: nn.Module | None = None,
) -> Distilled:
    """Trains `module` (float32) in place. `still_wanted` is called at every step and may raise to end it.

    `passes` are what the first, the second, … epoch learns from; epochs beyond them begin with the first again.
    `former` is the draft whose knowledge is rehearsed; by default what `module` is now.
    """
    started = time.monotonic()
    more = (recipe.branch_tokens, recipe.masks) if takes_branches(module) else (0, 0)
    made = {
        id(signal): Lesson.of(signal, *more, pad_id) for signals in passes for signal in signals
    }
    lessons = [[made[id(signal)] for signal in signals] for signals in passes]
    reference = None
    if recipe.selected_share < 1:
        reference = copy.deepcopy(module)
        _train(reference, lessons, recipe, pad_id, still_wanted)
    rehearsal = (
        Rehearsal(former or copy.deepcopy(module), lessons[0], recipe.seed)
        if recipe.rehearsal
        else None
    )
    told, positions = _train(module, lessons, recipe, pad_id, still_wanted, reference, rehearsal)
    edge = max(1, len(told) // 10)
    first, last = float(np.mean(told[:edge])), float(np.mean(told[-edge:]))
    return Distilled(len(told), positions, first, last, time.monotonic() - started)


def _train(
    module: nn.Module,
    passes: Sequence[Sequence[Lesson]],
    recipe: Recipe,
    pad_id: int,
    still_wanted: Callable[[], None],
    reference: nn.Module | None = None,
    rehearsal: Rehearsal | None = None,
) -> tuple[list[float], int]:
    """The loss of every step, and how many positions were learnt from, passes counted."""
    device = next(module.parameters()).device
    measure = divergence(recipe.divergence, recipe.beta)
    total = steps(passes, recipe)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(step, recipe.warmup_steps, total)
    )
    told: list[float] = []
    positions = 0
    module.train()
    for group in epochs(passes, recipe):
        still_wanted()
        optimizer.zero_grad()
        told.append(0.0)
        whole = sum(len(lesson.column_N) for lesson in group)
        for part in fitting(group, module.config.vocab_size, recipe.batch_signals):  # type: ignore[union-attr, arg-type]
            batch = collate(part, pad_id, device)
            loss_N = _loss(module, batch, measure, recipe)
            weight_N = torch.tensor([1.0, recipe.branch_weight, recipe.mask_weight], device=device)[
                batch.kind_N
            ]
            if reference is not None:
                weight_N = weight_N * _selected(loss_N, batch, measure, recipe, reference)
            loss = (loss_N * weight_N).sum() / weight_N.sum() * (len(loss_N) / whole)
            loss.backward()  # type: ignore[no-untyped-call]
            told[-1] += loss.item()
            positions += int((weight_N > 0).sum())
        if rehearsal is not None:
            (recipe.rehearsal * rehearsal.loss(module)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
    module.eval()
    return told, positions


def _loss(module: nn.Module, batch: TrainingBatch, measure: Divergence, recipe: Recipe) -> Tensor:
    if not recipe.exit_weight:
        return losses(draft_logits(module, batch), batch, measure, recipe.follow_temperature)
    last, *early = (
        losses(said, batch, measure, recipe.follow_temperature)
        for said in exit_logits(module, batch)
    )
    return (last + recipe.exit_weight * sum(early)) / (1 + recipe.exit_weight * len(early))


def epochs(passes: Sequence[Sequence[Lesson]], recipe: Recipe) -> Iterator[list[Lesson]]:
    """Every batch of every epoch."""
    rng = np.random.default_rng(recipe.seed)
    for lessons in islice(cycle(passes), recipe.epochs):
        yield from batches(lessons, recipe.batch_signals, rng)


def steps(passes: Sequence[Sequence[object]], recipe: Recipe) -> int:
    """How many batches that are."""
    return sum(
        math.ceil(len(lessons) / recipe.batch_signals)
        for lessons in islice(cycle(passes), recipe.epochs)
    )


@torch.no_grad()
def _selected(
    loss_N: Tensor, batch: TrainingBatch, measure: Divergence, recipe: Recipe, reference: nn.Module
) -> Tensor:
    """1 for the share of positions where the draft lags most behind a reference that has learnt already (AdaSPEC).

    arXiv 2510.19779: what the reference could not learn either would only use up a small draft's capacity.
    """
    learnt_N = losses(draft_logits(reference, batch), batch, measure, recipe.follow_temperature)
    gain_N = loss_N.detach() - learnt_N
    kept = max(1, round(recipe.selected_share * len(gain_N)))
    return (gain_N >= gain_N.topk(kept).values[-1]).to(gain_N.dtype)


def factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
