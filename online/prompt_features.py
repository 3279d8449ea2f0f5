"""Prompts as hashed feature vectors, and groups of similar prompts by spherical k-means.

Pure and deterministic: the only randomness has fixed seeds.

Legend: F hashed features, C groups or clusters, X prompts, M tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DIMS = 4096
ALIKE = 0.7  # cosine of two groups' centroids above which the groups are merged
RESTARTS = 6  # runs of k-means; the best one counts
ROUNDS = 12  # iterations of each run
_PRIMES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Ints = NDArray[np.int64]


def features(prompt_ids: Sequence[int]) -> Floats:
    """Hashed tokens and pairs of neighbours with logarithmic counts, of length one [F]."""
    id_M = np.asarray(prompt_ids, np.uint64)
    pair_M = id_M[:-1] * _PRIMES[1] + id_M[1:] * _PRIMES[2]
    hash_M = np.concatenate([id_M * _PRIMES[0], pair_M])
    hash_M ^= hash_M >> np.uint64(29)
    count_F = np.bincount((hash_M % np.uint64(DIMS)).astype(np.int64), minlength=DIMS)
    unit_F: Floats = _unit(np.log1p(count_F.astype(np.float32))[None])[0]
    return unit_F


def cosines(prompt_XF: Floats, centroid_CF: Floats) -> Floats:
    """Cosine of each prompt and each centroid [X, C]."""
    cosine_XC: Floats = _unit(prompt_XF) @ _unit(centroid_CF).T
    return cosine_XC


def groups(prompt_XF: Floats, max_groups: int) -> Ints:
    """The group of each prompt [X]. Similar groups are merged."""
    unit_XF = _unit(prompt_XF)
    runs = [_k_means(unit_XF, max_groups, np.random.default_rng(s)) for s in range(RESTARTS)]
    _, group_X, centroid_CF = max(runs, key=lambda run: run[0])
    # The first group that each group is similar to; itself, if no earlier one is.
    first_C = (centroid_CF @ centroid_CF.T > ALIKE).argmax(1)
    merged_X: Ints = np.unique(first_C[group_X], return_inverse=True)[1]
    return merged_X


def _k_means(
    unit_XF: Floats, group_count: int, rng: np.random.Generator
) -> tuple[float, Ints, Floats]:
    """One run: its quality, the group of each prompt, and the centroids."""
    centroid_CF = _first_centroids(unit_XF, group_count, rng)
    for _ in range(ROUNDS):
        group_X = (unit_XF @ centroid_CF.T).argmax(1)
        member_CX = (group_X == np.arange(group_count)[:, None]).astype(np.float32)
        centroid_CF = _unit(member_CX @ unit_XF)
    similarity_XC = unit_XF @ centroid_CF.T
    return float(similarity_XC.max(1).sum()), similarity_XC.argmax(1), centroid_CF


def _first_centroids(unit_XF: Floats, group_count: int, rng: np.random.Generator) -> Floats:
    """Prompts that lie far apart (k-means++)."""
    centroid_CF: Floats = unit_XF[rng.integers(len(unit_XF))][None]
    while len(centroid_CF) < group_count:
        distance_X = np.maximum(0, 1 - (unit_XF @ centroid_CF.T).max(1)).astype(np.float64) + 1e-9
        chosen = rng.choice(len(unit_XF), p=distance_X / distance_X.sum())
        centroid_CF = np.concatenate([centroid_CF, unit_XF[chosen][None]])
    return centroid_CF


def _unit(array_XF: Floats) -> Floats:
    norm_X1 = np.linalg.norm(array_XF, axis=1, keepdims=True)
    unit_XF: Floats = array_XF / np.maximum(norm_X1, 1e-9)
    return unit_XF
