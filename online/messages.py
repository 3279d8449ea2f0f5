"""What the REST API and the engine say to each other. Plain data: no HTTP in it, no tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

MAX_GAMMA = 16  # drafted tokens, one behind another, that may be asked for
MAX_CANDIDATES = 64  # drafted tokens of a step, beside and behind one another

FinishReason = Literal["stop", "length", "cancelled", "error"]
LenienceFunction = Literal["lin", "sq", "exp"]
MASKS = 3  # tokens that a cascade's draft drafts by masks in one forward, beside the first
# What they are: docs/drafters.md
DrafterName = Literal[
    "chain", "tree", "graph", "ngrams", "cascade", "parallel", "parallel_cascade", "exits", "auto"
]


@dataclass(frozen=True, slots=True)
class Lenience:
    """Accepts more of a draft than is exact: f(p) takes the place of p (decoder/verification/lenience.py)."""

    function: LenienceFunction
    epsilon: float  # in (0, 1]; 1: exact

    @property
    def lossless(self) -> bool:
        return self.epsilon == 1


@dataclass(frozen=True, slots=True)
class Query:
    """One sequence to generate."""

    id: str
    route: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0
    gamma: int | None = None  # drafted tokens a step; None: what the server finds fastest
    drafter: DrafterName = "chain"
    widths: tuple[
        int, ...
    ] = ()  # of a tree: candidates behind every node, by depth; empty: as is best
    replacement: bool = False  # of a tree: siblings may be the same token
    lenience: Lenience | None = None  # None: exact
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # most likely tokens to report per position; None: none
    store: bool = True  # False: leaves no signal
    client: str = ""  # who asks: a key's name or OpenAI's `user`; empty: nobody in particular


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class SpeculationStats:
    """What speculation did for one sequence. A step is one target forward."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    overlap: float = 0.0  # Σ over compared positions of Σ_x min(p(x), q(x))
    compared: int = (
        0  # positions up to and with the first rejected one that a draft model said something about
    )
    histogram: dict[int, int] = field(default_factory=dict)  # accepted tokens of a step → steps
    versions: list[tuple[int, int, int]] = field(
        default_factory=list
    )  # half-open token ranges: start, end, version

    @property
    def acceptance_rate(self) -> float | None:
        """α: the mean of Σ min(p, q) over compared positions; None where nothing was drafted."""
        return self.overlap / self.compared if self.compared else None

    def add_probe(self, overlap: float, compared: int) -> None:
        """Positions that a draft was compared on without drafting for them."""
        self.overlap += overlap
        self.compared += compared

    def add_step(
        self, drafted: int, accepted: int, overlap: float, compared: int, emitted: int, version: int
    ) -> None:
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        self.overlap += overlap
        self.compared += compared
        self.histogram[accepted] = self.histogram.get(accepted, 0) + 1
        end = self.versions[-1][1] if self.versions else 0
        if self.versions and self.versions[-1][2] == version:
            self.versions[-1] = (self.versions[-1][0], end + emitted, version)
        else:
            self.versions.append((end, end + emitted, version))


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of one sequence. The last one carries `finish_reason` and `stats`."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stats: SpeculationStats | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ArmSeen:
    version: int
    requests: int  # finished ones that it drafted alone
    acceptance: float | None  # their mean Σ min(p, q)


@dataclass(frozen=True, slots=True)
class CanarySeen:
    """What one decoder has seen of a canary, and of the active version at the same time."""

    canary: ArmSeen
    active: ArmSeen


@dataclass(frozen=True, slots=True)
class Loaded:
    """The draft version that a decoder really runs on a route, beside the one it is asked to run."""

    version: int
    error: str = ""  # why the wanted version could not be loaded
    canary: CanarySeen | None = None  # once it drafts


@dataclass(frozen=True, slots=True)
class EngineStatus:
    alive: bool
    running: int
    waiting: int
    slots: int
    max_context: int
    target_fingerprint: str
    loaded: Mapping[str, Loaded]


class EngineClient(Protocol):
    """The engine as the API sees it. Every method may be called from any thread."""

    def submit(self, query: Query, on_delta: Callable[[Delta], None]) -> None:
        """Queues a query; deltas arrive on the engine's thread. Raises Overloaded or Unavailable."""

    def cancel(self, query_id: str) -> None: ...

    def status(self) -> EngineStatus: ...

    def nudge(self) -> None:
        """Says that an activation was written: look now, do not wait for the next poll."""


class TextCodec(Protocol):
    """The target's tokenizer as the API sees it."""

    model_name: str
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def token(self, token_id: int) -> str: ...
