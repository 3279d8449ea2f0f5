"""How far each drafter's output distribution is from the target's, by enumeration."""

import torch

from decoder.verification.verify import verify
from lab.enumeration import distance, on
from lab.enumeration_cases import (
    CHOSEN_CHAIN,
    DRAWN_CHAIN,
    FIRST_CHOSEN,
    LAST_CHOSEN,
    SHAPES,
    WITH_REPLACEMENT,
    WITHOUT_REPLACEMENT,
    Case,
)
from online.messages import DrafterName

CHAIN = (("chain", DRAWN_CHAIN),)
CASCADE = (*CHAIN, ("chain", FIRST_CHOSEN), ("chain", LAST_CHOSEN))
ENUMERATED: dict[DrafterName, tuple[tuple[str, str], ...]] = {  # shapes, and how candidates draw
    "chain": CHAIN,
    "tree": (
        ("two, then two", WITHOUT_REPLACEMENT),
        ("two, then two", WITH_REPLACEMENT),
        ("three at the root", WITHOUT_REPLACEMENT),
    ),
    "ngrams": (("chain", CHOSEN_CHAIN),),
    "cascade": CASCADE,
    "graph": (("two, then two", WITHOUT_REPLACEMENT),),
    "parallel": CHAIN,
    "parallel_cascade": CASCADE,
    "exits": CHAIN,
    "auto": (*CASCADE, ("chain", CHOSEN_CHAIN)),
}
SETTINGS = ((1.0, 0, 1.0), (1.3, 3, 0.8), (0.0, 0, 1.0))  # temperature, top-k, top-p


def exact_tv(drafter: DrafterName, device: torch.device) -> float:
    """The largest total variation over shapes and settings, through the functions that serve."""
    cases = [
        Case.of(SHAPES[shape], drawn, setting, torch.float32)
        for shape, drawn in ENUMERATED[drafter]
        for setting in SETTINGS
    ]
    return max(distance(on(device, verify), case) for case in cases)
