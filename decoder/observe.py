"""What a step saw, for signals and log-probabilities: computed on the device, moved to the host once.

Legend: B rows, G drafted positions, T = G + 1 verified positions, K = top-k, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.drafters.chain import Proposal
from decoder.recorder import StepTrace
from decoder.verify import Verdict
from online.messages import TokenLogprob

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Observation:
    """All log-probabilities are the models' own: at temperature 1, before top-k and top-p."""

    top_ids_BTK: NDArray[np.int64]
    top_logp_BTK: Array
    rest_mass_BT: Array
    emitted_logp_BT: Array  # the target's, of the token that was emitted there
    draft_ids_BG: NDArray[np.int64]
    draft_logp_BG: Array
    draft_top_logp_BGK: Array

    def trace(self, row: int, start: int, drafted: int, accepted: int, version: int, top_k: int) -> StepTrace:
        return StepTrace(
            start=start,
            accepted=accepted,
            version=version,
            draft_ids=self.draft_ids_BG[row, :drafted],
            draft_logp=self.draft_logp_BG[row, :drafted],
            top_ids=self.top_ids_BTK[row, : drafted + 1, :top_k],
            top_logp=self.top_logp_BTK[row, : drafted + 1, :top_k],
            rest_mass=self.rest_mass_BT[row, : drafted + 1],
            draft_top_logp=self.draft_top_logp_BGK[row, :drafted, :top_k],
        )

    def token_logprob(self, row: int, position: int, token_id: int, top: int) -> TokenLogprob:
        ids, logp = self.top_ids_BTK[row, position, :top], self.top_logp_BTK[row, position, :top]
        pairs = tuple((int(i), _finite(p)) for i, p in zip(ids, logp, strict=True))
        return TokenLogprob(token_id, _finite(self.emitted_logp_BT[row, position]), pairs)


def _finite(logp: np.float32) -> float:
    """JSON has no infinity: tokens that a model masks out get the floor that vLLM gives them."""
    return max(float(logp), -9999.0)


def observe(logits_BTV: Tensor, proposal: Proposal, verdict: Verdict, record_k: int, report_k: int) -> Observation:
    """`record_k` positions go into signals and define the rest; `report_k` is what a client asked for at most."""
    target_logp_BTV = logits_BTV.float().log_softmax(-1)
    draft_logp_BGV = proposal.logits_BGV.float().log_softmax(-1)
    vocabulary = logits_BTV.shape[-1]
    top_logp_BTK, top_ids_BTK = target_logp_BTV.topk(min(max(record_k, report_k), vocabulary), -1)
    rest_mass_BT = (1 - top_logp_BTK[..., :record_k].exp().sum(-1)).clamp(min=0)
    gamma = proposal.tokens_BG.shape[1]
    # The emitted tokens in place: accepted drafts, then the target's own.
    emitted_BT = torch.nn.functional.pad(proposal.tokens_BG, (0, 1))
    emitted_BT = emitted_BT.scatter(1, verdict.accepted_B[:, None], verdict.next_B[:, None])
    return Observation(
        top_ids_BTK.cpu().numpy(),
        top_logp_BTK.cpu().numpy(),
        rest_mass_BT.cpu().numpy(),
        target_logp_BTV.gather(-1, emitted_BT[..., None]).squeeze(-1).cpu().numpy(),
        proposal.tokens_BG.cpu().numpy(),
        draft_logp_BGV.gather(-1, proposal.tokens_BG[..., None]).squeeze(-1).cpu().numpy(),
        draft_logp_BGV.gather(-1, top_ids_BTK[:, :gamma]).cpu().numpy(),
    )
