"""Which cluster a prompt belongs to, learnt from the prompts themselves: online spherical k-means over hashed tokens.

Pure: no I/O, no clock, no randomness but a fixed seed, so the same prompts in the same order give the same clusters.
A prompt that is like no cluster is a stranger, and belongs to none. Strangers are kept, and once many have come within
a while, groups among them become clusters, as long as there is room: first and later clusters come about alike.
One prompt says too little to begin a cluster with: two short questions of one kind may share no word.

Legend: D hashed features, N clusters, P strangers or other prompts, T tokens.
"""

import io
import math
import zipfile
import zlib
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FORMAT = 1  # of the saved state; another one is refused
DIMS = 4096
POOL = 512  # strangers that are looked at together
POOL_AGE = 4096  # prompts after which a stranger is forgotten: what is rare never becomes a cluster
SMALLEST = 16  # strangers that make a cluster, at least
ALIKE = 0.7  # cosine of two groups' centroids beyond which they are one
FAR = 2.5  # standard deviations below a cluster's usual similarity at which a prompt is a stranger to it
SLOWEST = (
    1 / 1000
)  # how far a prompt moves its cluster's centroid, at least: clusters follow what drifts
HALVED_AT = 20_000  # prompts at which document frequencies are halved: what was usual long ago counts less and less
WEIGHED_EVERY = 32  # prompts between two looks at how rare features are
RESTARTS, ROUNDS = (
    6,
    12,
)  # of k-means over strangers: once in a router's life, some tens of milliseconds
_PRIMES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Ints = NDArray[np.int64]


class ClusterRouter:
    """At most `most` clusters. Not for two threads at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.prompts = 0
        self.sizes: list[
            int
        ] = []  # prompts of each cluster: those that it began with and those assigned since
        self._seen, self._having_D = (
            0,
            np.zeros(DIMS, np.float32),
        )  # prompts, and those that have each feature
        self._rarity_D = np.zeros(DIMS, np.float32)
        self._centroid_ND = np.zeros((0, DIMS), np.float32)  # without rarity, which changes
        self._usual_N2 = np.zeros(
            (0, 2), np.float32
        )  # mean and variance of the similarity of each cluster's prompts
        self._strangers: deque[tuple[int, Halves]] = (
            deque()
        )  # after how many prompts each came, and its features

    def assign(self, prompt_ids: Sequence[int], *, learn: bool = True) -> int | None:
        """The prompt's cluster, which learns from it unless told not to; None: it is like none."""
        feature_D = features(prompt_ids)
        if learn:
            self._count(feature_D)
        cluster, above = self._nearest(feature_D)
        if not learn:
            return cluster
        if cluster is None:
            self._meet(feature_D)
        else:
            self._move(cluster, feature_D, above)
        return cluster

    def _count(self, feature_D: Floats) -> None:
        """Features that every prompt has, those of a chat template first of all, weigh nothing."""
        self.prompts, self._seen = self.prompts + 1, self._seen + 1
        self._having_D += feature_D > 0
        if self._seen >= HALVED_AT:
            self._seen, self._having_D = self._seen // 2, self._having_D / np.float32(2)
        if self.prompts % WEIGHED_EVERY == 0:
            self._weigh()

    def _weigh(self) -> None:
        """The root of the inverse document frequency: on both sides of a product it weighs once."""
        self._rarity_D = np.sqrt(np.log((self._seen + 1) / (self._having_D + 1)).clip(0)).astype(
            np.float32
        )

    def _nearest(self, feature_D: Floats) -> tuple[int | None, float]:
        """The cluster that the prompt is like, and by how much it is more like it than its prompts usually are."""
        if not self.sizes:
            return None, 0.0
        similarity_N = _cosines(
            feature_D[None] * self._rarity_D, self._centroid_ND * self._rarity_D
        )[0]
        cluster = int(similarity_N.argmax())
        mean, variance = self._usual_N2[cluster].tolist()
        above = float(similarity_N[cluster]) - mean
        return (None if above < -FAR * math.sqrt(variance) else cluster), above

    def _move(self, cluster: int, feature_D: Floats, above: float) -> None:
        self.sizes[cluster] += 1
        pace = max(1 / self.sizes[cluster], SLOWEST)
        self._centroid_ND[cluster] += pace * (feature_D - self._centroid_ND[cluster])
        self._usual_N2[cluster] += (
            np.array([above, above**2 - self._usual_N2[cluster, 1]], np.float32) * pace
        )

    # ── strangers ──

    def _meet(self, feature_D: Floats) -> None:
        """Keeps a stranger; once there are many, makes clusters of them."""
        if len(self.sizes) >= self.most:
            return
        while self._strangers and self._strangers[0][0] < self.prompts - POOL_AGE:
            self._strangers.popleft()
        self._strangers.append((self.prompts, feature_D.astype(np.float16)))
        if len(self._strangers) >= POOL:
            self._open(np.array([stranger_D for _, stranger_D in self._strangers], np.float32))
            self._strangers.clear()

    def _open(self, stranger_PD: Floats) -> None:
        self._weigh()
        weighted_PD = stranger_PD * self._rarity_D
        group_P = groups(weighted_PD, self.most - len(self.sizes))
        for group in range(group_P.max() + 1):
            own_PD = stranger_PD[group_P == group]
            if len(own_PD) < SMALLEST:
                continue
            centroid_1D = own_PD.mean(0, keepdims=True)
            similarity_P = _cosines(own_PD * self._rarity_D, centroid_1D * self._rarity_D)
            usual_12 = np.array([[similarity_P.mean(), similarity_P.var()]], np.float32)
            self._centroid_ND = np.concatenate([self._centroid_ND, centroid_1D])
            self._usual_N2 = np.concatenate([self._usual_N2, usual_12])
            self.sizes.append(len(own_PD))

    # ── kept over restarts ──

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez_compressed(
            file,
            numbers=np.array([FORMAT, self.prompts, self._seen, *self.sizes]),
            having_D=self._having_D,
            rarity_D=self._rarity_D,
            centroid_ND=self._centroid_ND,
            usual_N2=self._usual_N2,
            met_P=np.array([at for at, _ in self._strangers], np.int64),
            stranger_PD=np.array([each for _, each in self._strangers], np.float16).reshape(
                -1, DIMS
            ),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, state: bytes, most: int) -> "ClusterRouter":
        """With room for `most` clusters; those that the state has more are kept in it, for their drafts are.

        Raises:
            ValueError: no state, or one of another version.
        """
        router = cls(most)
        try:
            if not zipfile.is_zipfile(io.BytesIO(state)):
                raise zipfile.BadZipFile("no archive")
            with np.load(io.BytesIO(state), allow_pickle=False) as kept:
                version, router.prompts, router._seen, *router.sizes = kept["numbers"].tolist()
                if version != FORMAT:
                    raise ValueError(
                        f"a router's state of version {version}, where {FORMAT} is read"
                    )
                router._having_D, router._rarity_D = kept["having_D"], kept["rarity_D"]
                router._centroid_ND, router._usual_N2 = kept["centroid_ND"], kept["usual_N2"]
                router._strangers.extend(
                    zip(kept["met_P"].tolist(), kept["stranger_PD"], strict=True)
                )
        except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"not the state of a router: {error}") from error
        return router


def features(prompt_ids: Sequence[int]) -> Floats:
    """Hashed tokens and pairs of neighbours, their counts dampened, of length one [D]."""
    id_T = np.asarray(prompt_ids, np.uint64)
    hash_T = np.concatenate([id_T * _PRIMES[0], id_T[:-1] * _PRIMES[1] + id_T[1:] * _PRIMES[2]])
    hash_T ^= hash_T >> np.uint64(29)
    count_D = np.bincount((hash_T % np.uint64(DIMS)).astype(np.int64), minlength=DIMS)
    unit_D: Floats = _unit(np.log1p(count_D.astype(np.float32))[None])[0]
    return unit_D


def groups(prompt_PD: Floats, most: int) -> Ints:
    """The group of each prompt, `most` at most: spherical k-means, the best of a few; groups that are alike are one."""
    unit_PD = _unit(prompt_PD)
    tries = [_k_means(unit_PD, most, np.random.default_rng(seed)) for seed in range(RESTARTS)]
    _, group_P, centroid_ND = max(tries, key=lambda found: found[0])
    alike_NN = centroid_ND @ centroid_ND.T > ALIKE
    first_N = alike_NN.argmax(
        1
    )  # the first group that each is like: itself, where there is none before
    merged_P: Ints = np.unique(first_N[group_P], return_inverse=True)[1]
    return merged_P


def _k_means(unit_PD: Floats, most: int, rng: np.random.Generator) -> tuple[float, Ints, Floats]:
    """Its quality, the group of each prompt, and the centroids, begun as k-means++ does."""
    centroid_ND = unit_PD[rng.integers(len(unit_PD))][None]
    while len(centroid_ND) < most:
        distance_P = np.maximum(0, 1 - (unit_PD @ centroid_ND.T).max(1)).astype(np.float64) + 1e-9
        chosen = rng.choice(len(unit_PD), p=distance_P / distance_P.sum())
        centroid_ND = np.concatenate([centroid_ND, unit_PD[chosen][None]])
    for _ in range(ROUNDS):
        group_P = (unit_PD @ centroid_ND.T).argmax(1)
        member_NP = (group_P == np.arange(most)[:, None]).astype(np.float32)
        centroid_ND = _unit(member_NP @ unit_PD)
    similarity_PN = unit_PD @ centroid_ND.T
    return float(similarity_PN.max(1).sum()), similarity_PN.argmax(1), centroid_ND


def _unit(array_PD: Floats) -> Floats:
    unit_PD: Floats = array_PD / np.maximum(np.linalg.norm(array_PD, axis=1, keepdims=True), 1e-9)
    return unit_PD


def _cosines(prompt_PD: Floats, centroid_ND: Floats) -> Floats:
    """[P, N]"""
    return _unit(prompt_PD) @ _unit(centroid_ND).T
