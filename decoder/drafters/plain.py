"""No drafting: what is fastest where everything that could be drafted costs more than it brings."""

from collections.abc import Sequence

from decoder.drafters.base import Group
from decoder.sequence.sequence import Row
from decoder.verification.tree_shape import NOTHING, Scheme


class PlainDrafter:
    """A `Drafter` of nothing."""

    uses_model = waits = False

    def scheme(self, row: Row, gamma: int, most: int) -> Scheme:
        return NOTHING

    def propose(self, group: Group) -> None:
        return None

    def settle(self, group: Group, kept: Sequence[Sequence[int]]) -> None:
        pass
