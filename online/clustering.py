"""Clusters of prompts, learnt while prompts arrive: online spherical k-means on hashed tokens.

No I/O, no clock: the same prompts in the same order give the same clusters.

A prompt that is similar to no cluster is an outlier and gets no cluster. Outliers are pooled. Once
the pool is full, groups among them become clusters, as long as there is room. So first and later
clusters begin in the same way. A single prompt begins no cluster: two short questions of the same
kind may share no word.

Legend: F hashed features, C clusters, X prompts.
"""

import io
import math
import zipfile
import zlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from online.prompt_features import DIMS, Floats, Halves, cosines, features, groups

FORMAT = 1  # version of the saved state; others are refused
POOL = 512  # outliers that are grouped together
POOL_AGE = 4096  # prompts after which an outlier is dropped: rare kinds get no cluster
SMALLEST = 16  # minimum of outliers that make a cluster
FAR = 2.5  # standard deviations below a cluster's usual similarity at which a prompt is an outlier
SLOWEST = 1 / 1000  # minimum step of a centroid towards a prompt: clusters follow a drift
HALVED_AT = 20_000  # prompts after which document frequencies are halved: old ones fade
WEIGHED_EVERY = 32  # prompts between two updates of the features' weights


class ClusterRouter:
    """Assigns prompts to at most `max_clusters` clusters. Not thread-safe."""

    def __init__(self, max_clusters: int) -> None:
        self.max_clusters = max_clusters
        self.prompts = 0
        self.sizes: list[int] = []  # prompts of each cluster: its first ones and those assigned
        self._counted = 0  # prompts in the document frequencies, halved now and then
        self._frequency_F = np.zeros(DIMS, np.float32)  # prompts that have each feature
        self._weight_F = np.zeros(DIMS, np.float32)
        self._centroid_CF = np.zeros((0, DIMS), np.float32)  # unweighted, since weights change
        self._usual_C2 = np.zeros((0, 2), np.float32)  # mean and variance of similarities
        self._outliers: deque[tuple[int, Halves]] = deque()  # prompt number and features

    def assign(self, prompt_ids: Sequence[int], *, learn: bool = True) -> int | None:
        """The prompt's cluster, or None for an outlier. `learn`: update the clusters."""
        feature_F = features(prompt_ids)
        if learn:
            self._count(feature_F)
        cluster, deviation = self._nearest(feature_F)
        if not learn:
            return cluster
        if cluster is None:
            self._pool(feature_F)
        else:
            self._move(cluster, feature_F, deviation)
        return cluster

    # ── weights of features ──

    def _count(self, feature_F: Floats) -> None:
        """Updates document frequencies. Features of every prompt (a template) weigh nothing."""
        self.prompts += 1
        self._counted += 1
        self._frequency_F += feature_F > 0
        if self._counted >= HALVED_AT:
            self._counted //= 2
            self._frequency_F = self._frequency_F / np.float32(2)
        if self.prompts % WEIGHED_EVERY == 0:
            self._weigh()

    def _weigh(self) -> None:
        """The root of the inverse document frequency: both factors of a cosine carry it."""
        inverse_F = np.log((self._counted + 1) / (self._frequency_F + 1)).clip(0)
        self._weight_F = np.sqrt(inverse_F).astype(np.float32)

    # ── clusters ──

    def _nearest(self, feature_F: Floats) -> tuple[int | None, float]:
        """The most similar cluster, and its similarity minus that cluster's usual one."""
        if not self.sizes:
            return None, 0.0
        weighted_CF = self._centroid_CF * self._weight_F
        similarity_C = cosines(feature_F[None] * self._weight_F, weighted_CF)[0]
        cluster = int(similarity_C.argmax())
        mean, variance = self._usual_C2[cluster].tolist()
        deviation = float(similarity_C[cluster]) - mean
        if deviation < -FAR * math.sqrt(variance):
            return None, deviation
        return cluster, deviation

    def _move(self, cluster: int, feature_F: Floats, deviation: float) -> None:
        """Moves a cluster towards its new prompt."""
        self.sizes[cluster] += 1
        pace = max(1 / self.sizes[cluster], SLOWEST)
        self._centroid_CF[cluster] += pace * (feature_F - self._centroid_CF[cluster])
        variance_step = deviation**2 - self._usual_C2[cluster, 1]
        self._usual_C2[cluster] += np.array([deviation, variance_step], np.float32) * pace

    # ── outliers ──

    def _pool(self, feature_F: Floats) -> None:
        """Keeps an outlier. A full pool becomes clusters."""
        if len(self.sizes) >= self.max_clusters:
            return
        while self._outliers and self._outliers[0][0] < self.prompts - POOL_AGE:
            self._outliers.popleft()
        self._outliers.append((self.prompts, feature_F.astype(np.float16)))
        if len(self._outliers) >= POOL:
            self._begin_clusters(np.array([each for _, each in self._outliers], np.float32))
            self._outliers.clear()

    def _begin_clusters(self, outlier_XF: Floats) -> None:
        self._weigh()
        group_X = groups(outlier_XF * self._weight_F, self.max_clusters - len(self.sizes))
        for group in range(group_X.max() + 1):
            own_XF = outlier_XF[group_X == group]
            if len(own_XF) >= SMALLEST:
                self._begin_cluster(own_XF)

    def _begin_cluster(self, own_XF: Floats) -> None:
        centroid_1F = own_XF.mean(0, keepdims=True)
        similarity_X = cosines(own_XF * self._weight_F, centroid_1F * self._weight_F)
        usual_12 = np.array([[similarity_X.mean(), similarity_X.var()]], np.float32)
        self._centroid_CF = np.concatenate([self._centroid_CF, centroid_1F])
        self._usual_C2 = np.concatenate([self._usual_C2, usual_12])
        self.sizes.append(len(own_XF))

    # ── saved state: the names are those of format 1 ──

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        outlier_XF = np.array([each for _, each in self._outliers], np.float16)
        np.savez_compressed(
            file,
            numbers=np.array([FORMAT, self.prompts, self._counted, *self.sizes]),
            having_D=self._frequency_F,
            rarity_D=self._weight_F,
            centroid_ND=self._centroid_CF,
            usual_N2=self._usual_C2,
            met_P=np.array([number for number, _ in self._outliers], np.int64),
            stranger_PD=outlier_XF.reshape(-1, DIMS),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, state: bytes, max_clusters: int) -> "ClusterRouter":
        """Restores a router. Clusters beyond `max_clusters` stay in it, for their drafts exist.

        Raises:
            ValueError: not a saved state, or one of another format.
        """
        try:
            return cls._restored(state, max_clusters)
        except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"not the state of a router: {error}") from error

    @classmethod
    def _restored(cls, state: bytes, max_clusters: int) -> "ClusterRouter":
        router = cls(max_clusters)
        if not zipfile.is_zipfile(io.BytesIO(state)):
            raise zipfile.BadZipFile("no archive")
        with np.load(io.BytesIO(state), allow_pickle=False) as saved:
            version, router.prompts, router._counted, *router.sizes = saved["numbers"].tolist()
            if version != FORMAT:
                raise ValueError(f"the state of a router in version {version}, not {FORMAT}")
            router._frequency_F = saved["having_D"]
            router._weight_F = saved["rarity_D"]
            router._centroid_CF = saved["centroid_ND"]
            router._usual_C2 = saved["usual_N2"]
            numbers = saved["met_P"].tolist()
            router._outliers.extend(zip(numbers, saved["stranger_PD"], strict=True))
        return router
