"""Random prompts, selected by the disagreement of two students: Dual Student (2309.10058).

Where two students of one target disagree, one of them is wrong, and no query to the target is
needed to see it. The paper trains a generator of images by the students' gradients. Tokens have no
gradient, so prompts are built by selection: each family has several children, and the child whose
answer the students disagree on most survives.

Legend: F families · R children of all families · T tokens · V vocabulary · A allowed ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trainer.divergences.jensen_shannon import jensen_shannon


@dataclass(frozen=True, slots=True)
class Growth:
    """How prompts are built, piece by piece."""

    children: int = 4  # of a family, for every piece; 1: no selection
    pieces: int = 3
    piece_tokens: int = 8
    answer_tokens: int = 8  # on which the students are compared


@dataclass(frozen=True, slots=True)
class Frame:
    """The tokens around a query."""

    head: list[int]
    tail: list[int]
    never: list[int]  # ids that no query contains


@torch.no_grad()
def disagreement(students: Sequence[nn.Module], ids_RT: Tensor, first: int) -> Tensor:
    """Mean Jensen–Shannon divergence of two students on the tokens from `first` on [R]."""
    one, other = (_logp(student, ids_RT, first) for student in students)
    return jensen_shannon(one.exp(), other, beta=0.5).mean(-1)


def _logp(student: nn.Module, ids_RT: Tensor, first: int) -> Tensor:
    logits_RTV: Tensor = student(input_ids=ids_RT[:, :-1], use_cache=False).logits
    return logits_RTV[:, first - 1 :].float().log_softmax(-1)


@torch.no_grad()
def continued(
    student: nn.Module,
    ids_RT: Tensor,
    tokens: int,
    never: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Sequences with `tokens` more, sampled from the student without the ids in `never`."""
    new_RT, cache = ids_RT, DynamicCache()
    for _ in range(tokens):
        out = student(input_ids=new_RT, cache=cache, use_cache=True, logits_to_keep=1)
        logits_RV = out.logits[:, -1].float()
        p_RV = logits_RV.index_fill(-1, never, float("-inf")).softmax(-1)
        new_RT = torch.multinomial(p_RV, 1, generator=generator)
        ids_RT = torch.cat([ids_RT, new_RT], -1)
    return ids_RT


def selected(
    students: Sequence[nn.Module], frame: Frame, families: int, growth: Growth, seed: int
) -> Tensor:
    """One query of every family, with the frame's head [F, T]. Deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    never = torch.tensor(frame.never, dtype=torch.long)
    vocab_size: int = students[0].config.vocab_size  # type: ignore[union-attr, assignment]
    allowed_A = torch.tensor(sorted(set(range(vocab_size)) - set(frame.never)))
    tail = torch.tensor(frame.tail, dtype=torch.long)
    ids_FT = torch.tensor(frame.head, dtype=torch.long).repeat(families, 1)
    for _ in range(growth.pieces):
        ids_RT = ids_FT.repeat_interleave(growth.children, 0)
        shape = len(ids_RT), growth.piece_tokens
        pick_RT = torch.randint(len(allowed_A), shape, generator=generator)
        ids_RT = torch.cat([ids_RT, allowed_A[pick_RT]], -1)
        if growth.children == 1:
            ids_FT = ids_RT
            continue
        asked_RT = torch.cat([ids_RT, tail.repeat(len(ids_RT), 1)], -1)
        answered_RT = _in_turn(students, asked_RT, growth.answer_tokens, never, generator)
        score_R = disagreement(students, answered_RT, first=asked_RT.shape[1])
        best_F = score_R.view(families, growth.children).argmax(-1)
        ids_FT = ids_RT[torch.arange(families) * growth.children + best_F]
    return ids_FT


def _in_turn(
    students: Sequence[nn.Module],
    ids_RT: Tensor,
    tokens: int,
    never: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Sequences with `tokens` more; each student continues its share of them."""
    turn_R = torch.arange(len(ids_RT)) % len(students)
    longer_RT = ids_RT.new_empty(len(ids_RT), ids_RT.shape[1] + tokens)
    for i, student in enumerate(students):
        own = turn_R == i
        longer_RT[own] = continued(student, ids_RT[own], tokens, never, generator)
    return longer_RT
