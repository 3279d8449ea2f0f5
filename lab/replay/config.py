"""What a replay is: a pair, domains, segments of a stream, and the arms that are compared."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from online.settings import Settings

Strict = ConfigDict(extra="forbid", frozen=True)
AtLeast1 = Annotated[int, Field(ge=1)]


class Domain(BaseModel):
    """Where prompts come from: a JSON-lines file, or `package:NAME` of an installed package."""

    model_config = Strict
    traffic: str
    held_out: str


class Segment(BaseModel):
    model_config = Strict
    queries: AtLeast1
    mix: dict[str, Annotated[float, Field(ge=0)]]  # domain → weight
    fade: bool = False  # gradually from the mix of the segment before, instead of at once

    def weights(self, query: int, before: "Segment | None") -> dict[str, float]:
        """The domains' weights at the segment's `query`-th query."""
        if before is None or not self.fade:
            return dict(self.mix)
        share = query / self.queries
        old, new = _normal(before.mix), _normal(self.mix)
        return {
            name: (1 - share) * old.get(name, 0) + share * new.get(name, 0) for name in old | new
        }

    @property
    def main(self) -> str:
        """The domain with the largest weight; empty where several share it."""
        most = max(self.mix.values())
        leading = [name for name, weight in self.mix.items() if weight == most]
        return leading[0] if len(leading) == 1 else ""


def _known_settings(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(given) - set(Settings.model_fields):
        raise ValueError(f"the service has no setting {', '.join(sorted(unknown))}")
    return given


ServiceSettings = Annotated[dict[str, Any], AfterValidator(_known_settings)]


class Arm(BaseModel):
    """One configuration; the frozen first draft and no speculation are compared with all arms."""

    model_config = Strict
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    settings: ServiceSettings = {}  # of the service, where they differ from the replay's


class Replay(BaseModel):
    model_config = Strict
    target: str = ""  # folder or hub id; empty: the embedded one
    draft: str = ""
    dtype: str = "auto"
    domains: dict[str, Domain]
    segments: Annotated[list[Segment], Field(min_length=1)]
    arms: Annotated[list[Arm], Field(min_length=1)] = [Arm(name="loop")]
    settings: ServiceSettings = {}
    seeds: Annotated[list[int], Field(min_length=1)] = [1]
    at_once: AtLeast1 = 8  # queries in flight
    max_tokens: Annotated[int, Field(ge=2)] = 128
    longest_prompt: AtLeast1 = 700
    greedy_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    gamma: AtLeast1 = 4  # of all traffic and held-out queries, so that τ is comparable
    held_out: Annotated[int, Field(ge=8)] = 100  # queries of a domain, each sampled and greedy
    look_every: AtLeast1 = 50  # queries between two looks for work, in place of the service's clock
    wall_queries: Annotated[int, Field(ge=0)] = 16  # of a timed round, at least; 0: no timing
    wall_rounds: Annotated[int, Field(ge=2)] = 5

    @model_validator(mode="after")
    def _known_domains(self) -> Self:
        for segment in self.segments:
            if unknown := set(segment.mix) - set(self.domains):
                raise ValueError(f"segments: {', '.join(sorted(unknown))} are not among domains")
            if not any(segment.mix.values()):
                raise ValueError("segments: a mix needs a weight above zero")
        return self

    @model_validator(mode="after")
    def _no_duplicates(self) -> Self:
        lists: dict[str, list[Any]] = {"seeds": self.seeds, "arms": [arm.name for arm in self.arms]}
        for what, names in lists.items():
            if twice := {str(name) for name in names if names.count(name) > 1}:
                raise ValueError(f"{what}: {', '.join(sorted(twice))} is there twice")
        return self

    @property
    def queries(self) -> int:
        return sum(segment.queries for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a segment lies in the stream, and the domains of its queries."""

    domains: tuple[str, ...]
    start: int
    end: int
    fade: bool = False


def spans(config: Replay) -> list[Span]:
    found: list[Span] = []
    at = 0
    for segment in config.segments:
        domains = (segment.main,) if segment.main else tuple(segment.mix)
        fades = segment.fade and bool(found)
        if fades:
            domains = tuple(dict.fromkeys((*found[-1].domains[-1:], *domains)))
        found.append(Span(domains, at, at + segment.queries, fades))
        at += segment.queries
    return found


def read(path: Path) -> Replay:
    """Raises ValueError, naming the field, where the file is no replay."""
    try:
        return Replay(**tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _normal(mix: dict[str, float]) -> dict[str, float]:
    total = sum(mix.values())
    return {name: weight / total for name, weight in mix.items()}
