# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""Compiled kernels over a batch. They receive addresses, strides and sizes as integers.

Importing this module compiles them, or loads them from the disk cache.

Legend: B sequences, N candidates of a sequence at most, T = N + 1 verified positions,
Q draft distributions, M distributions of any kind, K top-k, C columns, V vocabulary.
"""

from typing import Any

import numpy as np
from numba import carray, types

from decoder.device.numba_support import EXACT, SUMS, bools, doubles, floats, integers, njit
from decoder.verification.fused_rules import (
    Candidates,
    Scratch,
    Target,
    verify_block,
    verify_greedy,
    verify_tree,
)
from decoder.verification.fused_vocabulary import (
    argmax,
    log_sum_exp,
    sample_token,
    softmax,
    top_k,
    total,
)

_int = types.int64
FLOAT_BYTES = 4


@njit(types.void(*[_int] * 5), **EXACT)
def most_likely(logits_at: Any, stride: Any, best_at: Any, M: Any, V: Any) -> None:
    best_M = carray(integers(best_at), (M,))
    for m in range(M):
        best_M[m] = argmax(carray(floats(logits_at + FLOAT_BYTES * m * stride), (V,)))


@njit(types.void(*[_int] * 8), **EXACT)
def probabilities(
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
        out_TV = carray(floats(out_at + FLOAT_BYTES * b * stride), (T, V))
        for t in range(T):
            if greedy_B[b]:
                for v in range(V):
                    out_TV[t, v] = np.float32(0)
                out_TV[t, argmax(logits_BTV[b, t])] = np.float32(1)
            else:
                softmax(logits_BTV[b, t], divisor_B[b], out_TV[t])


@njit(types.void(*[_int] * 6), **EXACT)
def sample(probs_at: Any, stride: Any, uniform_at: Any, token_at: Any, M: Any, V: Any) -> None:
    uniform_M, token_M = carray(doubles(uniform_at), (M,)), carray(integers(token_at), (M,))
    for m in range(M):
        probs_V = carray(floats(probs_at + FLOAT_BYTES * m * stride), (V,))
        token_M[m] = sample_token(probs_V, total(probs_V), uniform_M[m])


@njit(types.void(*[_int] * 25), **SUMS)
def verify(
    logits_at: Any, probs_at: Any, divisor_at: Any, greedy_at: Any,
    draft_probs_at: Any, tokens_at: Any, drafted_at: Any,
    parents_at: Any, sources_at: Any, distinct_at: Any, chains_at: Any,
    accept_at: Any, emit_at: Any, scale_at: Any, power_at: Any,
    accepted_at: Any, path_at: Any, next_at: Any, next_p_at: Any, overlap_at: Any, compared_at: Any,
    B: Any, N: Any, Q: Any, V: Any,
) -> None:  # fmt: skip
    T, no_tree, exact = N + 1, parents_at == 0, scale_at == 0
    logits_BTV = carray(floats(logits_at), (B, T, V))
    probs_BTV = carray(floats(probs_at), (B, T, V))
    divisor_B, greedy_B = carray(floats(divisor_at), (B,)), carray(bools(greedy_at), (B,))
    draft_probs_BQV = carray(floats(draft_probs_at), (B, Q, V))
    tokens_BN, drafted_B = carray(integers(tokens_at), (B, N)), carray(integers(drafted_at), (B,))
    parents_BN = carray(integers(parents_at), (B, N))
    sources_BN = carray(integers(sources_at), (B, N))
    distinct_B, chains_B = carray(bools(distinct_at), (B,)), carray(bools(chains_at), (B,))
    accept_BN, emit_B = carray(doubles(accept_at), (B, N)), carray(doubles(emit_at), (B,))
    scale_B, power_B = carray(doubles(scale_at), (B,)), carray(doubles(power_at), (B,))
    accepted_B, path_BN = carray(integers(accepted_at), (B,)), carray(integers(path_at), (B, N))
    next_B, next_p_B = carray(integers(next_at), (B,)), carray(floats(next_p_at), (B,))
    overlap_B, compared_B = carray(floats(overlap_at), (B,)), carray(integers(compared_at), (B,))
    scratch = Scratch(np.empty(V, np.float32), np.empty(V, np.float32), np.empty(V, np.float32))
    for b in range(B):
        target = Target(logits_BTV[b], probs_BTV[b], probs_at != 0, divisor_B[b])
        candidates = Candidates(tokens_BN[b], parents_BN[b], sources_BN[b], drafted_B[b], no_tree)
        scale, power = (1.0, 1.0) if exact else (scale_B[b], power_B[b])
        if greedy_B[b]:
            found = verify_greedy(target, candidates, path_BN[b])
            scratch.p_V[found[1]] = np.float32(1)
        elif (no_tree or chains_B[b]) and scale == 1 and power == 1:
            found = verify_block(
                target, draft_probs_BQV[b], candidates, accept_BN[b], emit_B[b], scratch, path_BN[b]
            )
        else:
            distinct = False if no_tree else distinct_B[b] != 0
            found = verify_tree(
                target, draft_probs_BQV[b], candidates, distinct, accept_BN[b], emit_B[b],
                scale, power, scratch, path_BN[b],
            )  # fmt: skip
        accepted_B[b], next_B[b], overlap_B[b], compared_B[b] = found
        next_p_B[b] = scratch.p_V[next_B[b]]


@njit(types.void(*[_int] * 10), **EXACT)
def top_tokens(
    logits_at: Any, count_at: Any, ids_at: Any, logp_at: Any, norm_at: Any,
    B: Any, T: Any, V: Any, K: Any, C: Any,
) -> None:  # fmt: skip
    maxima_C, columns_K = np.empty(C, np.float32), np.empty(K, np.int64)
    logits_BTV, count_B = carray(floats(logits_at), (B, T, V)), carray(integers(count_at), (B,))
    ids_BTK, logp_BTK = carray(integers(ids_at), (B, T, K)), carray(floats(logp_at), (B, T, K))
    norm_BT = carray(floats(norm_at), (B, T))
    for b in range(B):
        for t in range(count_B[b]):
            logp_K = logp_BTK[b, t]
            top_k(logits_BTV[b, t], maxima_C, columns_K, logp_K, ids_BTK[b, t])
            norm_BT[b, t] = log_sum_exp(logits_BTV[b, t], logp_K[0])
            for k in range(K):
                logp_K[k] -= norm_BT[b, t]
