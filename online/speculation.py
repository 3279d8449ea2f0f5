"""How a request wants tokens drafted, or a route where its requests say nothing: checked, and what holds in the end."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from online.messages import MAX_CANDIDATES, MAX_GAMMA, DrafterName


class DraftingOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    drafter: DrafterName | None = Field(
        None, description="what drafts; null: as the route says, else the draft's chain"
    )
    gamma: int | None = Field(
        None,
        ge=0,
        le=MAX_CANDIDATES,
        description="tokens drafted a step; 0: none; null: as is fastest",
    )
    widths: (
        Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=MAX_GAMMA)]
        | None
    ) = Field(
        None,
        description="of a tree: tokens drafted behind every token, by depth; null: as measured acceptance has it",
    )
    replacement: bool | None = Field(
        None,
        description="of a tree: whether a token may be drafted twice behind the same one; null: no",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        tree = self.drafter == "tree"
        for name, given in (("widths", self.widths), ("replacement", self.replacement)):
            if given is not None and not tree:
                raise ValueError(f'{name} is for the drafter "tree"')
        if self.widths is not None and self.gamma is not None:
            raise ValueError("gamma and widths both say how much to draft: give one of them")
        if self.drafter not in ("tree", "graph") and (self.gamma or 0) > MAX_GAMMA:
            raise ValueError(
                f"gamma may be {MAX_GAMMA} at most, and more only for a tree or a graph"
            )
        if (size := candidates(self.widths or ())) > MAX_CANDIDATES:
            raise ValueError(f"widths make a tree of {size} tokens, {MAX_CANDIDATES} are allowed")
        return self

    def over(self, route: "DraftingOptions") -> "DraftingOptions":
        """The request's own wish where it has one: another drafter takes nothing over from the route's."""
        if self.drafter is not None:
            return self
        return (
            route
            if self.gamma is None
            else route.model_copy(update={"gamma": self.gamma, "widths": None})
        )


def candidates(widths: tuple[int, ...] | list[int]) -> int:
    """Of a tree with so many behind every node, by depth."""
    total, level = 0, 1
    for width in widths:
        level *= width
        total += level
    return total
