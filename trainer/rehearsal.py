"""Rehearsal: what a draft could do before, so that learning one kind of traffic does not unlearn the others.

A draft knows more than its route's signals show: what it was pretrained on comes back when the traffic shifts. Nothing
of that is at hand, but the draft of that time is: it writes samples of its own, and a later one that learns is held to
its distribution on them (pseudo-rehearsal, Robins 1995). No data is kept for it, and no target asked.

Legend: R sequences, T tokens, B sequences of a step, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trainer.batches import Example

SEQUENCES, TOKENS = 64, 96  # written before the first step
PER_STEP = 2  # of them, rehearsed beside every batch of lessons


class Rehearsal:
    """A former draft, which stays as it is, and what it writes. `loss` is how far a later one has moved from it."""

    def __init__(self, earlier_draft: nn.Module, examples: Sequence[Example], seed: int) -> None:
        self._former = earlier_draft.eval().requires_grad_(False)
        self._rng = np.random.default_rng(seed)
        # As prompts begin, so that the draft goes on as in the traffic that it knows.
        starts = [int(example.ids_T[0]) for example in examples]
        first_R1 = torch.tensor(
            self._rng.choice(starts, SEQUENCES), device=next(earlier_draft.parameters()).device
        )[:, None]
        self._ids_RT = write(self._former, first_R1, TOKENS, seed)

    def loss(self, module: nn.Module) -> Tensor:
        """KL(former‖now), mean over the positions of a few sequences."""
        ids_BT = self._ids_RT[self._rng.integers(0, len(self._ids_RT), PER_STEP)]
        with torch.no_grad():
            former_logp_BTV = (
                self._former(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
            )
        now_logp_BTV = module(input_ids=ids_BT, use_cache=False).logits.float().log_softmax(-1)
        moved: Tensor = (former_logp_BTV.exp() * (former_logp_BTV - now_logp_BTV)).sum(-1).mean()
        return moved


@torch.no_grad()
def write(module: nn.Module, first_R1: Tensor, tokens: int, seed: int) -> Tensor:
    """Sequences that the draft samples at temperature 1 from their first tokens on [R, T]."""
    generator = torch.Generator(first_R1.device).manual_seed(seed)
    ids_RT = fed = first_R1
    cache = None
    for _ in range(tokens - 1):
        out = module(input_ids=fed, cache=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        fed = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        ids_RT = torch.cat([ids_RT, fed], 1)
    return ids_RT
