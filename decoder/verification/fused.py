"""A step's work over the vocabulary, compiled for float32 on a CPU.

Does the same as `sampling.py`, `chain.py`, `tree.py` and `decoder/recording/observation.py`: one
pass over a distribution in place of ten, and none over distributions that nobody needs, such as
those after a rejection. Tensors must outlive their addresses, so contiguous copies are named.

Legend: B sequences, N candidates of a sequence at most, T = N + 1 verified positions,
Q draft distributions, M distributions of any kind, K top-k, V vocabulary.
"""

import torch
from torch import Tensor

from decoder.device.numba_support import at, rows_at
from decoder.verification import fused_kernels as kernels
from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import Sampling, Uniforms

_f32, _f64, _i64, _bool = torch.float32, torch.float64, torch.long, torch.bool


def most_likely(logits: Tensor) -> Tensor:
    """The first of the most likely tokens."""
    rows_MV = logits.flatten(0, -2)
    token = torch.empty(logits.shape[:-1], dtype=_i64)
    kernels.most_likely(*rows_at(rows_MV, _f32), at(token, _i64), *rows_MV.shape)
    return token


def probabilities(logits: Tensor, divisor_B: Tensor, greedy_B: Tensor, out: Tensor) -> None:
    """Writes the distributions after temperature, [B, …, V]. Sequences of `out` may lie apart."""
    logits, B, V = logits.contiguous(), len(logits), logits.shape[-1]
    own = at(divisor_B, _f32), at(greedy_B, _bool)
    T = logits.numel() // (B * V)
    kernels.probabilities(at(logits, _f32), *own, *rows_at(out, _f32), B, T, V)


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per distribution, by the inverse of its cumulative sum."""
    rows_MV, uniform = probs.flatten(0, -2), uniform.to(_f64).contiguous()
    token = torch.empty(uniform.shape, dtype=_i64)
    kernels.sample(*rows_at(rows_MV, _f32), at(uniform, _f64), at(token, _i64), *rows_MV.shape)
    return token


def verify(
    logits_BTV: Tensor,
    probs_BTV: Tensor | None,
    proposal: Proposal,
    sampling: Sampling,
    uniforms: Uniforms,
    lenient: LenientAcceptance | None,
) -> Verification:
    """`verify` of `verify.py`. `probs_BTV` is given where top-k or top-p shapes it."""
    (B, T, V), (_, N) = logits_BTV.shape, proposal.tokens_BN.shape
    Q, tree = proposal.probs_BQV.shape[1], proposal.tree
    logits_BTV, tokens_BN = logits_BTV.contiguous(), proposal.tokens_BN.contiguous()
    draft_probs_BQV = proposal.probs_BQV.float().contiguous()
    accept_BN, emit_B = uniforms.accept_BN.contiguous(), uniforms.emit_B.contiguous()
    if accept_BN.shape != (B, N) or T != N + 1 or (tree is None and Q not in (0, N)):
        raise ValueError(f"{N} candidates, {T} positions, {Q} draft distributions do not fit")
    accepted_B, next_B, compared_B = torch.empty((3, B), dtype=_i64)
    next_p_B, overlap_B = torch.empty((2, B))
    path_BN = torch.zeros((B, N), dtype=_i64)
    target = at(logits_BTV, _f32), at(probs_BTV, _f32)
    own = at(sampling.divisor_B, _f32), at(sampling.greedy_B, _bool)
    draft = at(draft_probs_BQV, _f32), at(tokens_BN, _i64), at(proposal.drafted_B, _i64)
    shape: tuple[int, ...] = (0, 0, 0, 0)
    if tree is not None:
        chains_B = torch.tensor(tree.chains)
        shape = at(tree.parents_BN, _i64), at(tree.sources_BN, _i64)
        shape = (*shape, at(tree.distinct_B, _bool), at(chains_B, _bool))
    drawn = at(accept_BN, _f64), at(emit_B, _f64)
    factors = (0, 0) if lenient is None else (at(lenient.scale_B, _f64), at(lenient.power_B, _f64))
    path = at(accepted_B, _i64), at(path_BN, _i64), at(next_B, _i64)
    told = at(next_p_B, _f32), at(overlap_B, _f32), at(compared_B, _i64)
    kernels.verify(*target, *own, *draft, *shape, *drawn, *factors, *path, *told, B, N, Q, V)
    return Verification(accepted_B, path_BN, next_B, next_p_B, overlap_B, compared_B)


def top_tokens(logits_BTV: Tensor, count_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`top_tokens` of `decoder/recording/observation.py`: ids_BTK, logp_BTK, norm_BT."""
    B, T, V = logits_BTV.shape
    logits_BTV, count_B = logits_BTV.contiguous(), count_B.contiguous()
    ids_BTK = torch.empty((B, T, k), dtype=_i64)
    logp_BTK, norm_BT = torch.empty((B, T, k)), torch.empty((B, T))
    columns = 1 << (k * V).bit_length() // 2  # about √(k V): as many as the numbers in k of them
    out = at(ids_BTK, _i64), at(logp_BTK, _f32), at(norm_BT, _f32)
    read = at(logits_BTV, _f32), at(count_B, _i64)
    kernels.top_tokens(*read, *out, B, T, V, k, max(k, min(columns, V)))
    return ids_BTK, logp_BTK, norm_BT
