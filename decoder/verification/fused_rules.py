# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""Compiled verification of one sequence: the rules of `chain.py` and `tree.py`.

Legend: N candidates, G tokens of a chain, T verified positions, Q draft distributions,
V vocabulary.
"""

from typing import Any, NamedTuple

import numpy as np

from decoder.device.numba_support import EXACT, njit
from decoder.verification.fused_residuals import copy, reject, reject_chosen, residual_mass
from decoder.verification.fused_vocabulary import argmax, overlap, sample_token, softmax, total


class Target(NamedTuple):
    """The target's view of one sequence."""

    logits_TV: Any
    probs_TV: Any  # read where `given`
    given: Any
    divisor: Any


class Candidates(NamedTuple):
    """The candidates of one sequence. `sources_N` is negative where one was chosen."""

    tokens_N: Any
    parents_N: Any
    sources_N: Any
    drafted: Any
    drawn_chain: Any  # each follows the one before and has its own distribution: no tree is read


class Scratch(NamedTuple):
    """Distributions to work with. `p_V` ends as the target's at the emitted token."""

    p_V: Any
    rest_V: Any
    remaining_V: Any


# Each rule returns the number of accepted candidates, the emitted token, Σ overlap, compared nodes.


@njit(**EXACT)
def verify_greedy(target: Any, candidates: Any, path_N: Any) -> Any:
    node = accepted = compared = 0
    matched, token, tried_node = np.float32(0), argmax(target.logits_TV[0]), -1
    for n in range(candidates.drafted):
        if _parent(candidates, n) != node:
            continue
        is_compared = tried_node != node and _source(candidates, n) >= 0
        compared += is_compared
        matched += np.float32(candidates.tokens_N[n] == token and is_compared)
        tried_node = node
        if candidates.tokens_N[n] == token:
            path_N[accepted], node = n, n + 1
            accepted, token = accepted + 1, argmax(target.logits_TV[node])
    return accepted, token, matched, compared


@njit(**EXACT)
def verify_block(
    target: Any,
    draft_probs_QV: Any,
    chain: Any,
    accept_N: Any,
    emit: Any,
    scratch: Any,
    path_N: Any,
) -> Any:
    p_V, drafted = scratch.p_V, chain.drafted
    accepted, ratio, accepted_ratio = 0, 1.0, 1.0
    overlaps_G, compared_G = np.zeros(drafted, np.float32), np.zeros(drafted, np.int64)
    for g in range(drafted):
        _target_probs(target, g, p_V)
        token, source = chain.tokens_N[g], _source(chain, g)
        p, q, residual = np.float64(p_V[token]), 1.0, 0.0
        if source >= 0:
            q_V = draft_probs_QV[source]
            q, overlaps_G[g], compared_G[g] = np.float64(q_V[token]), overlap(p_V, q_V), 1
            residual = residual_mass(p_V, q_V, np.float32(ratio)) if g > 0 else 0.0
        else:
            residual = ratio * (1 - p)
        if g > 0 and accept_N[g - 1] * (residual + 1 - ratio) < residual:
            accepted, accepted_ratio = g, ratio
        ratio = min(1.0, ratio * p / q) if q > 0 else 0.0
    if drafted > 0 and accept_N[drafted - 1] < ratio:
        accepted = drafted
    for g in range(accepted):
        path_N[g] = g
    _target_probs(target, accepted, p_V)
    token = _emit_after_block(
        draft_probs_QV, chain, accepted, np.float32(accepted_ratio), emit, scratch
    )
    return accepted, token, total(overlaps_G[: accepted + 1]), compared_G[: accepted + 1].sum()


@njit(**EXACT)
def _emit_after_block(
    draft_probs_QV: Any, chain: Any, accepted: Any, ratio: Any, emit: Any, scratch: Any
) -> Any:
    """Samples from the target after a whole chain, else from norm(max(0, ratio p − q))."""
    p_V, rest_V, _ = scratch
    if accepted == chain.drafted:
        return sample_token(p_V, total(p_V), emit)
    source = _source(chain, accepted)
    if source >= 0:
        q_V = draft_probs_QV[source]
        for v in range(len(p_V)):
            rest_V[v] = max(ratio * p_V[v] - q_V[v], np.float32(0))
    else:
        reject_chosen(p_V, chain.tokens_N[accepted], rest_V)
    mass = total(rest_V)
    # p = q leaves no residual. Only rounding can reject there, and p itself is right.
    return sample_token(rest_V, mass, emit) if mass > 0 else sample_token(p_V, total(p_V), emit)


@njit(**EXACT)
def verify_tree(
    target: Any, draft_probs_QV: Any, candidates: Any, distinct: Any, accept_N: Any, emit: Any,
    scale: Any, power: Any, scratch: Any, path_N: Any,
) -> Any:  # fmt: skip
    """Recursive rejection. `scale` and `power` are the sequence's lenience."""
    p_V, rest_V, remaining_V = scratch
    node = accepted = compared = rejected = removed = 0  # the latter two at this node
    matched = np.float32(0)
    _target_probs(target, node, p_V)
    for n in range(candidates.drafted):
        if _parent(candidates, n) != node:
            continue
        token, source = candidates.tokens_N[n], _source(candidates, n)
        here_V = rest_V if rejected else p_V
        if source < 0:
            q, q_mass, q_V = 1.0, 1.0, remaining_V
        else:
            q_V = remaining_V if removed and distinct else draft_probs_QV[source]
            compared += rejected == 0
            matched += overlap(p_V, q_V) if rejected == 0 else np.float32(0)
            q_mass = total(q_V) if removed and distinct else 1.0
            q = np.float64(q_V[token]) / q_mass if q_mass > 0 else 0.0
            if q == 0:  # q had fewer tokens than the node has candidates
                continue
        if accept_N[n] * q < _lenient(np.float64(here_V[token]), scale, power):
            path_N[accepted], node = n, n + 1
            accepted, rejected, removed = accepted + 1, 0, 0
            _target_probs(target, node, p_V)
            continue
        if source < 0:
            reject_chosen(here_V, token, rest_V)
        else:
            reject(here_V, q_V, np.float32(1 / q_mass), rest_V)
            if distinct:
                copy(q_V, remaining_V)
                remaining_V[token] = 0
            removed += 1
        rejected += 1
    here_V = rest_V if rejected else p_V
    return accepted, sample_token(here_V, total(here_V), emit), matched, compared


@njit(**EXACT)
def _parent(candidates: Any, n: Any) -> Any:
    return n if candidates.drawn_chain else candidates.parents_N[n]


@njit(**EXACT)
def _source(candidates: Any, n: Any) -> Any:
    return n if candidates.drawn_chain else candidates.sources_N[n]


@njit(**EXACT)
def _lenient(p: Any, scale: Any, power: Any) -> Any:
    """f(p), as in `lenience.py`; p itself for an exact sequence."""
    return scale * (p if power == 1 else p**power)


@njit(**EXACT)
def _target_probs(target: Any, node: Any, p_V: Any) -> None:
    """The target's distribution after a node."""
    if target.given:
        copy(target.probs_TV[node], p_V)
    else:
        softmax(target.logits_TV[node], target.divisor, p_V)
