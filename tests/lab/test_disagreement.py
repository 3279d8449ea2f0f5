"""Prompts that are built from random tokens."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lab.warmup.disagreement import Frame, Growth, continued, disagreement, selected
from tests.tiny import VOCABULARY, TinyPair

FRAME = Frame(head=[1], tail=[2], never=[0, 1, 2, 3])


def students(pair: TinyPair) -> list[nn.Module]:
    return [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (pair.draft, pair.target)
    ]


def test_the_same_seed_gives_the_same_prompts(pair: TinyPair) -> None:
    """Another seed gives other prompts."""
    growth = Growth()
    first, again, other = (selected(students(pair), FRAME, 6, growth, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_prompts_are_of_valid_ids(pair: TinyPair) -> None:
    """They begin with the head, have the requested length, and contain no excluded id."""
    growth = Growth(children=3, pieces=2, piece_tokens=5)
    ids_FT = selected(students(pair), FRAME, 6, growth, seed=0)
    assert ids_FT.shape == (6, 1 + 2 * 5)
    assert (ids_FT[:, 0] == 1).all()
    assert not torch.isin(ids_FT[:, 1:], torch.tensor(FRAME.never)).any()
    assert int(ids_FT.max()) < VOCABULARY


def test_students_disagree_more_on_answers_to_selected_prompts(pair: TinyPair) -> None:
    """Measured on answers that were not sampled for the selection."""
    both = students(pair)

    def disputed(children: int) -> float:
        ids_FT = selected(both, FRAME, 48, Growth(children), seed=0)
        asked_FT = torch.cat([ids_FT, torch.full((48, 1), 2)], 1)
        answered_FT = continued(
            both[0], asked_FT, 8, torch.tensor(FRAME.never), torch.Generator().manual_seed(1)
        )
        return float(disagreement(both, answered_FT, first=asked_FT.shape[1]).mean())

    assert disputed(children=8) > 1.05 * disputed(children=1)


def test_a_student_agrees_with_itself(pair: TinyPair) -> None:
    """The divergence of equal predictions is 0."""
    (one, _) = students(pair)
    ids_RT = torch.tensor([[1, 50, 60, 70], [1, 80, 90, 100]])
    assert disagreement([one, one], ids_RT, first=1).abs().max() < 1e-6
