"""The draft model's part of a cascade: several tokens of several chains from one forward.

Legend: B sequences, A those of them that the model drafts for next, T tokens of a forward,
M positions of a forward that a token is drawn from, N candidates of a sequence at most, Q drawn
tokens of a sequence at most, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decoder.drafters.chain import Chain
from decoder.models.base import LanguageModel
from decoder.models.kv_cache import Slots
from decoder.models.ragged import integers, ragged
from decoder.verification.sampling import (
    Sampling,
    at_least_float32,
    most_likely,
    probabilities,
    sample,
)


class ModelDraws:
    """What the draft model has drawn for a batch's chains so far."""

    def __init__(
        self,
        model: LanguageModel,
        slots: Slots,
        chains: Sequence[Chain],
        sampling: Sampling,
        uniform_BN: Tensor,
        masks: int,
    ) -> None:
        self._model, self._slots, self._chains = model, slots, chains
        self._sampling, self._uniform_BN, self._masks = sampling, uniform_BN, masks
        self._device = uniform_BN.device
        self._forwards = 0
        self._logits: list[list[Tensor]] = [[] for _ in chains]  # pieces of [M, V]
        self._probs: list[list[Tensor]] = [[] for _ in chains]

    def ask(self, asked: list[int], tokens: int) -> None:
        """One forward: the model draws up to so many tokens for each of the chains `asked`."""
        ahead: list[list[int]] = [[] for _ in self._chains]
        for b in asked:
            ahead[b] = self._ahead(self._chains[b], tokens)
        logits = self._forward(asked, ahead)
        logits_AMV = _padded(logits)
        tokens_AM, probs_AM, q_AMV = self._draw(asked, logits_AMV)
        for a, b in enumerate(asked):
            chain = self._chains[b]
            count = 1 + (len(ahead[b]) if self._masks else _agreement(tokens_AM[a], ahead[b]))
            count = chain.add_drawn(tokens_AM[a][:count], probs_AM[a][:count], self._masks > 0)
            self._logits[b].append(logits_AMV[a, :count])
            self._probs[b].append(q_AMV[a, :count])
            if not self._masks:
                chain.cached += count - 1

    def result(self) -> tuple[list[Tensor], Tensor, int]:
        """The drawn tokens' logits, [B, 1, V] each, probabilities, [B, Q, V], and the forwards."""
        if not self._forwards:
            shape = len(self._chains), 0, self._model.vocab_size
            return [], torch.empty(shape, device=self._device), 0
        logits_BQV = _padded(self._logits)
        probs_BQV = logits_BQV[:, :0] if self._sampling.all_greedy else _padded(self._probs)
        logits = [logits_BQV[:, q : q + 1] for q in range(logits_BQV.shape[1])]
        return logits, probs_BQV, self._forwards

    def _ahead(self, chain: Chain, tokens: int) -> list[int]:
        """What is fed behind the chain: masks, or guesses for the model to check."""
        if not self._masks:
            return chain.guesses_ahead()
        count = min(tokens, chain.model_budget, chain.limit - len(chain.tokens))
        return [self._model.mask_id] * (count - 1)

    def _forward(self, asked: list[int], ahead: list[list[int]]) -> list[list[Tensor]]:
        """Logits behind each asked chain and behind what is fed ahead of it, [M, V] each."""
        chains = self._chains
        unseen = [[] if c.draft_lags else [*c.context, *c.tokens][c.cached :] for c in chains]
        fed = [own + more for own, more in zip(unseen, ahead, strict=True)]
        cached = [chain.cached for chain in chains]
        upto = max(start + len(own) for start, own in zip(cached, fed, strict=True))
        ids_BT, starts_B = ragged(fed, self._device), integers(cached, self._device)
        logits_BTV = self._model.forward(self._slots, ids_BT, starts_B, upto)
        logits_BTV = at_least_float32(logits_BTV)
        self._forwards += 1
        for chain, own in zip(chains, unseen, strict=True):
            chain.cached += len(own)
        return [[logits_BTV[b, len(unseen[b]) - 1 : len(fed[b])]] for b in asked]

    def _draw(
        self, asked: list[int], logits_AMV: Tensor
    ) -> tuple[list[list[int]], list[list[float]], Tensor]:
        """A token from every position, its probability, and the distributions.

        Each position draws as if the tokens before it were the chain's, with that place's uniform.
        """
        everyone = len(asked) == len(self._chains)
        sampling = self._sampling if everyone else self._sampling.select(asked)
        uniform_AN = self._uniform_BN if everyone else self._uniform_BN[asked]
        if sampling.all_greedy:
            probs_AMV, tokens_AM = logits_AMV.softmax(-1), most_likely(logits_AMV)
        else:
            probs_AMV = probabilities(logits_AMV, sampling)
            place_M = torch.arange(logits_AMV.shape[1], device=self._device)
            length_A = integers([len(self._chains[b].tokens) for b in asked], self._device)
            # Padding has no uniforms.
            place_AM = (length_A[:, None] + place_M).clamp_(max=uniform_AN.shape[1] - 1)
            tokens_AM = sample(probs_AMV, uniform_AN.gather(1, place_AM))
        drawn_p_AM = probs_AMV.gather(-1, tokens_AM[..., None])[..., 0]
        return tokens_AM.tolist(), drawn_p_AM.tolist(), probs_AMV


def _padded(parts: Sequence[list[Tensor]]) -> Tensor:
    """Each sequence's pieces of [M, V] behind each other, padded: [B, Q, V]."""
    joined = [torch.cat(part) if len(part) > 1 else part[0] if part else None for part in parts]
    real = [each for each in joined if each is not None]
    if len(real) == len(parts) == 1:
        return real[0][None]
    shape = len(parts), max(map(len, real)), real[0].shape[-1]
    padded_BQV = real[0].new_zeros(shape)
    for b, own_QV in enumerate(joined):
        if own_QV is not None:
            padded_BQV[b, : len(own_QV)] = own_QV
    return padded_BQV


def _agreement(drawn: Sequence[int], guesses: Sequence[int]) -> int:
    """How many of the first guesses were drawn."""
    agreed = 0
    while agreed < len(guesses) and drawn[agreed] == guesses[agreed]:
        agreed += 1
    return agreed
