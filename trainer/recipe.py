"""The recipe: how a candidate is trained. It is stored with the version that it made."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from trainer.divergences import divergence

Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a candidate is trained. Weights are relative to a position on the emitted path."""

    divergence: str = "forward_kl"
    # Of the divergences that take one.
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    # Tokens of each rejected branch to learn from: the draft's own samples.
    branch_tokens: Count = 0
    branch_weight: Weight = 0.1
    # Mask tokens in a row to learn from, for drafts that draft a chain in one forward.
    masks: Count = 0
    # Weight of each earlier layer's logits; the last layer's is 1.
    exit_weight: Weight = 0.0
    # Compare at the request's temperature instead of at 1.
    follow_temperature: bool = False
    # AdaSPEC: the share of positions with the most to gain.
    selected_share: Share = 1.0
    # Weight of staying close to an earlier draft, on samples of its own.
    rehearsal: Weight = 0.5
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    epochs: Annotated[int, Field(ge=1)] = 8
    batch_signals: Annotated[int, Field(ge=1)] = 8
    seed: int = 0

    @classmethod
    def of(cls, chosen: Mapping[str, str | bool | int | float]) -> "Recipe":
        """The default recipe with the chosen fields.

        Raises:
            ValueError: names an unknown field, or a field with an invalid value.
        """
        if unknown := set(chosen) - {field.name for field in fields(cls)}:
            raise ValueError(f"recipe: no field {', '.join(sorted(unknown))}")
        recipe: Recipe = TypeAdapter(cls).validate_python(dict(chosen))
        divergence(recipe.divergence, recipe.beta)
        return recipe

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
