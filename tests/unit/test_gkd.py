"""The lab's comparison with a trainer that runs the target; TRL itself is not among what tests need."""

import sys

import pytest

from lab import gkd


def test_lessons_as_trl_takes_them() -> None:
    """Answers alone are supervised; prompts alone have their padding in front, for what generates from them."""
    rows = [
        {"prompt_ids": [5, 6, 7], "output_ids": [8]},
        {"prompt_ids": [9], "output_ids": [10, 11]},
    ]
    batch = gkd.Collator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8], [-100, 10, 11, -100]]
    assert batch["prompts"].tolist() == [[5, 6, 7], [0, 0, 9]]
    assert batch["prompt_attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_without_trl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["gkd"])
    with pytest.raises(SystemExit, match="pip install trl"):
        gkd.main()
