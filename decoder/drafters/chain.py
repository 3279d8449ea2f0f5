"""Chain drafting: the draft model samples γ tokens, one after another.

Legend: B rows, T tokens not yet in the draft's cache (1 or 2 as a rule), G drafted positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoder.models import LanguageModel
from decoder.sampling import Sampling, at_least_float32, most_likely, probabilities, sample
from decoder.slots import Rows


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens with the distributions they were drawn from. Rows that drafted fewer are padded."""

    tokens_BG: Tensor
    probs_BGV: Tensor  # after temperature, top-k and top-p: what verification needs; G = 0 where all rows are greedy
    logits_B1V: list[Tensor]  # by position, as the draft gave them: what signals need
    drafted_B: Tensor

    @classmethod
    def empty(cls, rows: int, gamma: int, vocab_size: int, device: torch.device | str, greedy: bool) -> "Proposal":
        """Room for `gamma` tokens a row, with none drafted."""
        return cls(
            torch.zeros((rows, gamma), dtype=torch.long, device=device),
            torch.zeros((rows, 0 if greedy else gamma, vocab_size), device=device),
            [torch.zeros((rows, 1, vocab_size), device=device) for _ in range(gamma)],
            torch.zeros(rows, dtype=torch.long, device=device),
        )

    def put(self, members: list[int], part: "Proposal") -> None:
        """Fills in what one drafter proposed for some of the rows."""
        gamma = part.tokens_BG.shape[1]
        self.tokens_BG[members, :gamma] = part.tokens_BG
        for mine, theirs in zip(self.logits_B1V, part.logits_B1V, strict=False):  # a part may draft fewer
            mine[members] = theirs.to(mine.dtype)
        if part.probs_BGV.shape[1]:
            self.probs_BGV[members, :gamma] = part.probs_BGV.to(self.probs_BGV.dtype)
        self.drafted_B[members] = part.drafted_B


def propose_chain(
    model: LanguageModel,
    rows: Rows,
    unseen_BT: Tensor,
    unseen_B: Tensor,
    starts_B: Tensor,
    upto: int,
    drafted_B: Tensor,
    gamma: int,
    sampling: Sampling,
    uniform_BG: Tensor,
) -> Proposal:
    """Feeds each row what its cache lacks (`unseen_BT`, `unseen_B` ≥ 1 of them real), then samples `gamma` tokens.

    `starts_B` are the cached lengths, `upto` the longest context after the first feed. Rows with `drafted_B` < `gamma`
    draft along; what they draft beyond is ignored by verification.
    """
    logits_B1V = model.forward(rows, unseen_BT, starts_B, upto)
    if unseen_BT.shape[1] > 1:
        last_B11 = (unseen_B - 1)[:, None, None].expand(-1, 1, logits_B1V.shape[-1])
        logits_B1V = logits_B1V.gather(1, last_B11)
    starts_B = starts_B + unseen_B
    logits_B1V = at_least_float32(logits_B1V)
    drawn, shape = not sampling.all_greedy, (len(unseen_B), gamma, logits_B1V.shape[-1])
    probs_BGV = logits_B1V.new_empty(shape if drawn else (shape[0], 0, shape[2]))
    tokens_BG, logits = torch.empty(shape[:2], dtype=torch.long, device=logits_B1V.device), []
    for g in range(gamma):
        if drawn:
            probs_B1V = probabilities(logits_B1V, sampling, probs_BGV[:, g : g + 1])
            token_B1 = sample(probs_B1V, uniform_BG[:, g : g + 1])
        else:
            token_B1 = most_likely(logits_B1V)
        tokens_BG[:, g : g + 1] = token_B1
        logits.append(logits_B1V)
        if g + 1 < gamma:
            upto += 1
            logits_B1V = at_least_float32(model.forward(rows, token_B1, starts_B, upto))
            starts_B = starts_B + 1
    return Proposal(tokens_BG, probs_BGV, logits, drafted_B)
