"""Which drafter drafts for each sequence: the one its query names, or the fastest."""

from collections.abc import Mapping, Sequence

from decoder.drafters.base import Drafter
from decoder.drafters.plain import PLAIN
from decoder.policy.bandit import DrafterBandit
from decoder.policy.drafter_speed import Workload
from decoder.sequence.sequence import LiveSequence
from online.drafters import AUTO, DEFAULT


class DrafterSelection:
    """Resolves "auto" by a bandit, with one choice for all sequences of a step that leave it."""

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self._drafters = drafters
        self._bandit = DrafterBandit([name for name, each in drafters.items() if each.in_auto])

    def choose(self, seqs: Sequence[LiveSequence]) -> list[Drafter]:
        """The drafter of each sequence in the next step."""
        open_seqs = [seq for seq in seqs if seq.query.drafter == AUTO]
        if not open_seqs:
            return [self._drafters[seq.query.drafter] for seq in seqs]
        greedy = 2 * sum(seq.query.temperature == 0 for seq in open_seqs) > len(open_seqs)
        workload = Workload.of(open_seqs[0].query.route, len(seqs), greedy)
        chosen = self._bandit.choose(workload)
        return [self._drafters[_name(seq, chosen)] for seq in seqs]

    def observe(self, emitted: int, seconds: float, catch_up_s: float) -> None:
        """Reports the step that followed `choose`."""
        self._bandit.observe(emitted, seconds, catch_up_s)


def _name(seq: LiveSequence, chosen: str) -> str:
    if seq.query.drafter != AUTO:
        return seq.query.drafter
    # A request that fixes γ wants that many tokens drafted.
    return DEFAULT if chosen == PLAIN and seq.query.gamma is not None else chosen
