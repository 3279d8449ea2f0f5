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
        assert seen.emitted_logp_BT is not None, "nobody asked for log-probabilities in this step"
        return TokenLogprob(token_id, _finite(seen.emitted_logp_BT[row, position]), pairs)


@dataclass(frozen=True, slots=True)
class Seen:
    """All log-probabilities are the models' own: at temperature 1, before top-k and top-p."""

    top_ids_BTK: NDArray[np.int64]
    top_logp_BTK: Array
    draft_ids_BG: NDArray[np.int64]
    draft_logp_BG: Array
    draft_top_logp_BGK: Array
    emitted_logp_BT: Array | None = None  # the target's, of the token that was emitted there


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
        top_logp = seen.top_logp_BTK[b, verified, :k]
        return {
            "draft_ids": seen.draft_ids_BG[b, drafted],
            "draft_logp": seen.draft_logp_BG[b, drafted],
            "top_ids": seen.top_ids_BTK[b, verified, :k],
            "top_logp": top_logp,
            "rest_mass": (1 - np.exp(top_logp).sum(-1)).clip(min=0),
            "draft_top_logp": seen.draft_top_logp_BGK[b, drafted, :k],
        }


def _finite(logp: np.float32) -> float:
    """JSON has no infinity: tokens that a model masks out get the floor that vLLM gives them."""
    return max(float(logp), -9999.0)


def observe(
    logits_BTV: Tensor, proposal: Proposal, verdict: Verdict, record_k: int, report_k: int | None
) -> Observation:
    """`record_k` tokens a position go into signals; `report_k` is the most a client asked for, None if nobody did."""
    target_logp_BTV = logits_BTV.log_softmax(-1, dtype=torch.float32)
    draft_logp_BGV = proposal.logits_BGV.log_softmax(-1, dtype=torch.float32)
    gamma = proposal.tokens_BG.shape[1]
    top_logp_BTK, top_ids_BTK = target_logp_BTV.topk(min(max(record_k, report_k or 0), logits_BTV.shape[-1]), -1)
    arrays = [
        top_ids_BTK,
        top_logp_BTK,
        proposal.tokens_BG,
        draft_logp_BGV.gather(-1, proposal.tokens_BG[..., None]).squeeze(-1),
        draft_logp_BGV.gather(-1, top_ids_BTK[:, :gamma]),
    ]
    if report_k is not None:
        # The emitted tokens in place: accepted drafts, then the target's own.
        emitted_BT = torch.nn.functional.pad(proposal.tokens_BG, (0, 1))
        emitted_BT = emitted_BT.scatter_(1, verdict.accepted_B[:, None], verdict.next_B[:, None])
        arrays.append(target_logp_BTV.gather(-1, emitted_BT[..., None]).squeeze(-1))
    return Observation(Download(arrays), record_k)
