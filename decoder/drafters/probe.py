"""Measures the acceptance of drafts that are idle because drafting does not pay.

Plain steps tell nothing about the draft. Now and then a probe compares it with what plain steps
emitted, so that drafting resumes when it would pay again.

Legend: T tokens, V vocabulary.
"""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from decoder.drafters.caches import DraftCaches
from decoder.drafters.faults import DraftFaults
from decoder.models.ragged import integers, ragged
from decoder.policy.gamma import GammaController
from decoder.policy.token_acceptance import Evidence, draft_token
from decoder.rollout.live import LiveDraft
from decoder.sequence.sequence import LiveSequence
from decoder.verification.sampling import Sampling, probabilities

MIN_TOKENS = 8  # that plain steps have emitted before a sequence's draft is probed on them


class IdleProbe:
    """Works on the batch's own list of sequences."""

    def __init__(
        self,
        seqs: Sequence[LiveSequence],
        controller: GammaController,
        caches: DraftCaches,
        faults: DraftFaults,
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        self._seqs, self._controller = seqs, controller
        self._caches, self._faults = caches, faults
        self._vocab_size, self._device = vocab_size, device

    def run(self, members: Sequence[int]) -> None:
        """Probes the draft of one of these sequences, or encodes a part of its context first.

        Chooses the sequence with the largest share of tokens to compare among those to encode.
        """
        comparable: dict[int, int] = {}
        for i in members:
            seq = self._seqs[i]
            tokens = min(seq.draft_uncached - 1, seq.emitted)
            if tokens >= MIN_TOKENS:
                comparable[i] = tokens
        if not comparable:
            return
        started = time.perf_counter()
        slot = max(comparable, key=lambda i: comparable[i] / self._seqs[i].draft_uncached)
        seq = self._seqs[slot]
        if seq.draft_uncached > self._caches.budget:
            self._caches.catch_up([slot])
        else:
            measure = partial(self._measure, seq, slot, comparable[slot], seq.draft)
            self._faults.contain(seq.draft, measure)
        self._controller.charge_probe(time.perf_counter() - started)

    def _measure(self, seq: LiveSequence, slot: int, count: int, draft: LiveDraft) -> None:
        """Records the draft's acceptance on the last `count` tokens.

        Σ_x min(p(x), q(x)) is the mean of min(1, q(x) / p(x)) over tokens x drawn from p, here
        over what plain steps emitted.
        """
        q = self._emitted_q(seq, slot, count, draft)
        p = np.array(seq.emitted_p[-count:])
        drawn = ~np.isnan(p)  # other tokens were accepted candidates
        rates = np.minimum(1, q / p)[drawn]
        evidence = Evidence(seq.ngram_lookup.greedy, draft_token(), None)
        for rate in rates.tolist():
            draft.token_acceptance.record(evidence, rate)
        overlap, compared = float(rates.sum()), len(rates)
        seq.stats.add_probe(overlap, compared)
        seq.acceptance.add(overlap, compared)
        seq.set_draft_cached(len(seq.tokens) - 1)

    def _emitted_q(
        self, seq: LiveSequence, slot: int, count: int, draft: LiveDraft
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """The draft's probabilities of the last `count` tokens, [T]."""
        start = seq.draft_cached
        unseen = seq.tokens[start:-1]
        ids_1T, starts_1 = ragged([unseen], self._device), integers([start], self._device)
        upto = start + len(unseen)
        logits_1TV = draft.model.forward(slice(slot, slot + 1), ids_1T, starts_1, upto)
        probs_1TV = probabilities(logits_1TV[:, -count:], self._sampling(seq))
        emitted_1T1: Tensor = integers(seq.tokens[-count:], self._device)[None, :, None]
        found: np.ndarray[tuple[int], np.dtype[np.float64]]
        found = probs_1TV.gather(-1, emitted_1T1).flatten().cpu().numpy()
        return found

    def _sampling(self, seq: LiveSequence) -> Sampling:
        query = seq.query
        return Sampling.of(
            [query.temperature], [query.top_k], [query.top_p], self._vocab_size, self._device
        )
