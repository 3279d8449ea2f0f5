"""Speculation control: how many tokens a step drafts, from what steps cost and how much of a draft is accepted.

What is maximised is the tokens per second of the whole batch: Σ over sequences of E[tokens | γ] ÷ seconds of a step with γ,
where a sequence with acceptance rate α emits (1 − α^(γ+1)) / (1 − α) tokens (Leviathan et al., arXiv 2211.17192, equation
1). γ = 0 is the plain step, with no draft work at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from decoder.policy.draft_cost import DraftCost, DraftCostModel, DraftWork
from decoder.policy.step_times import GAMMA_LEARNS, StepTimes

MARGIN = 1.05  # speculation must promise this much more than plain steps: it also pays for drafts' prompts
PROBE_SHARE = (
    0.005  # of the time that plain steps take, for looking whether drafting would pay again
)
RECHECK_STEPS = 50  # drafting steps in a sequence after which one is plain: or what plain steps cost would be hearsay
RECHECK_LEARNS = 0.5  # share of that step's surprise that is taken up: there are few of them


def expected_tokens(rates_B: Sequence[float], max_gamma: int) -> list[float]:
    """Σ over sequences of the tokens that a step emits, by γ from 0 on.

    Plain numbers, here and in `StepTimes`: this runs before every step, and a dozen array operations would take 2 % of
    a small model's.
    """
    powers, total = [1.0] * len(rates_B), [float(len(rates_B))]
    for _ in range(max_gamma):
        powers = [power * rate for power, rate in zip(powers, rates_B, strict=True)]
        total.append(total[-1] + sum(powers))
    return total


@dataclass
class GammaController:
    """Chooses γ for a batch. A sequence whose request says its own γ keeps it."""

    step_times: StepTimes
    max_gamma: int
    probe_budget_s: float = 0.0  # time that probes may spend
    draft_cost_model: DraftCostModel = field(default_factory=DraftCostModel)
    _drafted: int = 0  # steps since the last plain one

    def choose_gamma(self, rates_B: Sequence[float], rows: int) -> int:
        """`rates_B` are the acceptance rates of the sequences that leave γ to us; the others emit what they emit anyway."""
        if not rates_B:
            return 0
        seconds = self.step_times.seconds(rows)
        tokens, others = expected_tokens(rates_B, self.max_gamma), rows - len(rates_B)
        speed = [(count + others) / cost for count, cost in zip(tokens, seconds, strict=True)]
        best = speed.index(max(speed))
        if speed[best] <= MARGIN * speed[0] or self.plain_step_due:
            return 0
        return best

    @property
    def plain_step_due(self) -> bool:
        """Whether the next step is to be a plain one, whatever drafts."""
        return self._drafted >= RECHECK_STEPS

    def draft_cost(self, rows: int) -> DraftCost:
        """What drafting costs a step of so many sequences."""
        return self.draft_cost_model.cost(rows)

    def observe_step(
        self,
        rows: int,
        gamma: int | None,
        seconds: float,
        tokens: int,
        drafted: DraftWork | None = None,
    ) -> None:
        """`gamma` is what a chain of the draft's had; None: something else was drafted. `drafted`: the most candidates
        of a sequence, and the draft's forwards for them, where these are known."""
        self.draft_cost_model.observe(
            rows, tokens, seconds / self.step_times.seconds(rows)[0], drafted
        )
        if gamma is not None and gamma <= self.max_gamma:  # a request may ask for more
            rechecked = gamma == 0 and self.plain_step_due
            self.step_times.observe(
                rows, gamma, seconds, RECHECK_LEARNS if rechecked else GAMMA_LEARNS
            )
        self._drafted = 0 if gamma == 0 else self._drafted + 1
        if gamma == 0:
            self.probe_budget_s = min(self.probe_budget_s + PROBE_SHARE * seconds, seconds)

    def charge_probe(self, seconds: float) -> None:
        """A probe took this long."""
        self.probe_budget_s -= seconds
