"""Rehearsal: learning one kind of traffic must not erase the others.

A draft knows more than its route's signals show: its pretraining matters
again when the traffic shifts. That data is not available, but the earlier
draft is. It writes samples of its own, and the new draft is held to its
distribution on them (pseudo-rehearsal, Robins 1995). This needs neither
stored data nor the target.

Legend: R samples · T tokens · B samples of a step · V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trainer.examples import Example

SAMPLES, TOKENS = 64, 96  # written before the first step
PER_STEP = 2  # samples rehearsed beside every batch of examples


class Rehearsal:
    """An earlier draft, which stays unchanged, and its samples."""

    def __init__(self, earlier_draft: nn.Module, examples: Sequence[Example], seed: int) -> None:
        self._earlier = earlier_draft.eval().requires_grad_(False)
        self._rng = np.random.default_rng(seed)
        # Start as prompts start, so that the draft continues as in traffic that it knows.
        starts = [int(example.ids_T[0]) for example in examples]
        first_R = torch.from_numpy(self._rng.choice(starts, SAMPLES))
        device = next(earlier_draft.parameters()).device
        self._ids_RT = write(self._earlier, first_R[:, None].to(device), TOKENS, seed)

    def loss(self, module: nn.Module) -> Tensor:
        """KL(earlier‖module), the mean over the positions of a few samples."""
        ids_BT = self._ids_RT[self._rng.integers(0, len(self._ids_RT), PER_STEP)]
        with torch.no_grad():
            earlier_logp_BTV = _logp(self._earlier, ids_BT)
        kl_BTV = earlier_logp_BTV.exp() * (earlier_logp_BTV - _logp(module, ids_BT))
        return kl_BTV.sum(-1).mean()


def _logp(module: nn.Module, ids_BT: Tensor) -> Tensor:
    logits_BTV: Tensor = module(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV.float().log_softmax(-1)


@torch.no_grad()
def write(module: nn.Module, first_R1: Tensor, tokens: int, seed: int) -> Tensor:
    """Sequences that the draft samples at temperature 1 after their first token [R, T]."""
    generator = torch.Generator(first_R1.device).manual_seed(seed)
    ids_RT = new_R1 = first_R1
    cache = None
    for _ in range(tokens - 1):
        out = module(input_ids=new_R1, cache=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        p_RV = out.logits[:, -1].float().softmax(-1)
        new_R1 = torch.multinomial(p_RV, 1, generator=generator)
        ids_RT = torch.cat([ids_RT, new_R1], 1)
    return ids_RT
