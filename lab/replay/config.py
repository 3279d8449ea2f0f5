"""What a replay is: a pair, domains, the segments of a stream, the arms that are compared. A TOML file, or a preset."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lab import corpus
from online.messages import DrafterName
from online.settings import Settings

Strict = ConfigDict(extra="forbid", frozen=True)
DOMAINS = ("math", "sql", "shell", "code")
PRESETS = ("abrupt", "gradual", "mixture", "recurring", "embedded")


class Domain(BaseModel):
    """Where prompts come from: a JSON-lines file, `package:NAME` of an installed one, or `hub:DATASET:SPLIT:FIELD`."""

    model_config = Strict
    traffic: str
    held_out: str


class Segment(BaseModel):
    model_config = Strict
    queries: Annotated[int, Field(ge=1)]
    mix: dict[str, Annotated[float, Field(ge=0)]]  # domain → weight
    fade: bool = False  # from the mix of the segment before to this one's, instead of at once

    def weights(self, query: int, before: "Segment | None") -> dict[str, float]:
        """Of the domains at the segment's `query`-th query."""
        if before is None or not self.fade:
            return dict(self.mix)
        share = query / self.queries
        old, new = (_normal(mix) for mix in (before.mix, self.mix))
        return {
            name: (1 - share) * old.get(name, 0) + share * new.get(name, 0) for name in old | new
        }

    @property
    def main(self) -> str:
        """The domain that most of its queries are of; empty where there are several such."""
        most = max(self.mix.values())
        leading = [name for name, weight in self.mix.items() if weight == most]
        return leading[0] if len(leading) == 1 else ""


def _of_the_service(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(given) - set(Settings.model_fields):
        raise ValueError(f"the service has no setting {', '.join(sorted(unknown))}")
    return given


ServiceSettings = Annotated[dict[str, Any], AfterValidator(_of_the_service)]


class Arm(BaseModel):
    """One way to learn. Beside all arms stand the frozen first draft and no speculation."""

    model_config = Strict
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    settings: ServiceSettings = {}  # of the service, where they differ from `settings` below


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
    at_once: Annotated[int, Field(ge=1)] = 8  # queries under way
    max_tokens: Annotated[int, Field(ge=2)] = 128
    longest_prompt: Annotated[int, Field(ge=1)] = 700
    greedy_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    gamma: Annotated[int, Field(ge=1)] = (
        4  # of all traffic and exams, so that τ means the same everywhere
    )
    held_out: Annotated[int, Field(ge=8)] = (
        100  # queries of a domain, each asked sampled and greedy
    )
    look_every: Annotated[int, Field(ge=1)] = (
        50  # queries between two looks for work, as the service's clock does
    )
    wall_queries: Annotated[int, Field(ge=0)] = (
        16  # of a turn that compares tokens per second, at least; 0: no such
    )
    wall_turns: Annotated[int, Field(ge=2)] = 5
    drafters: list[DrafterName] = [
        "auto"
    ]  # timed there beside the chain, as the engine would have them

    @model_validator(mode="after")
    def _known_domains(self) -> Self:
        for segment in self.segments:
            if unknown := set(segment.mix) - set(self.domains):
                raise ValueError(f"segments: {', '.join(sorted(unknown))} are not among domains")
            if not any(segment.mix.values()):
                raise ValueError("segments: a mix needs a weight above zero")
        return self

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for what, names in (("seeds", self.seeds), ("arms", [arm.name for arm in self.arms])):
            if twice := {str(name) for name in names if names.count(name) > 1}:  # type: ignore[arg-type]
                raise ValueError(f"{what}: {', '.join(sorted(twice))} is there twice")
        return self

    @property
    def queries(self) -> int:
        return sum(segment.queries for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A segment, where it lies in the stream, and whose queries are in it."""

    domains: tuple[str, ...]
    start: int
    end: int
    fade: bool = False


def stretches(config: Replay) -> list[Stretch]:
    found: list[Stretch] = []
    at, before = 0, None
    for segment in config.segments:
        domains = (segment.main,) if segment.main else tuple(segment.mix)
        fades = segment.fade and before is not None
        if fades and found:
            domains = tuple(dict.fromkeys((*found[-1].domains[-1:], *domains)))
        found.append(Stretch(domains, at, at + segment.queries, fades))
        at, before = at + segment.queries, segment
    return found


def read(path: Path) -> Replay:
    """Raises ValueError, naming the field, where the file is no replay."""
    try:
        return Replay(**tomllib.loads(path.read_text()))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def preset(name: str, data: Path | None, queries: int, **more: Any) -> Replay:
    """One of `PRESETS` over a folder with `train/` and `stream/`, or, without one, over installed packages."""
    if name == "embedded" or data is None:
        domains = packages(2 if name == "embedded" else 4)
    else:
        domains = {
            domain: Domain(
                traffic=f"{data}/train/{domain}.jsonl", held_out=f"{data}/stream/{domain}.jsonl"
            )
            for domain in DOMAINS
        }
    if name == "recurring":
        domains = dict(list(domains.items())[:2])
    return Replay(domains=domains, segments=segments(name, list(domains), queries), **more)


def segments(name: str, domains: list[str], queries: int) -> list[Segment]:
    """`queries` of every domain, however they are spread."""
    if name == "mixture":
        return [Segment(queries=queries * len(domains), mix=dict.fromkeys(domains, 1.0))]
    if name == "recurring":
        return [Segment(queries=queries, mix={domain: 1.0}) for domain in domains * 2]
    if (
        name == "gradual"
    ):  # half of the first domain alone, then from each to the next, half of the last one alone
        first, *others = domains
        half = max(1, queries // 2)
        fades = [Segment(queries=queries, mix={domain: 1.0}, fade=True) for domain in others]
        return [
            Segment(queries=half, mix={first: 1.0}),
            *fades,
            Segment(queries=half, mix={domains[-1]: 1.0}),
        ]
    return [Segment(queries=queries, mix={domain: 1.0}) for domain in domains]


def packages(count: int) -> dict[str, Domain]:
    """The largest installed packages that the embedded pair has not seen."""
    sizes: dict[str, int] = {}
    for file in corpus.installed_files():
        if corpus.is_held_out_package(file.package):
            sizes[file.package] = sizes.get(file.package, 0) + file.path.stat().st_size
    largest = sorted(sizes, key=lambda package: -sizes[package])[:count]
    return {
        package.lower(): Domain(traffic=f"package:{package}", held_out=f"package:{package}")
        for package in largest
    }


def _normal(mix: dict[str, float]) -> dict[str, float]:
    total = sum(mix.values())
    return {name: weight / total for name, weight in mix.items()}
