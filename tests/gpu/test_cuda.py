"""What only a GPU has: captured graphs that outlive swaps, and its own operations.

`make gpu` runs these, and the tests of models, engine and drafters, on the machine's GPU.
"""

from collections.abc import Iterator

import pytest
import torch

from decoder.models.llama import Llama
from decoder.verification.verify import verify
from lab.enumeration import distance, on
from lab.enumeration_cases import CHAIN_MODES, SHAPES, TREE_MODES, Case
from tests.device import DEVICE
from tests.engines import Bench, bench, query, target_alone
from tests.tiny import TinyPair

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="SLIPSTREAM_TEST_DEVICE names no GPU")
SETTINGS = {"plain": (1.0, 0, 1.0), "all three": (1.3, 3, 0.8), "greedy": (0.0, 0, 1.0)}
LIMIT = 1e-6
PROMPTS = [(40, 50, 60), (70,), tuple(range(80, 120))]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    ("shape", "mode"),
    [*(("chain", mode) for mode in CHAIN_MODES), *(("two, then two", mode) for mode in TREE_MODES)],
)
def test_what_is_emitted_has_the_targets_distribution(
    shape: str, mode: str, setting: tuple[float, int, float]
) -> None:
    """Verification of chains and trees on the GPU is exact by enumeration."""
    assert (
        distance(on(DEVICE, verify), Case.of(SHAPES[shape], mode, setting, torch.float32)) <= LIMIT
    )


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    with bench(pair) as made:
        yield made


@pytest.mark.parametrize("drafter", ["chain", "tree", "parallel"])
def test_a_swap_needs_no_new_capture(pair: TinyPair, tiny: Bench, drafter: str) -> None:
    """Captured graphs use the new weights: fewer drafts are accepted, answers stay the same."""
    draft = tiny.engine.batch.drafts["default"]
    asked = [
        query(prompt, f"q{i}", drafter=drafter, max_tokens=60) for i, prompt in enumerate(PROMPTS)
    ]
    before = tiny.run(*asked)
    captured = _captured(draft.model)
    assert captured
    staged = draft.stage(pair.spoilt)
    tiny.engine.between_steps(lambda: draft.install(staged, 1))
    after = tiny.run(*asked)
    assert sum(one.stats.accepted for one in after) < sum(one.stats.accepted for one in before) / 2
    assert captured.items() <= _captured(draft.model).items(), "a shape was captured anew"
    for found in (before, after):
        assert [one.ids for one in found] == [
            target_alone(pair, one.prompt_ids, 60) for one in asked
        ]


def _captured(model: object) -> dict[object, object]:
    assert isinstance(model, Llama)
    assert model.graphs is not None
    return dict(model.graphs._captured)
