"""The generic stage of G2SD (arXiv 2302.14771, section 3.2): features follow the target's.

It runs the target, which takes its weights and as much memory, so it is for
drafts that are made before they serve. The service's trainer has signals
only.

Legend: B sequences · T tokens · E hidden size of the target.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, smooth_l1_loss
from torch.nn.utils.rnn import pad_sequence

from online.signals import Signal
from trainer.batches import epoch_batches
from trainer.distill import CLIP_NORM, make_optimizer
from trainer.examples import Example
from trainer.recipe import Recipe

SMOOTH = 2.0  # the loss is quadratic below this distance, as in the paper's code


def projector(draft: nn.Module, target: nn.Module, seed: int) -> nn.Linear:
    """From the draft's hidden size to the target's; the identity at first if they are equal."""
    own, wanted = draft.config.hidden_size, target.config.hidden_size  # type: ignore[union-attr]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Linear(own, wanted)  # type: ignore[arg-type]
    if own == wanted:
        nn.init.eye_(made.weight)
        nn.init.zeros_(made.bias)
    return made.to(next(draft.parameters()).device)


def features(module: nn.Module, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The inputs of the head [B, T, hidden size]."""
    body: nn.Module = module.base_model  # type: ignore[assignment]
    out = body(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    hidden: Tensor = out.last_hidden_state
    return hidden


def match_features(
    draft: nn.Module,
    target: nn.Module,
    signals: Sequence[Signal],
    recipe: Recipe,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Trains `draft` in place on the signals' whole texts; returns the loss of every step.

    The projector is discarded. Uses the recipe's epochs, batches, learning
    rate and seed only.
    """
    device = next(draft.parameters()).device
    bridge = projector(draft, target, recipe.seed)
    groups = list(epoch_batches([[Example.of(signal) for signal in signals]], recipe))
    parameters = [*draft.parameters(), *bridge.parameters()]
    optimizer, schedule = make_optimizer(parameters, recipe.learning_rate, len(groups))
    losses: list[float] = []
    draft.train()
    for group in groups:
        on_step()
        ids = [torch.from_numpy(example.ids_T) for example in group]
        ids_BT = pad_sequence(ids, batch_first=True, padding_value=pad_id).to(device)
        ones = [torch.ones_like(ids_T) for ids_T in ids]
        mask_BT = pad_sequence(ones, batch_first=True).to(device)
        with torch.no_grad():
            target_BTE = features(target, ids_BT, mask_BT)
            # Normalise: some features are a hundred times larger than others.
            target_BTE = layer_norm(target_BTE, target_BTE.shape[-1:])
        draft_BTE = bridge(features(draft, ids_BT, mask_BT))
        tokens_BT = mask_BT.bool()
        loss = smooth_l1_loss(draft_BTE[tokens_BT], target_BTE[tokens_BT], beta=SMOOTH)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(draft.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    draft.eval()
    return losses
