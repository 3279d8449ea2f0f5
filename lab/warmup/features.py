"""The generic stage of G2SD (arXiv 2302.14771, section 3.2): a draft's features follow the target's, on any text.

The target is run here, which takes its weights and as much memory: this is for drafts that are made before they serve.
The service's own trainer has signals, and no target.

Legend: B sequences, T tokens, H the target's width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss

from online.signals import Signal
from trainer.batches import epoch_batches
from trainer.distill import CLIP_NORM, make_optimizer
from trainer.examples import Example
from trainer.recipe import Recipe

SMOOTH = 2.0  # below this distance the loss is square, as in the paper's own code


def projector(draft: nn.Module, target: nn.Module, seed: int) -> nn.Linear:
    """From the draft's width to the target's. Of equal widths it begins as the identity: they may be one space."""
    own, wanted = draft.config.hidden_size, target.config.hidden_size  # type: ignore[union-attr]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Linear(own, wanted)  # type: ignore[arg-type]
    if own == wanted:
        nn.init.eye_(made.weight)
        nn.init.zeros_(made.bias)
    return made.to(next(draft.parameters()).device)


def features(module: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """What the head reads [B, T, width]."""
    body: nn.Module = module.base_model  # type: ignore[assignment]
    hidden: Tensor = body(
        input_ids=ids_BT, attention_mask=mask_BT, use_cache=False
    ).last_hidden_state
    return hidden


def match_features(
    draft: nn.Module,
    target: nn.Module,
    signals: Sequence[Signal],
    recipe: Recipe,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Trains `draft` in place on the signals' whole texts, and returns the loss of every step.

    The projector is thrown away at the end. Of the recipe count epochs, batches, learning rate and seed.
    """
    device = next(draft.parameters()).device
    bridge = projector(draft, target, recipe.seed)
    groups = list(epoch_batches([[Example.of(signal) for signal in signals]], recipe))
    parameters = [*draft.parameters(), *bridge.parameters()]
    optimizer, schedule = make_optimizer(parameters, recipe.learning_rate, len(groups))
    told: list[float] = []
    draft.train()
    for group in groups:
        on_step()
        ids_BT, mask_BT = _padded(group, pad_id, device)
        with torch.no_grad():
            target_BTH = features(target, ids_BT, mask_BT)
            # Its scale is the target's own affair: some features are a hundred times larger than others.
            wanted_BTH = layer_norm(target_BTH, target_BTH.shape[-1:])
        found_BTH = bridge(features(draft, ids_BT, mask_BT))
        seen_BT = mask_BT.bool()
        loss = smooth_l1_loss(found_BTH[seen_BT], wanted_BTH[seen_BT], beta=SMOOTH)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(draft.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        told.append(loss.item())
    draft.eval()
    return told


def _padded(group: Sequence[Example], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [torch.from_numpy(example.ids_T) for example in group]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return ids_BT.to(device), nn.utils.rnn.pad_sequence(mask, batch_first=True).to(device)
