"""The plan for one sequence's draft in one step."""

from dataclasses import dataclass, replace

from decoder.verification.tree_shape import TreeShape, chain_shape
from online.messages import MAX_GAMMA


@dataclass(frozen=True)
class DraftSpec:
    """Which drafter drafts for a sequence, in which shape, and how many candidates of it."""

    drafter: str
    shape: TreeShape
    candidates: int
    distinct: bool = True  # siblings are drawn without replacement
    model_budget: int = 0  # cascades: tokens that the draft model drafts before n-grams continue

    def first(self, candidates: int) -> "DraftSpec":
        """At most this many candidates."""
        if candidates >= self.candidates:
            return self
        return replace(self, candidates=max(0, candidates))


def chain_spec(gamma: int, drafter: str = "chain") -> DraftSpec:
    return DraftSpec(drafter, chain_shape(max(gamma, MAX_GAMMA)), gamma)


NO_DRAFT = chain_spec(0)
