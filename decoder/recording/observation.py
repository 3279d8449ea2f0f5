"""What signals and clients' log-probabilities need of a step, computed on the device.

Legend: B sequences, N candidates, G tokens of a chain, T = G + 1 verified positions, K = top-k,
V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.device.transfer import Download
from decoder.verification.accepted_chain import accepted_chain
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import runs_fused
from online.messages import TokenLogprob

LOWEST_LOGP = -9999.0  # JSON has no infinity; vLLM reports impossible tokens by this, too
Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """How much of a step signals hold."""

    top_k: int  # the target's most likely tokens of a position
    branch_tokens: int  # tokens of every rejected branch


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step of all its sequences, on the host.

    Of a tree, the chain is the accepted path, continued by each node's first candidate.
    Log-probabilities are the target's own: at temperature 1, before top-k and top-p.
    """

    top_ids_BTK: NDArray[np.int64]
    top_logp_BTK: Array
    chain_ids_BG: NDArray[np.int64]
    length_B: NDArray[np.int64]  # of the chain
    emitted_logp_BT: Array | None = None  # of the token emitted there; None: no client asked

    def positions(self, seq: int, count: int, k: int) -> dict[str, NDArray[np.generic]]:
        """The sequence's first `count` positions, by the names that signals have for them."""
        return {
            "top_ids": self.top_ids_BTK[seq, :count, :k],
            "top_logp": self.top_logp_BTK[seq, :count, :k],
        }


class Observation:
    """One step of all its sequences, on its way to the host while the engine goes on."""

    def __init__(self, tensors: Mapping[str, Tensor], limits: RecordLimits) -> None:
        """`tensors` by the names that `StepArrays` has for them."""
        self._names = list(tensors)
        self._download = Download(list(tensors.values()))
        self.limits = limits

    @cached_property
    def arrays(self) -> StepArrays:
        """Waits for the download."""
        return StepArrays(**dict(zip(self._names, self._download.arrays(), strict=True)))

    def token_logprob(self, seq: int, position: int, token_id: int, top: int) -> TokenLogprob:
        """An emitted token and the `top` most likely tokens at its position."""
        arrays = self.arrays
        assert arrays.emitted_logp_BT is not None, "no client asked for log-probabilities"
        ids = arrays.top_ids_BTK[seq, position, :top]
        logp = arrays.top_logp_BTK[seq, position, :top]
        pairs = tuple((int(i), _finite(p)) for i, p in zip(ids, logp, strict=True))
        return TokenLogprob(token_id, _finite(arrays.emitted_logp_BT[seq, position]), pairs)


def _finite(logp: np.float32) -> float:
    return max(float(logp), LOWEST_LOGP)


def observe(
    logits_BTV: Tensor,
    proposal: Proposal,
    verification: Verification,
    limits: RecordLimits,
    report_k: int | None,
) -> Observation:
    """`report_k`: the most tokens that a client wants reported; None if no client asks."""
    accepted_B = verification.accepted_B
    tokens_BG, length_B, logits_BTV = accepted_chain(proposal, verification, logits_BTV)
    branch_B = (length_B - accepted_B).clamp(max=limits.branch_tokens)
    k = min(max(limits.top_k, report_k or 0), logits_BTV.shape[-1])
    top = top_tokens(logits_BTV, accepted_B + 1 + branch_B, k)
    tensors = {
        "top_ids_BTK": top.ids_BTK,
        "top_logp_BTK": top.logp_BTK,
        "chain_ids_BG": tokens_BG,
        "length_B": length_B,
    }
    if report_k is not None:
        # Emitted tokens in place: the accepted ones, then the target's own.
        emitted_BT = torch.nn.functional.pad(tokens_BG, (0, 1))
        emitted_BT = emitted_BT.scatter_(1, accepted_B[:, None], verification.next_B[:, None])
        emitted_logits_BT = logits_BTV.gather(-1, emitted_BT[..., None]).squeeze(-1)
        tensors["emitted_logp_BT"] = emitted_logits_BT - top.norm_BT
    return Observation(tensors, limits)


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The most likely tokens of every position, and log Σ e^logits."""

    ids_BTK: Tensor
    logp_BTK: Tensor
    norm_BT: Tensor


def top_tokens(logits_BTV: Tensor, count_B: Tensor, k: int) -> TopTokens:
    """Of each sequence's first `count_B` positions; what lies behind them is undefined."""
    if runs_fused(logits_BTV):
        from decoder.verification import fused

        return TopTokens(*fused.top_tokens(logits_BTV, count_B, k))
    norm_BT = logits_BTV.logsumexp(-1)
    logits_BTK, ids_BTK = logits_BTV.topk(k, -1)
    return TopTokens(ids_BTK, logits_BTK - norm_BT[..., None], norm_BT)
