# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""One distribution over the vocabulary, and one sequence's verification, compiled: what `decoder/verification/fused.py` is made of.

Legend: V vocabulary, C columns, K = top-k, G drafted positions, T = G + 1 verified positions.
"""

from typing import Any

import numpy as np

from decoder.device.numba_support import EXACT, SUMS, exp, njit

LOWEST = np.float32(-np.inf)
NOTHING = np.float32(
    -87
)  # e^x below it is 0: so far from the most likely token that float32 hardly holds it
BLOCK = 1024  # numbers that are summed up in float32 at a time
LANES = 64  # numbers that are worked on side by side: one alone would wait for the one before


@njit(**EXACT)
def _at_least(x_C: Any, out_C: Any) -> None:
    for c in range(len(x_C)):
        out_C[c] = x_C[c] if x_C[c] > out_C[c] else out_C[c]


@njit(**EXACT)
def _maxima(x_V: Any, out_C: Any) -> None:
    """The largest of every C-th number."""
    C, V = len(out_C), len(x_V)
    whole = V // C * C
    for c in range(C):
        out_C[c] = LOWEST
    for first in range(0, whole, C):
        _at_least(x_V[first : first + C], out_C)
    _at_least(x_V[whole:], out_C)


@njit(**EXACT)
def largest(x_V: Any) -> Any:
    lanes = np.empty(LANES, np.float32)
    _maxima(x_V, lanes)
    found = LOWEST
    for lane in lanes:
        found = lane if lane > found else found
    return found


@njit(**EXACT)
def best(x_V: Any) -> Any:
    """The first of the largest; NaN is none of them."""
    most = largest(x_V)
    for v in range(len(x_V)):
        if x_V[v] == most:
            return v
    return 0


@njit(**EXACT)
def _clean(x_V: Any, out_V: Any) -> None:
    """NaN counts as 0, and infinity as 1e9."""
    for v in range(len(x_V)):
        number = x_V[v] if x_V[v] == x_V[v] else np.float32(0)
        out_V[v] = min(number, np.float32(1e9))


@njit(**SUMS)
def soften(x_V: Any, divisor: Any, out_V: Any) -> None:
    """The softmax of x / divisor. The two may be the same."""
    _clean(x_V, out_V)
    most, factor, mass = largest(out_V), np.float32(1) / divisor, 0.0
    for first in range(0, len(out_V), BLOCK):
        mass += _raise(out_V[first : first + BLOCK], most, factor)
    factor = np.float32(1 / mass)
    for v in range(len(out_V)):
        out_V[v] *= factor


@njit(**SUMS)
def norm(x_V: Any, most: Any) -> Any:
    """The logarithm of Σ e^x, where `most` is the largest x."""
    mass, room = 0.0, np.empty(BLOCK, np.float32)
    for first in range(0, len(x_V), BLOCK):
        block = x_V[first : first + BLOCK]
        for v in range(len(block)):
            room[v] = block[v]
        mass += _raise(room[: len(block)], most, np.float32(1))
    return most + np.float32(np.log(mass))


@njit(**SUMS)
def _raise(x_V: Any, most: Any, factor: Any) -> Any:
    """In place e^(factor (x − most)), and the sum of it: of few numbers, or float32 would lose the small ones."""
    mass = np.float32(0)
    for v in range(len(x_V)):
        below = (x_V[v] - most) * factor
        x_V[v] = exp(below) if below > NOTHING else np.float32(0)
        mass += x_V[v]
    return mass


@njit(**SUMS)
def total(weights_V: Any) -> Any:
    mass = 0.0
    for weight in weights_V:
        mass += np.float64(weight)
    return mass


@njit(**EXACT)
def draw(weights_V: Any, mass: Any, uniform: Any) -> Any:
    """The first token whose cumulative weight exceeds the threshold: it has weight of its own."""
    threshold, before = uniform * mass, 0.0
    for first in range(0, len(weights_V), LANES):
        here = total(weights_V[first : first + LANES])
        if before + here > threshold:
            return first + _reach(weights_V[first : first + LANES], threshold - before)
        before += here
    return _reach(weights_V, np.inf)


@njit(**EXACT)
def _reach(weights_V: Any, threshold: Any) -> Any:
    """As above, one by one; the last token of weight, where rounding lets none exceed it."""
    cumulative, last = 0.0, len(weights_V) - 1
    for v in range(len(weights_V)):
        if weights_V[v] > 0:
            cumulative, last = cumulative + np.float64(weights_V[v]), v
            if cumulative > threshold:
                break
    return last


@njit(**EXACT)
def _insert(values_K: Any, ids_K: Any, held: Any, value: Any, token: Any) -> Any:
    """Into what is sorted downwards; the smallest falls out where it is full. Returns how many it holds."""
    place = held
    if held == len(values_K):
        if not value > values_K[held - 1]:
            return held
        place -= 1
    while place > 0 and values_K[place - 1] < value:
        values_K[place], ids_K[place] = values_K[place - 1], ids_K[place - 1]
        place -= 1
    values_K[place], ids_K[place] = value, token
    return min(held + 1, len(values_K))


@njit(**EXACT)
def top(x_V: Any, maxima_C: Any, chosen_K: Any, values_K: Any, ids_K: Any) -> None:
    """The K largest: they lie in the K columns of the largest maxima, and none is below the smallest of those."""
    _maxima(x_V, maxima_C)
    held = 0
    for c in range(len(maxima_C)):
        held = _insert(values_K, chosen_K, held, maxima_C[c], c)
    floor, held = values_K[-1], 0
    for k in range(len(chosen_K)):
        for v in range(chosen_K[k], len(x_V), len(maxima_C)):
            if x_V[v] >= floor:
                held = _insert(values_K, ids_K, held, x_V[v], v)
    for k in range(held, len(ids_K)):  # the others are no numbers
        values_K[k], ids_K[k] = LOWEST, 0


@njit(**SUMS)
def _overlap(p_V: Any, q_V: Any) -> Any:
    mass = np.float32(0)
    for v in range(len(p_V)):
        mass += p_V[v] if p_V[v] < q_V[v] else q_V[v]
    return mass


# ── one sequence's verification, as in `decoder/verification/verify.py` ──


@njit(**EXACT)
def walk_greedily(
    logits_TV: Any,
    tokens_N: Any,
    parents_N: Any,
    sources_N: Any,
    chain: Any,
    drafted: Any,
    path_N: Any,
) -> Any:
    node = accepted = compared = 0
    overlap, token, seen = np.float32(0), best(logits_TV[0]), -1
    for n in range(drafted):
        if (n if chain else parents_N[n]) != node:
            continue
        told = seen != node and (chain or sources_N[n] >= 0)
        compared += told
        overlap += np.float32(tokens_N[n] == token and told)
        seen = node
        if tokens_N[n] == token:
            path_N[accepted], node = n, n + 1
            accepted, token = accepted + 1, best(logits_TV[node])
    return accepted, token, overlap, compared


@njit(**EXACT)
def _lenient(p: Any, scale: Any, power: Any) -> Any:
    """f(p), as in `decoder/verification/lenience.py`; of an exact sequence p itself."""
    return scale * (p if power == 1 else p**power)


@njit(**EXACT)
def _target(logits_TV: Any, probs_TV: Any, given: Any, divisor: Any, node: Any, p_V: Any) -> None:
    """What the target says behind a node."""
    if given:
        for v in range(len(p_V)):
            p_V[v] = probs_TV[node, v]
    else:
        soften(logits_TV[node], divisor, p_V)


@njit(**EXACT)
def _reject(p_V: Any, q_V: Any, scale: Any, rest_V: Any) -> None:
    """norm(max(0, p − scale q)); p itself where nothing is left: then nothing is rejected but by rounding."""
    mass = 0.0
    for v in range(len(p_V)):
        mass += np.float64(max(p_V[v] - scale * q_V[v], np.float32(0)))
    if mass > 0:
        factor = np.float32(1 / mass)
        for v in range(len(p_V)):
            rest_V[v] = factor * max(p_V[v] - scale * q_V[v], np.float32(0))
    else:
        for v in range(len(p_V)):
            rest_V[v] = p_V[v]


@njit(**EXACT)
def _reject_chosen(p_V: Any, token: Any, rest_V: Any) -> None:
    """The same where q has all its mass on one token."""
    mass = total(p_V[:token]) + total(p_V[token + 1 :])
    factor = np.float32(1 / mass) if mass > 0 else np.float32(1)
    for v in range(len(p_V)):
        rest_V[v] = factor * p_V[v] if v != token or mass == 0 else np.float32(0)


@njit(**EXACT)
def walk(
    logits_TV: Any, probs_TV: Any, given: Any, divisor: Any, draft_probs_QV: Any, tokens_N: Any, parents_N: Any,
    sources_N: Any, distinct: Any, chain: Any, drafted: Any, accept_N: Any, emit: Any, scale: Any, power: Any, p_V: Any,
    rest_V: Any, own_V: Any, path_N: Any,
) -> Any:  # fmt: skip
    """Leaves in `p_V` what the target says where the last token is emitted; `rest_V` and `own_V` are scratch."""
    node = accepted = compared = tried = drawn = 0
    overlap = np.float32(0)
    _target(logits_TV, probs_TV, given, divisor, node, p_V)
    for n in range(drafted):
        if (n if chain else parents_N[n]) != node:
            continue
        token, source = tokens_N[n], n if chain else sources_N[n]
        here_V = rest_V if tried else p_V
        if source < 0:
            q, q_mass, q_V = 1.0, 1.0, own_V
        else:
            q_V = own_V if drawn and distinct else draft_probs_QV[source]
            compared += tried == 0
            overlap += _overlap(p_V, q_V) if tried == 0 else np.float32(0)
            q_mass = total(q_V) if drawn and distinct else 1.0
            q = np.float64(q_V[token]) / q_mass if q_mass > 0 else 0.0
            if q == 0:  # there were fewer tokens to draw than siblings
                continue
        if accept_N[n] * q < _lenient(np.float64(here_V[token]), scale, power):
            path_N[accepted], node = n, n + 1
            accepted, tried, drawn = accepted + 1, 0, 0
            _target(logits_TV, probs_TV, given, divisor, node, p_V)
            continue
        if source < 0:
            _reject_chosen(here_V, token, rest_V)
        else:
            _reject(here_V, q_V, np.float32(1 / q_mass), rest_V)
            if distinct:
                for v in range(len(own_V)):
                    own_V[v] = q_V[v]
                own_V[token] = 0
            drawn += 1
        tried += 1
    here_V = rest_V if tried else p_V
    return accepted, draw(here_V, total(here_V), emit), overlap, compared


@njit(**EXACT)
def block(
    logits_TV: Any, probs_TV: Any, given: Any, divisor: Any, draft_probs_QV: Any, tokens_G: Any, sources_G: Any,
    drawn: Any, drafted: Any, accept_G: Any, emit: Any, p_V: Any, rest_V: Any, path_G: Any,
) -> Any:  # fmt: skip
    """A chain's, as a whole; `drawn`: each candidate from the distribution of its number.

    Leaves in `p_V` what the target says where the last token is emitted.
    """
    accepted, ratio, kept_ratio = 0, 1.0, 1.0
    overlaps_G, compared_G = np.zeros(drafted, np.float32), np.zeros(drafted, np.int64)
    for g in range(drafted):
        _target(logits_TV, probs_TV, given, divisor, g, p_V)
        token, source = tokens_G[g], g if drawn else sources_G[g]
        p, q, left = np.float64(p_V[token]), 1.0, 0.0
        if source >= 0:
            q_V = draft_probs_QV[source]
            q, overlaps_G[g], compared_G[g] = np.float64(q_V[token]), _overlap(p_V, q_V), 1
            left = _rest_mass(p_V, q_V, np.float32(ratio)) if g > 0 else 0.0
        else:
            left = ratio * (1 - p)
        if g > 0 and accept_G[g - 1] * (left + 1 - ratio) < left:
            accepted, kept_ratio = g, ratio
        ratio = min(1.0, ratio * p / q) if q > 0 else 0.0
    if drafted > 0 and accept_G[drafted - 1] < ratio:
        accepted = drafted
    for g in range(accepted):
        path_G[g] = g
    _target(logits_TV, probs_TV, given, divisor, accepted, p_V)
    overlap, compared = total(overlaps_G[: accepted + 1]), compared_G[: accepted + 1].sum()
    if accepted == drafted:
        return accepted, draw(p_V, total(p_V), emit), overlap, compared
    source, scale = accepted if drawn else sources_G[accepted], np.float32(kept_ratio)
    if source >= 0:
        q_V = draft_probs_QV[source]
        for v in range(len(p_V)):
            rest_V[v] = max(scale * p_V[v] - q_V[v], np.float32(0))
    else:
        _reject_chosen(p_V, tokens_G[accepted], rest_V)
    mass = total(rest_V)
    # p = q leaves nothing, and then nothing is rejected but by rounding: p itself is right.
    following = draw(rest_V, mass, emit) if mass > 0 else draw(p_V, total(p_V), emit)
    return accepted, following, overlap, compared


@njit(**SUMS)
def _rest_mass(p_V: Any, q_V: Any, scale: Any) -> Any:
    mass = np.float32(0)
    for v in range(len(p_V)):
        rest = scale * p_V[v] - q_V[v]
        mass += rest if rest > 0 else np.float32(0)
    return np.float64(mass)
