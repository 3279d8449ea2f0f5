"""The result of verifying a batch, on the device and on the host.

Legend: B sequences, N candidates of a sequence at most.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from decoder.device.transfer import to_host


@dataclass(frozen=True, slots=True)
class Verification:
    """What a step emits: a path of accepted candidates, and the target's own token after it."""

    accepted_B: Tensor  # number of accepted candidates
    path_BN: Tensor  # their indices, in order; padded
    next_B: Tensor  # the token emitted after them
    next_p_B: Tensor  # its probability under the target
    # Σ over compared nodes of Σ_x min(p(x), q(x)), with the q of the node's first candidate.
    overlap_B: Tensor
    compared_B: Tensor  # nodes on the path whose first candidate was drawn from a draft

    @classmethod
    def of_chain(
        cls,
        tokens_BG: Tensor,
        accepted_B: Tensor,
        next_B: Tensor,
        next_p_B: Tensor,
        overlap_B: Tensor,
        compared_B: Tensor,
    ) -> "Verification":
        """The accepted path of a chain is a prefix of it."""
        path_BN = torch.arange(tokens_BG.shape[1], device=tokens_BG.device).expand_as(tokens_BG)
        return cls(accepted_B, path_BN, next_B, next_p_B, overlap_B, compared_B)

    @classmethod
    def cat(cls, parts: "list[tuple[list[int], Verification]]") -> "Verification":
        """Combines the results of disjoint groups of sequences, given with their indices."""
        order = [b for members, _ in parts for b in members]
        order_B = torch.tensor(order).argsort().to(parts[0][1].accepted_B.device)
        columns = [[getattr(part, field.name) for _, part in parts] for field in fields(cls)]
        return cls(*(torch.cat(column)[order_B] for column in columns))

    def read(self, tokens_BN: Tensor) -> "list[VerifiedSequence]":
        """Copies everything that the host needs in the step's one transfer, by sequence."""
        columns = to_host(*(getattr(self, field.name) for field in fields(self)), tokens_BN)
        return list(map(VerifiedSequence._make, zip(*columns, strict=True)))


class VerifiedSequence(NamedTuple):
    """The result for one sequence, on the host."""

    accepted: int
    path: list[int]
    next: int
    next_p: float
    overlap: float
    compared: int
    tokens: list[int]  # all candidates

    @property
    def emitted(self) -> list[int]:
        return [*(self.tokens[n] for n in self.path[: self.accepted]), self.next]
