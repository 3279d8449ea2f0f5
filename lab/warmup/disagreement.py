"""Prompts from nothing, grown toward what two students disagree on: Dual Student (arXiv 2309.10058).

Where two students of the same target disagree, one of them is wrong about it; to see that takes no query to the target.
The paper trains a generator of images by the students' gradients. Tokens have none, so prompts are bred: each family of
prompts has children, and the one whose answer the students disagree on most lives on.

Legend: F families, R rows (families by children), T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.divergences.jensen_shannon import jensen_shannon


@dataclass(frozen=True, slots=True)
class Growth:
    """How prompts are bred."""

    children: int = 4  # of every family, at every piece; 1: nothing is selected
    pieces: int = 3
    piece_tokens: int = 8
    answer_tokens: int = 8  # that the students are compared on
    sampled: bool = False  # what children are made of: samples of the students, or any tokens


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a query."""

    head: list[int]
    tail: list[int]
    never: list[int]  # ids that a query has none of


@torch.no_grad()
def disagreement(students: Sequence[nn.Module], ids_RT: Tensor, first: int) -> Tensor:
    """Mean Jensen–Shannon divergence of the two students' predictions of the tokens from `first` on, per row [R]."""
    one, other = (
        student(input_ids=ids_RT[:, :-1], use_cache=False)
        .logits[:, first - 1 :]
        .float()
        .log_softmax(-1)
        for student in students
    )
    return jensen_shannon(one.exp(), other, beta=0.5).mean(-1)


@torch.no_grad()
def continued(
    student: nn.Module, ids_RT: Tensor, tokens: int, never: Tensor, generator: torch.Generator
) -> Tensor:
    """Rows with `tokens` more, sampled from the student, none of them one of `never`."""
    new_RT, cache = ids_RT, DynamicCache()
    for _ in range(tokens):
        logits_RV = (
            student(input_ids=new_RT, cache=cache, use_cache=True, logits_to_keep=1)
            .logits[:, -1]
            .float()
        )
        p_RV = logits_RV.index_fill(-1, never, float("-inf")).softmax(-1)
        new_RT = torch.multinomial(p_RV, 1, generator=generator)
        ids_RT = torch.cat([ids_RT, new_RT], -1)
    return ids_RT


def grown(
    students: Sequence[nn.Module],
    frame: Frame,
    families: int,
    growth: Growth,
    vocab_size: int,
    seed: int,
) -> Tensor:
    """One query of every family, from the head on [F, T]. The same seed and students grow the same ones."""
    generator = torch.Generator().manual_seed(seed)
    never_N = torch.tensor(frame.never, dtype=torch.long)
    allowed_N = torch.tensor(sorted(set(range(vocab_size)) - set(frame.never)))
    ids_FT = torch.tensor(frame.head, dtype=torch.long).repeat(families, 1)
    for _ in range(growth.pieces):
        ids_RT = ids_FT.repeat_interleave(growth.children, 0)
        if growth.sampled:
            ids_RT = _dealt(students, ids_RT, growth.piece_tokens, never_N, generator)
        else:
            pick_RT = torch.randint(
                len(allowed_N), (len(ids_RT), growth.piece_tokens), generator=generator
            )
            ids_RT = torch.cat([ids_RT, allowed_N[pick_RT]], -1)
        if growth.children == 1:
            ids_FT = ids_RT
            continue
        asked_RT = torch.cat(
            [ids_RT, torch.tensor(frame.tail, dtype=torch.long).repeat(len(ids_RT), 1)], -1
        )
        answered_RT = _dealt(students, asked_RT, growth.answer_tokens, never_N, generator)
        score_R = disagreement(students, answered_RT, first=asked_RT.shape[1])
        best_F = score_R.view(families, growth.children).argmax(-1)
        ids_FT = ids_RT[torch.arange(families) * growth.children + best_F]
    return ids_FT


def _dealt(
    students: Sequence[nn.Module],
    ids_RT: Tensor,
    tokens: int,
    never_N: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Rows with `tokens` more, sampled from the students in turn."""
    turn_R = torch.arange(len(ids_RT)) % len(students)
    longer_RT = ids_RT.new_empty(len(ids_RT), ids_RT.shape[1] + tokens)
    for i, student in enumerate(students):
        longer_RT[turn_R == i] = continued(student, ids_RT[turn_R == i], tokens, never_N, generator)
    return longer_RT
