"""Chooses γ, the number of tokens that a step drafts.

The choice maximises the tokens per second of the whole batch:

    Σ over sequences of E[tokens | γ]  ÷  seconds of a step with γ

A sequence with acceptance rate α emits (1 − α^(γ+1)) / (1 − α) tokens
(Leviathan et al., arXiv 2211.17192, equation 1). γ = 0 is the plain step,
without any draft work.

Legend: B sequences whose γ is chosen here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from decoder.policy.draft_cost import DraftCost, DraftCostModel, DraftWork
from decoder.policy.step_times import GAMMA_LEARNING_RATE, StepTimes

MIN_SPEEDUP = 1.05  # over plain steps; the margin pays for the draft's prefill
PROBE_SHARE = 0.005  # of the time of plain steps, for measuring unused drafts
MAX_DRAFTED_STEPS = 50  # then a plain step, to measure its time again
PLAIN_LEARNING_RATE = 0.5  # of these plain steps, which are rare


def expected_tokens(rates_B: Sequence[float], max_gamma: int) -> list[float]:
    """The tokens that a step emits over all sequences, by γ from 0 on.

    This runs before every step, so it uses plain numbers: a dozen array
    operations would take 2 % of a small model's step.
    """
    powers = [1.0] * len(rates_B)
    tokens = [float(len(rates_B))]
    for _ in range(max_gamma):
        powers = [p * rate for p, rate in zip(powers, rates_B, strict=True)]
        tokens.append(tokens[-1] + sum(powers))
    return tokens


@dataclass
class GammaController:
    """Chooses γ for a batch. Sequences whose request sets γ keep their own."""

    step_times: StepTimes
    max_gamma: int
    probe_budget_s: float = 0.0  # seconds that probes may take
    draft_cost_model: DraftCostModel = field(default_factory=DraftCostModel)
    _drafted_steps: int = 0  # since the last plain one

    def choose_gamma(self, rates_B: Sequence[float], batch_size: int) -> int:
        """The fastest γ for the sequences that leave it to the engine.

        Args:
            rates_B: their acceptance rates.
            batch_size: all sequences of the step. The others count one token each.
        """
        if not rates_B:
            return 0
        seconds = self.step_times.seconds(batch_size)
        tokens = expected_tokens(rates_B, self.max_gamma)
        others = batch_size - len(rates_B)
        speeds = [(n + others) / s for n, s in zip(tokens, seconds, strict=True)]
        best = speeds.index(max(speeds))
        if speeds[best] <= MIN_SPEEDUP * speeds[0] or self.plain_step_due:
            return 0
        return best

    @property
    def plain_step_due(self) -> bool:
        """Whether the next step must be plain, whatever would draft."""
        return self._drafted_steps >= MAX_DRAFTED_STEPS

    def draft_cost(self, batch_size: int) -> DraftCost:
        """The cost of drafting in tokens; see `DraftCostModel.cost`."""
        return self.draft_cost_model.cost(batch_size)

    def observe_step(
        self,
        batch_size: int,
        gamma: int | None,
        seconds: float,
        tokens: int,
        work: DraftWork | None = None,
    ) -> None:
        """Learns from a step.

        Args:
            gamma: of the longest chain from the draft; None for other drafters.
            tokens: emitted by the whole batch.
            work: what the step drafted, if its drafters count it.
        """
        plain_steps = seconds / self.step_times.seconds(batch_size)[0]
        self.draft_cost_model.observe(batch_size, tokens, plain_steps, work)
        # A request may set a γ above the maximum, which has no step time.
        if gamma is not None and gamma <= self.max_gamma:
            due = gamma == 0 and self.plain_step_due
            learning_rate = PLAIN_LEARNING_RATE if due else GAMMA_LEARNING_RATE
            self.step_times.observe(batch_size, gamma, seconds, learning_rate)
        if gamma == 0:
            self._drafted_steps = 0
            budget_s = self.probe_budget_s + PROBE_SHARE * seconds
            self.probe_budget_s = min(budget_s, seconds)
        else:
            self._drafted_steps += 1

    def charge_probe(self, seconds: float) -> None:
        """Takes the time of a probe from the budget."""
        self.probe_budget_s -= seconds
