"""What a step saw, for signals and log-probabilities: computed on the device, read by whoever needs it later.

Legend: B rows, G drafted positions, T = G + 1 verified positions, K = top-k, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.device import Download
from decoder.drafters.chain import Proposal
from decoder.verify import Verdict
from online.messages import TokenLogprob

Array = NDArray[np.float32]


class Observation:
    """One step's view of all its rows. The numbers travel to the host while the engine goes on."""

    def __init__(self, download: Download, record_k: int) -> None:
        self._download, self.record_k = download, record_k

    @cached_property
    def seen(self) -> "Seen":
        return Seen(*self._download.arrays())

    def token_logprob(self, row: int, position: int, token_id: int, top: int) -> TokenLogprob:
        seen = self.seen
        ids, logp = seen.top_ids_BTK[row, position, :top], seen.top_logp_BTK[row, position, :top]
        pairs = tuple((int(i), _finite(p)) for i, p in zip(ids, logp, strict=True))
        return TokenLogprob(token_id, _finite(seen.emitted_logp_BT[row, position]), pairs)


@dataclass(frozen=True, slots=True)
class Seen:
    """All log-probabilities are the models' own: at temperature 1, before top-k and top-p."""

    top_ids_BTK: NDArray[np.int32]
    top_logp_BTK: Array
    rest_mass_BT: Array
    emitted_logp_BT: Array  # the target's, of the token that was emitted there
    draft_ids_BG: NDArray[np.int64]
    draft_logp_BG: Array
    draft_top_logp_BGK: Array


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One row's part of an observation: D drafted tokens, D + 1 verified positions, K = top-k."""

    observation: Observation
    row: int
    start: int  # index into the output of the first token that the step could emit
    drafted: int
    accepted: int
    version: int

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """draft_ids, draft_logp [D]; top_ids, top_logp [D + 1, K]; rest_mass [D + 1]; draft_top_logp [D, K]."""
        seen, k = self.observation.seen, self.observation.record_k
        b, drafted, verified = self.row, slice(self.drafted), slice(self.drafted + 1)
        return {
            "draft_ids": seen.draft_ids_BG[b, drafted],
            "draft_logp": seen.draft_logp_BG[b, drafted],
            "top_ids": seen.top_ids_BTK[b, verified, :k],
            "top_logp": seen.top_logp_BTK[b, verified, :k],
            "rest_mass": seen.rest_mass_BT[b, verified],
            "draft_top_logp": seen.draft_top_logp_BGK[b, drafted, :k],
        }


def _finite(logp: np.float32) -> float:
    """JSON has no infinity: tokens that a model masks out get the floor that vLLM gives them."""
    return max(float(logp), -9999.0)


def observe(logits_BTV: Tensor, proposal: Proposal, verdict: Verdict, record_k: int, report_k: int) -> Observation:
    """`record_k` positions go into signals and define the rest; `report_k` is what a client asked for at most."""
    logits_BTV = logits_BTV.float()
    whole_BT1 = logits_BTV.logsumexp(-1, keepdim=True)
    vocabulary, gamma = logits_BTV.shape[-1], proposal.tokens_BG.shape[1]
    top_logits_BTK, top_ids_BTK = logits_BTV.topk(min(max(record_k, report_k), vocabulary), -1)
    top_logp_BTK = top_logits_BTK - whole_BT1
    rest_mass_BT = (1 - top_logp_BTK[..., :record_k].exp().sum(-1)).clamp_(min=0)
    # The emitted tokens in place: accepted drafts, then the target's own.
    emitted_BT = torch.nn.functional.pad(proposal.tokens_BG, (0, 1))
    emitted_BT = emitted_BT.scatter(1, verdict.accepted_B[:, None], verdict.next_B[:, None])
    emitted_logp_BT = (logits_BTV.gather(-1, emitted_BT[..., None]) - whole_BT1).squeeze(-1)
    draft_BGV = proposal.logits_BGV.float()
    draft_whole_BG1 = draft_BGV.logsumexp(-1, keepdim=True)
    draft_logp_BG = (draft_BGV.gather(-1, proposal.tokens_BG[..., None]) - draft_whole_BG1).squeeze(-1)
    draft_top_logp_BGK = draft_BGV.gather(-1, top_ids_BTK[:, :gamma]) - draft_whole_BG1
    arrays = (top_ids_BTK.int(), top_logp_BTK, rest_mass_BT, emitted_logp_BT)
    return Observation(Download([*arrays, proposal.tokens_BG, draft_logp_BG, draft_top_logp_BGK]), record_k)
