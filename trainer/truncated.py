"""The target's distribution as signals log it: its K most likely tokens, and the mass of the rest.

`classes_PC` turns it into K + 1 classes: the K tokens, and all other tokens
as one class. `draft_classes` does the same for a draft. Divergences compare
these classes. With K = V nothing is lost. With fewer, every divergence but
TVD++ is a lower bound of the one over the whole vocabulary (data-processing
inequality). Its gradient leaves the mass of the rest where it belongs;
renormalising the top K would push that mass to zero.

Pure functions. Legend: P supervised positions · K top-k · C = K + 1 classes
· V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Truncated:
    """A distribution with K known tokens, and the mass of all others together."""

    ids_PK: Tensor
    logp_PK: Tensor
    rest_P: Tensor

    @property
    def classes_PC(self) -> Tensor:
        return torch.cat([self.logp_PK.exp(), self.rest_P[:, None]], -1)

    def at(self, temperature_P: Tensor) -> "Truncated":
        """The distribution at another temperature: p^(1/T), normalised. Exact at T = 1.

        How the rest is spread is unknown. This assumes tokens as likely as
        the last known one: an upper bound of the new mass of the rest at T
        < 1, a lower bound at T > 1.
        """
        power_P = 1 / temperature_P
        logp_PK = self.logp_PK * power_P[:, None]
        rest_logp_P = self.rest_P.clamp(min=EPSILON).log()
        rest_logp_P = rest_logp_P + self.logp_PK[:, -1] * (power_P - 1)
        norm_P = torch.cat([logp_PK, rest_logp_P[:, None]], -1).logsumexp(-1)
        rest_P = (rest_logp_P - norm_P).exp()
        return Truncated(self.ids_PK, logp_PK - norm_P[:, None], rest_P)


def draft_classes(draft_logits_PV: Tensor, ids_PK: Tensor) -> Tensor:
    """The draft's log-probabilities of the K tokens, and of all others together [P, C]."""
    top_PK = draft_logits_PV.log_softmax(-1).gather(-1, ids_PK)
    rest_P = (1 - top_PK.exp().sum(-1)).clamp(min=EPSILON).log()
    return torch.cat([top_PK, rest_P[:, None]], -1)


def overlap(draft_logits_PV: Tensor, target: Truncated) -> Tensor:
    """Σ min(p, q) over the logged tokens [P]: a lower bound of the acceptance rate at T = 1."""
    draft_p_PK = draft_logits_PV.log_softmax(-1).gather(-1, target.ids_PK).exp()
    return torch.minimum(target.logp_PK.exp(), draft_p_PK).sum(-1)


def greedy_match(draft_logits_PV: Tensor, target: Truncated) -> Tensor:
    """1 where draft and target prefer the same token [P]: the acceptance at temperature 0."""
    matches_P = draft_logits_PV.argmax(-1) == target.ids_PK[:, 0]
    return matches_P.to(draft_logits_PV.dtype)
