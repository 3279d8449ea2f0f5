"""What a step saw, for signals and log-probabilities: computed on the device, read by whoever needs it later.

Legend: B sequences, G drafted positions, T = G + 1 verified positions, K = top-k, V vocabulary, S steps, D tokens that they
draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.device.transfer import Download
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import compiled
from decoder.verification.verify import Verification
from online.messages import TokenLogprob

Array = NDArray[np.float32]


class Observation:
    """One step's view of all its sequences. The numbers travel to the host while the engine goes on."""

    def __init__(self, download: Download, record_k: int) -> None:
        self._download, self.record_k = download, record_k

    @cached_property
    def seen(self) -> "Seen":
        return Seen(*self._download.arrays())

    def token_logprob(self, seq: int, position: int, token_id: int, top: int) -> TokenLogprob:
        seen = self.seen
        ids, logp = seen.top_ids_BTK[seq, position, :top], seen.top_logp_BTK[seq, position, :top]
        pairs = tuple((int(i), _finite(p)) for i, p in zip(ids, logp, strict=True))
        assert seen.emitted_logp_BT is not None, "nobody asked for log-probabilities in this step"
        return TokenLogprob(token_id, _finite(seen.emitted_logp_BT[seq, position]), pairs)


@dataclass(frozen=True, slots=True)
class Seen:
    """All log-probabilities are the models' own: at temperature 1, before top-k and top-p."""

    top_ids_BTK: NDArray[np.int64]
    top_logp_BTK: Array
    draft_ids_BG: NDArray[np.int64]
    draft_logp_BG: Array
    draft_top_logp_BGK: Array
    drafted_B: NDArray[np.int64]
    emitted_logp_BT: Array | None = None  # the target's, of the token that was emitted there


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One sequence's part of an observation."""

    observation: Observation
    seq: int
    start: int  # index into the output of the first token that the step could emit
    accepted: int
    version: int

    @property
    def drafted(self) -> int:
        """Of a chain its tokens; of a tree those that were walked to, and behind them each node's first candidate."""
        return int(self.observation.seen.drafted_B[self.seq])


def join(steps: Sequence[StepTrace]) -> dict[str, NDArray[Any]]:
    """All of one sequence's steps: draft_ids, draft_logp [D]; top_ids, top_logp [D + S, K]; draft_top_logp [D, K]."""
    parts = []
    for step in steps:
        seen, k, b, drafted = (
            step.observation.seen,
            step.observation.record_k,
            step.seq,
            step.drafted,
        )
        parts.append(
            (
                seen.draft_ids_BG[b, :drafted],
                seen.draft_logp_BG[b, :drafted],
                seen.top_ids_BTK[b, : drafted + 1, :k],
                seen.top_logp_BTK[b, : drafted + 1, :k],
                seen.draft_top_logp_BGK[b, :drafted, :k],
            )
        )
    names = ("draft_ids", "draft_logp", "top_ids", "top_logp", "draft_top_logp")
    return {
        name: np.concatenate(arrays)
        for name, arrays in zip(names, zip(*parts, strict=True), strict=True)
    }


def _finite(logp: np.float32) -> float:
    """JSON has no infinity: tokens that a model masks out get the floor that vLLM gives them."""
    return max(float(logp), -9999.0)


def observe(
    logits_BTV: Tensor,
    proposal: Proposal,
    verdict: Verification,
    record_k: int,
    report_k: int | None,
) -> Observation:
    """`record_k` tokens a position go into signals; `report_k` is the most a client asked for, None if nobody did."""
    k = min(max(record_k, report_k or 0), logits_BTV.shape[-1])
    proposal, logits_BTV = proposal.as_chain(verdict.accepted_B, verdict.path_BN, logits_BTV)
    looked_at = logits_BTV, proposal.logits_BQV, proposal.tokens_BN, proposal.drafted_B, k
    fused = compiled(logits_BTV)
    ids, logp, norm_BT, *of_draft = look(*looked_at) if fused is None else fused.observe(*looked_at)
    arrays = [ids, logp, proposal.tokens_BN, *of_draft, proposal.drafted_B]
    if report_k is not None:
        # The emitted tokens in place: accepted drafts, then the target's own.
        emitted_BT = torch.nn.functional.pad(proposal.tokens_BN, (0, 1))
        emitted_BT = emitted_BT.scatter_(1, verdict.accepted_B[:, None], verdict.next_B[:, None])
        arrays.append(logits_BTV.gather(-1, emitted_BT[..., None]).squeeze(-1) - norm_BT)
    return Observation(Download(arrays), record_k)


def look(
    logits_BTV: Tensor,
    draft_logits_B1V: list[Tensor],
    draft_tokens_BG: Tensor,
    drafted_B: Tensor,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """top_ids_BTK, top_logp_BTK, norm_BT (log Σ e^logits), draft_logp_BG, draft_top_logp_BGK."""
    draft_logits_BGV = torch.cat(draft_logits_B1V, 1) if draft_logits_B1V else logits_BTV[:, :0]
    norm_BT, draft_norm_BG = logits_BTV.logsumexp(-1), draft_logits_BGV.logsumexp(-1)
    top_BTK, top_ids_BTK = logits_BTV.topk(k, -1)
    draft_BG = draft_logits_BGV.gather(-1, draft_tokens_BG[..., None]).squeeze(-1)
    draft_top_BGK = draft_logits_BGV.gather(-1, top_ids_BTK[:, :-1])
    return (
        top_ids_BTK,
        top_BTK - norm_BT[..., None],
        norm_BT,
        draft_BG - draft_norm_BG,
        draft_top_BGK - draft_norm_BG[..., None],
    )
