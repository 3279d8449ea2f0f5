# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""What a step does with distributions over the vocabulary, compiled for float32 on a CPU.

The same as in `decoder/verification/sampling.py`, `decoder/verification/verify.py` and `decoder/recording/observation.py`, which call it: one pass where torch
makes ten, and none over what nobody needs, as what lies behind a rejection. Importing this module compiles it, in about
four seconds.

Legend: B sequences, G drafted positions, T = G + 1 verified positions, N any sequences, K = top-k, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from decoder.device.numba_support import EXACT, SUMS, at, bools, doubles, floats, integers, njit
from decoder.verification.fused_kernels import (
    best,
    block,
    draw,
    norm,
    soften,
    top,
    total,
    walk,
    walk_greedily,
)
from decoder.verification.proposal import Tree

_int = types.int64


# ── on tensors; what is made contiguous keeps its name, or nobody would keep its memory ──


def most_likely(logits: Tensor) -> Tensor:
    rows_NV = logits.flatten(0, -2)
    token = torch.empty(logits.shape[:-1], dtype=torch.long)
    _most_likely(rows_NV.data_ptr(), rows_NV.stride(0), at(token), *rows_NV.shape)
    return token


def probabilities(logits: Tensor, divisor_B: Tensor, greedy_B: Tensor, out: Tensor) -> None:
    """Temperature and greediness, without top-k and top-p, [B, …, V]. Sequences of `out` may lie apart."""
    logits, B, V = logits.contiguous(), len(logits), logits.shape[-1]
    assert logits.dtype == out.dtype == torch.float32, "numbers are read and written as they lie"
    T = logits.numel() // (B * V)
    _probabilities(at(logits), at(divisor_B), at(greedy_B), out.data_ptr(), out.stride(0), B, T, V)


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    rows_NV, uniform = probs.flatten(0, -2), uniform.to(torch.float64).contiguous()
    token = torch.empty(uniform.shape, dtype=torch.long)
    _sample(rows_NV.data_ptr(), rows_NV.stride(0), at(uniform), at(token), *rows_NV.shape)
    return token


def verify(
    logits_BTV: Tensor,
    probs_BTV: Tensor | None,
    draft_probs_BQV: Tensor,
    tokens_BN: Tensor,
    tree: Tree | None,
    drafted_B: Tensor,
    divisor_B: Tensor,
    greedy_B: Tensor,
    accept_uniform_BN: Tensor,
    emit_uniform_B: Tensor,
    scale_B: Tensor | None = None,
    power_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a `Verdict` holds. `probs_BTV` is given where it is more than a temperature's doing.

    `scale_B` and `power_B` are given where a sequence is lenient.
    """
    (B, T, V), (_, N), Q = logits_BTV.shape, tokens_BN.shape, draft_probs_BQV.shape[1]
    logits_BTV, draft_probs_BQV = logits_BTV.contiguous(), draft_probs_BQV.float().contiguous()
    tokens_BN, accept_uniform_BN = tokens_BN.contiguous(), accept_uniform_BN.contiguous()
    emit_uniform_B = emit_uniform_B.contiguous()
    assert accept_uniform_BN.dtype == emit_uniform_B.dtype == torch.float64, (
        "numbers are read as they lie"
    )
    assert (accept_uniform_BN.shape, T) == ((B, N), N + 1), "kernels read as far as they are told"
    assert tree is not None or Q in (0, N), "kernels read as far as they are told"
    accepted_B, next_B, compared_B = (torch.empty(B, dtype=torch.long) for _ in range(3))
    next_p_B, overlap_B, path_BN = (
        torch.empty(B),
        torch.empty(B),
        torch.zeros((B, N), dtype=torch.long),
    )
    chains_B = None if tree is None else torch.tensor(tree.chains)
    shape = (
        (0, 0, 0)
        if tree is None
        else (at(tree.parents_BN), at(tree.sources_BN), at(tree.distinct_B))
    )
    told = at(draft_probs_BQV), at(tokens_BN), *shape, at(drafted_B), at(divisor_B), at(greedy_B)
    drawn, lenient = (at(accept_uniform_BN), at(emit_uniform_B)), (at(scale_B), at(power_B))
    verdict = at(accepted_B), at(path_BN), at(next_B), at(next_p_B), at(overlap_B), at(compared_B)
    _judge(
        at(logits_BTV), at(probs_BTV), at(chains_B), *told, *drawn, *lenient, *verdict, B, N, Q, V
    )
    return accepted_B, path_BN, next_B, next_p_B, overlap_B, compared_B


def observe(logits_BTV: Tensor, count_B: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`decoder.recording.observation.top_tokens`: top_ids_BTK, top_logp_BTK, norm_BT."""
    B, T, V = logits_BTV.shape
    logits_BTV, count_B = logits_BTV.contiguous(), count_B.contiguous()
    top_ids_BTK = torch.empty((B, T, k), dtype=torch.long)
    top_logp_BTK, norm_BT = torch.empty((B, T, k)), torch.empty((B, T))
    # About √(k V): as many columns as there are candidates in k of them.
    columns = 1 << (k * V).bit_length() // 2
    found = at(top_ids_BTK), at(top_logp_BTK), at(norm_BT)
    _observe(at(logits_BTV), at(count_B), *found, B, T, V, k, max(k, min(columns, V)))
    return top_ids_BTK, top_logp_BTK, norm_BT


# ── compiled ──


@njit(types.void(*[_int] * 5), **EXACT)
def _most_likely(logits_at: Any, stride: Any, best_at: Any, N: Any, V: Any) -> None:
    best_N = carray(integers(best_at), (N,))
    for n in range(N):
        best_N[n] = best(carray(floats(logits_at + 4 * n * stride), (V,)))


@njit(types.void(*[_int] * 8), **EXACT)
def _probabilities(
    logits_at: Any,
    divisor_at: Any,
    greedy_at: Any,
    out_at: Any,
    stride: Any,
    B: Any,
    T: Any,
    V: Any,
) -> None:
    logits_BTV = carray(floats(logits_at), (B, T, V))
    divisor_B, greedy_B = carray(floats(divisor_at), (B,)), carray(bools(greedy_at), (B,))
    for b in range(B):
        out_TV = carray(floats(out_at + 4 * b * stride), (T, V))
        for t in range(T):
            if greedy_B[b]:
                for v in range(V):
                    out_TV[t, v] = np.float32(0)
                out_TV[t, best(logits_BTV[b, t])] = np.float32(1)
            else:
                soften(logits_BTV[b, t], divisor_B[b], out_TV[t])


@njit(types.void(*[_int] * 6), **EXACT)
def _sample(probs_at: Any, stride: Any, uniform_at: Any, token_at: Any, N: Any, V: Any) -> None:
    uniform_N, token_N = carray(doubles(uniform_at), (N,)), carray(integers(token_at), (N,))
    for n in range(N):
        probs_V = carray(floats(probs_at + 4 * n * stride), (V,))
        token_N[n] = draw(probs_V, total(probs_V), uniform_N[n])


@njit(types.void(*[_int] * 25), **SUMS)
def _judge(
    logits_at: Any, probs_at: Any, chains_at: Any, draft_probs_at: Any, tokens_at: Any, parents_at: Any,
    sources_at: Any, distinct_at: Any, drafted_at: Any, divisor_at: Any, greedy_at: Any, accept_at: Any,
    emit_at: Any, scale_at: Any, power_at: Any, accepted_at: Any, path_at: Any, next_at: Any, next_p_at: Any,
    overlap_at: Any, compared_at: Any, B: Any, N: Any, Q: Any, V: Any,
) -> None:  # fmt: skip
    T, p_V, rest_V, own_V = (
        N + 1,
        np.empty(V, np.float32),
        np.empty(V, np.float32),
        np.empty(V, np.float32),
    )
    logits_BTV, probs_BTV = (
        carray(floats(logits_at), (B, T, V)),
        carray(floats(probs_at), (B, T, V)),
    )
    draft_probs_BQV, tokens_BN = (
        carray(floats(draft_probs_at), (B, Q, V)),
        carray(integers(tokens_at), (B, N)),
    )
    parents_BN, sources_BN = (
        carray(integers(parents_at), (B, N)),
        carray(integers(sources_at), (B, N)),
    )
    chains_B = carray(bools(chains_at), (B,))
    distinct_B, drafted_B = carray(bools(distinct_at), (B,)), carray(integers(drafted_at), (B,))
    divisor_B, greedy_B = carray(floats(divisor_at), (B,)), carray(bools(greedy_at), (B,))
    accept_BN, emit_B = carray(doubles(accept_at), (B, N)), carray(doubles(emit_at), (B,))
    scale_B, power_B = carray(doubles(scale_at), (B,)), carray(doubles(power_at), (B,))
    accepted_B, path_BN = carray(integers(accepted_at), (B,)), carray(integers(path_at), (B, N))
    next_B, next_p_B = carray(integers(next_at), (B,)), carray(floats(next_p_at), (B,))
    overlap_B, compared_B = carray(floats(overlap_at), (B,)), carray(integers(compared_at), (B,))
    chain = parents_at == 0
    for b in range(B):
        if greedy_B[b]:
            accepted, following, overlap, compared = walk_greedily(
                logits_BTV[b],
                tokens_BN[b],
                parents_BN[b],
                sources_BN[b],
                chain,
                drafted_B[b],
                path_BN[b],
            )
            p_V[following] = np.float32(1)
        elif (chain or chains_B[b]) and (scale_at == 0 or (scale_B[b] == 1 and power_B[b] == 1)):
            accepted, following, overlap, compared = block(
                logits_BTV[b], probs_BTV[b], probs_at != 0, divisor_B[b], draft_probs_BQV[b], tokens_BN[b],
                sources_BN[b], chain, drafted_B[b], accept_BN[b], emit_B[b], p_V, rest_V, path_BN[b],
            )  # fmt: skip
        else:
            scale, power = (scale_B[b], power_B[b]) if scale_at != 0 else (1.0, 1.0)
            distinct = distinct_B[b] if not chain else False
            accepted, following, overlap, compared = walk(
                logits_BTV[b], probs_BTV[b], probs_at != 0, divisor_B[b], draft_probs_BQV[b], tokens_BN[b],
                parents_BN[b], sources_BN[b], distinct, chain, drafted_B[b], accept_BN[b], emit_B[b], scale, power,
                p_V, rest_V, own_V, path_BN[b],
            )  # fmt: skip
        accepted_B[b], next_B[b], next_p_B[b] = accepted, following, p_V[following]
        overlap_B[b], compared_B[b] = overlap, compared


@njit(types.void(*[_int] * 10), **EXACT)
def _observe(
    logits_at: Any, count_at: Any, top_ids_at: Any, top_logp_at: Any, norm_at: Any,
    B: Any, T: Any, V: Any, K: Any, C: Any,
) -> None:  # fmt: skip
    maxima_C, chosen_K = np.empty(C, np.float32), np.empty(K, np.int64)
    logits_BTV = carray(floats(logits_at), (B, T, V))
    count_B = carray(integers(count_at), (B,))
    top_ids_BTK = carray(integers(top_ids_at), (B, T, K))
    top_logp_BTK = carray(floats(top_logp_at), (B, T, K))
    norm_BT = carray(floats(norm_at), (B, T))
    for b in range(B):
        for t in range(count_B[b]):
            logp_K = top_logp_BTK[b, t]
            top(logits_BTV[b, t], maxima_C, chosen_K, logp_K, top_ids_BTK[b, t])
            norm_BT[b, t] = norm(logits_BTV[b, t], logp_K[0])
            for k in range(K):
                logp_K[k] -= norm_BT[b, t]
