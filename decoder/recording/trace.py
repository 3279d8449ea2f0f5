"""One request's steps, until it finishes and becomes a signal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoder.recording.observation import Observation
from online.messages import Query
from online.signals import Signal, pseudonym, typed


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One sequence's part of one step."""

    observation: Observation
    seq: int  # its place among the step's sequences
    start: int  # index into the output of the first token that the step could emit
    accepted: int

    @property
    def drafted(self) -> int:
        """Tokens of the verified chain."""
        return int(self.observation.arrays.length_B[self.seq])

    @property
    def branch(self) -> int:
        """Rejected tokens that are recorded."""
        return min(self.drafted - self.accepted, self.observation.limits.branch_tokens)

    def branch_ids(self) -> NDArray[np.int64]:
        end = self.accepted + self.branch
        return self.observation.arrays.chain_ids_BG[self.seq, self.accepted : end]

    def positions(self) -> dict[str, NDArray[np.generic]]:
        count = self.accepted + 1 + self.branch
        return self.observation.arrays.positions(self.seq, count, self.observation.limits.top_k)


@dataclass(slots=True)
class Trace:
    """One request. The engine appends steps; output and acceptance come when it finishes."""

    query: Query
    steps: list[StepTrace] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    acceptance: float | None = None


def join(steps: Sequence[StepTrace]) -> dict[str, NDArray[Any]]:
    """The arrays of a signal that come from its steps."""
    parts = [step.positions() for step in steps]
    positions = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rest = 1 - np.exp(positions["top_logp"]).sum(-1)
    return {
        "step_start": np.array([step.start for step in steps]),
        "step_drafted": np.array([step.drafted for step in steps]),
        "step_accepted": np.array([step.accepted for step in steps]),
        "branch_ids": np.concatenate([step.branch_ids() for step in steps]),
        **positions,
        "rest_mass": rest.clip(min=0),
    }


def to_signal(trace: Trace, model: str) -> Signal:
    """`model` is the target's fingerprint."""
    query = trace.query
    ids = {"prompt_ids": np.array(query.prompt_ids), "output_ids": np.array(trace.output_ids)}
    return Signal(
        request_id=query.id,
        route=query.route,
        temperature=query.temperature,
        top_p=query.top_p,
        top_k=query.top_k,
        model=model,
        branch_tokens=trace.steps[0].observation.limits.branch_tokens,
        acceptance=trace.acceptance,
        client=pseudonym(query.client),
        **typed({**ids, **join(trace.steps)}),
    )
