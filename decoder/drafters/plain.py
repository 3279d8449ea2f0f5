"""No drafting: the fastest choice where every drafter costs more than it gains."""

from decoder.drafters.base import Drafted, Drafter, DraftGroup
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import NO_DRAFT, DraftSpec

PLAIN = "plain"


class PlainDrafter(Drafter):
    """Drafts nothing. Requests ask for it with `gamma: 0`."""

    name = PLAIN
    nameable = False
    in_auto = True
    uses_model = False
    waits_for_draft = False

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return NO_DRAFT

    def propose(self, group: DraftGroup) -> Drafted:
        return Drafted(None, [0] * len(group.seqs))


DRAFTERS = (PlainDrafter(),)
