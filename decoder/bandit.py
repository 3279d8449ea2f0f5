"""Which way to draft is fastest: a bandit that is paid in tokens per second of whole steps.

What pays depends on the traffic, on the draft as it is now, on how busy the machine is: too much to be modelled, and
simple to try (BanditSpec, arXiv 2505.15141). One way is used for a stretch of steps, for to change costs: a draft has
to catch up on what others drafted without it. Then the way is used that may yet be the fastest: one stretch says little
of a way, for texts differ, so that those tried less have more in their favour (an upper confidence bound). Some of the
time goes to others in any case, so that none is written off for good: traffic changes, and drafts are swapped.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

STRETCH = 16  # steps
FLOOR = 0.02  # share of the time that goes to others than the fastest
MEMORY = 40.0  # stretches of its own that an arm's speed remembers
SPREAD = 0.2  # how far a stretch's speed is from the mean, as a rule


@dataclass
class Arm:
    tokens: float = 0.0
    seconds: float = 0.0
    stretches: float = 0.0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    def promise(self, spread: float) -> float:
        """What it might be worth: the less it has been tried, the more."""
        return self.speed * (1 + spread / math.sqrt(self.stretches))

    def paid(self, tokens: int, seconds: float) -> None:
        keep = 1 - 1 / MEMORY
        self.tokens, self.seconds = self.tokens * keep + tokens, self.seconds * keep + seconds
        self.stretches = self.stretches * keep + 1


@dataclass
class Bandit:
    """Of one situation."""

    arms: dict[str, Arm]
    playing: str = ""
    _steps: int = 0  # of the stretch under way
    _tokens: int = 0
    _seconds: float = 0.0
    _fastest_s: float = 0.0  # time that the fastest has had, and the others
    _others_s: float = 0.0

    def choose(self) -> str:
        """For the next step."""
        if not self.playing or self._steps >= STRETCH:
            if self._steps:
                self._end()
            self.playing = self._next()
        return self.playing

    def stepped(self, tokens: int, seconds: float) -> None:
        self._steps, self._tokens, self._seconds = self._steps + 1, self._tokens + tokens, self._seconds + seconds

    @property
    def fastest(self) -> str:
        return max((name for name, arm in self.arms.items() if arm.seconds), key=lambda name: self.arms[name].speed)

    def _end(self) -> None:
        self.arms[self.playing].paid(self._tokens, self._seconds)
        if self.playing == self.fastest:
            self._fastest_s += self._seconds
        else:
            self._others_s += self._seconds
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    def _next(self) -> str:
        if untried := [name for name, arm in self.arms.items() if not arm.seconds]:
            return untried[0]
        fastest = self.fastest
        others = {name: arm for name, arm in self.arms.items() if name != fastest}
        if others and self._others_s < FLOOR * (self._fastest_s + self._others_s):
            return max(others, key=lambda name: others[name].promise(1.0))
        return max(self.arms, key=lambda name: self.arms[name].promise(SPREAD))


@dataclass
class Choice:
    """A bandit for each situation that has come up."""

    ways: Sequence[str]
    _bandits: dict[Hashable, Bandit] = field(default_factory=dict)
    _now: Bandit | None = None

    def choose(self, situation: Hashable) -> str:
        if situation not in self._bandits:
            self._bandits[situation] = Bandit({name: Arm() for name in self.ways})
        self._now = self._bandits[situation]
        return self._now.choose()

    def stepped(self, tokens: int, seconds: float) -> None:
        """The step that was chosen for has been taken; without a choice there is nothing to learn."""
        if self._now is not None:
            self._now.stepped(tokens, seconds)
        self._now = None
