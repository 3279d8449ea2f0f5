"""What the rest of the service knows of the decoder's drafters.

A drafter is declared in its own file in `decoder/drafters`. The decoder hands the descriptions to
the API, which checks requests by them and lists the names in OpenAPI. It also writes to the
registry what each route's drafter needs its draft to learn, and the trainer reads it there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

DEFAULT = "chain"  # drafts where neither request nor route names a drafter
AUTO = "auto"  # leaves the choice to the engine

Teaching = Mapping[str, int]  # fields of a recipe (`trainer.distill.Recipe`)


@dataclass(frozen=True, slots=True)
class DrafterDescription:
    """What requests and settings may ask of a drafter, and what it needs."""

    name: str
    max_candidates: int  # candidates of a step, at most
    teaching: Callable[[int], Teaching]  # what drafts must learn for it, given the route's γ
