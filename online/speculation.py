"""How tokens are drafted: a request's options, and a route's defaults for requests without any."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from online.drafters import DEFAULT, DrafterDescription
from online.errors import InvalidRequest
from online.messages import MAX_CANDIDATES, MAX_GAMMA, DrafterName

Width = Annotated[int, Field(ge=1)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=MAX_GAMMA)]


class DraftingOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    drafter: DrafterName | None = Field(
        None, description="drafter; null: the route's default, else chain"
    )
    gamma: int | None = Field(
        None,
        ge=0,
        le=MAX_CANDIDATES,
        description="drafted tokens per step; 0: none; null: the fastest number",
    )
    widths: Widths | None = Field(
        None,
        description="drafter tree: candidates after each token, by depth; "
        "null: chosen from measured acceptance rates",
    )
    replacement: bool | None = Field(
        None,
        description="drafter tree: whether siblings may be the same token; null: no",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("widths", "replacement"):
            if getattr(self, name) is not None and self.drafter != "tree":
                raise ValueError(f'{name} is for the drafter "tree"')
        if self.widths is not None and self.gamma is not None:
            raise ValueError("gamma and widths both say how much to draft: give one of them")
        if (size := candidates(self.widths or ())) > MAX_CANDIDATES:
            raise ValueError(f"widths make a tree of {size} tokens, {MAX_CANDIDATES} are allowed")
        return self

    def check(self, drafters: Mapping[str, DrafterDescription]) -> None:
        """Checks what depends on the drafters of this decoder.

        Raises:
            InvalidRequest: there is no such drafter, or it can't draft that many tokens.
        """
        name = self.drafter or DEFAULT
        if name not in drafters:
            *others, last = map(repr, drafters)
            message = f"speculation.drafter: Input should be {', '.join(others)} or {last}"
            raise InvalidRequest(message, param="speculation")
        limit = drafters[name].max_candidates
        if (self.gamma or 0) > limit:
            message = f"speculation: gamma may be {limit} at most for the drafter {name!r}"
            raise InvalidRequest(message, param="speculation")

    def over(self, route: "DraftingOptions") -> "DraftingOptions":
        """These options, completed by the route's defaults.

        A request that names a drafter takes none of the defaults.
        """
        if self.drafter is not None:
            return self
        if self.gamma is None:
            return route
        return route.model_copy(update={"gamma": self.gamma, "widths": None})


def candidates(widths: Sequence[int]) -> int:
    """Number of candidates in a tree. `widths`: candidates after each token, by depth."""
    total, level = 0, 1
    for width in widths:
        level *= width
        total += level
    return total
