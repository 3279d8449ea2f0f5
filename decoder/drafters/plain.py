"""No drafting: what is fastest where everything that could be drafted costs more than it brings."""

from collections.abc import Sequence

from decoder.drafters.base import DraftGroup
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import NO_DRAFT, DraftSpec


class PlainDrafter:
    """A `Drafter` of nothing."""

    uses_model = waits = False

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return NO_DRAFT

    def propose(self, group: DraftGroup) -> None:
        return None

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        pass
