"""Prompts that are grown from nothing."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.tiny import VOCABULARY, TinyPair
from trainer.disagreement import Growth, disagreement, grown

HEAD, NEVER = [1], [0, 1, 2, 3]


def students(pair: TinyPair) -> list[nn.Module]:
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (pair.draft, pair.target)]


def test_the_same_seed_grows_the_same_prompts(pair: TinyPair) -> None:
    """And another seed others."""
    first, again, other = (grown(students(pair), HEAD, 6, Growth(), NEVER, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_grown_prompts_are_of_valid_ids(pair: TinyPair) -> None:
    """They begin with the head, have the length that was asked for, and none of the ids that a query never has."""
    ids_FT = grown(students(pair), HEAD, 6, Growth(children=3, pieces=2, piece_tokens=5), NEVER, seed=0)
    assert ids_FT.shape == (6, 1 + 2 * 5)
    assert (ids_FT[:, 0] == 1).all()
    assert not torch.isin(ids_FT[:, 1:], torch.tensor(NEVER)).any()
    assert int(ids_FT.max()) < VOCABULARY


def test_students_disagree_more_on_what_is_kept_than_on_random_samples(pair: TinyPair) -> None:
    """Children that are selected beat children that are not, and beat random ids."""
    both = students(pair)
    selected, unselected = (
        disagreement(both, grown(both, HEAD, 32, Growth(children), NEVER, seed=0), first=1).mean()
        for children in (6, 1)
    )
    assert selected > 1.2 * unselected
    generator = torch.Generator().manual_seed(0)
    bodies = torch.randint(4, VOCABULARY, (32, 24), generator=generator)
    assert selected > disagreement(both, torch.cat([torch.ones(32, 1, dtype=torch.long), bodies], 1), first=1).mean()


def test_a_student_agrees_with_itself(pair: TinyPair) -> None:
    """The divergence of equal predictions is none."""
    (one, _) = students(pair)
    ids_RT = torch.tensor([[1, 50, 60, 70], [1, 80, 90, 100]])
    assert disagreement([one, one], ids_RT, first=1).abs().max() < 1e-6
