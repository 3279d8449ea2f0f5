"""Signal records of versions 1 and 2, read as today's.

They hold every position of every draft, rejected or not. Version 1 has no acceptance and no client.
`tests/records` has a record of each, written by the code of its time.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

OLD_VERSIONS = ("1", "2")


def branches_of(arrays: Mapping[str, NDArray[Any]]) -> tuple[int, NDArray[Any]]:
    """`branch_tokens` and `branch_ids` of an old record, whose `draft_ids` are all drafted tokens.

    Raises:
        ValueError: the arrays do not fit together.
    """
    drafted = arrays["step_drafted"].astype(np.int64)
    accepted = arrays["step_accepted"].astype(np.int64)
    draft_ids = arrays["draft_ids"]
    if drafted.shape != accepted.shape or drafted.min(initial=0) < 0:
        raise ValueError("steps do not fit together")
    if draft_ids.shape != (drafted.sum(),):
        raise ValueError(f"{draft_ids.shape} drafted tokens, expected {drafted.sum()}")
    first = np.repeat(drafted.cumsum() - drafted, drafted)
    rejected = np.arange(len(draft_ids)) - first >= np.repeat(accepted, drafted)
    return int((drafted - accepted).max(initial=0)), draft_ids[rejected]
