"""Prompts from nothing, grown toward what two students disagree on: Dual Student (arXiv 2309.10058).

Where two students that learn from the same target disagree, one of them is wrong about it; that needs no query to the
target. The paper trains a generator of images by the students' gradients. Tokens have none, so prompts are bred: each
family of prompts has children, sampled from both students, and the one they disagree on most lives on.

Legend: F families, C children of each, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.divergences import jensen_shannon


@dataclass(frozen=True, slots=True)
class Growth:
    """How prompts are bred."""

    children: int = 4  # of every family, at every piece; 1: nothing is selected
    pieces: int = 3
    piece_tokens: int = 8


@torch.no_grad()
def disagreement(students: Sequence[nn.Module], ids_RT: Tensor, first: int) -> Tensor:
    """Mean Jensen–Shannon divergence of the two students' predictions of the tokens from `first` on, per row [R]."""
    one, other = (
        student(input_ids=ids_RT[:, :-1], use_cache=False).logits[:, first - 1 :].float().log_softmax(-1)
        for student in students
    )
    return jensen_shannon(one.exp(), other, beta=0.5).mean(-1)


@torch.no_grad()
def continued(student: nn.Module, ids_RT: Tensor, tokens: int, never: Tensor, generator: torch.Generator) -> Tensor:
    """Rows with `tokens` more, sampled from the student, none of them one of `never`."""
    new_RT, cache = ids_RT, DynamicCache()
    for _ in range(tokens):
        logits_RV = student(input_ids=new_RT, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        p_RV = logits_RV.index_fill(-1, never, float("-inf")).softmax(-1)
        new_RT = torch.multinomial(p_RV, 1, generator=generator)
        ids_RT = torch.cat([ids_RT, new_RT], -1)
    return ids_RT


def grown(
    students: Sequence[nn.Module], head: Sequence[int], families: int, growth: Growth, never: Sequence[int], seed: int
) -> Tensor:
    """One prompt of every family, `head` included [F, T]. The same seed and students grow the same prompts."""
    generator = torch.Generator().manual_seed(seed)
    never_N = torch.tensor(list(never), dtype=torch.long)
    ids_FT = torch.tensor(list(head), dtype=torch.long).repeat(families, 1)
    for _ in range(growth.pieces):
        parents_RT = ids_FT.repeat_interleave(growth.children, 0)
        turn_R = torch.arange(len(parents_RT)) % 2  # children are dealt to the students in turn
        ids_RT = parents_RT.new_empty(len(parents_RT), parents_RT.shape[1] + growth.piece_tokens)
        for i, student in enumerate(students):
            own_R = turn_R == i
            ids_RT[own_R] = continued(student, parents_RT[own_R], growth.piece_tokens, never_N, generator)
        ids_FT = ids_RT if growth.children == 1 else _best(students, ids_RT, len(head), growth.children)
    return ids_FT


def _best(students: Sequence[nn.Module], ids_RT: Tensor, first: int, children: int) -> Tensor:
    """The child of every family that the students disagree on most [F, T]."""
    score_FC = disagreement(students, ids_RT, first).view(-1, children)
    family_F = torch.arange(len(score_FC))
    return ids_RT.view(len(score_FC), children, -1)[family_F, score_FC.argmax(-1)]
