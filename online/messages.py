"""Messages between the REST API and the engine: plain data without HTTP and without tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

MAX_GAMMA = 16  # maximum length of a drafted chain
MAX_CANDIDATES = 64  # maximum of drafted tokens per step, as in a tree

FinishReason = Literal["stop", "length", "cancelled", "error"]
LenienceFunction = Literal["lin", "sq", "exp"]
DrafterName = str  # of a drafter in decoder/drafters, or "auto" (docs/drafters.md)


@dataclass(frozen=True, slots=True)
class Lenience:
    """Lossy acceptance: f(p) replaces the target's p (decoder/verification/lenience.py)."""

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
    gamma: int | None = None  # drafted tokens per step; None: the fastest number
    drafter: DrafterName = "chain"
    widths: tuple[int, ...] = ()  # tree: candidates after each token, by depth; empty: chosen
    replacement: bool = False  # tree: siblings may be the same token
    lenience: Lenience | None = None  # None: exact
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # number of top tokens to report per position; None: no report
    store: bool = True  # False: the query leaves no signal
    client: str = ""  # name of the key, or OpenAI's `user`; empty: unknown


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class SpeculationStats:
    """Speculation figures of one sequence. A step is one target forward."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    overlap: float = 0.0  # Σ over compared positions of Σ_x min(p(x), q(x))
    # Positions with a draft distribution, up to and including the first rejected one.
    compared: int = 0
    histogram: dict[int, int] = field(default_factory=dict)  # accepted tokens of a step → steps
    # Draft versions by half-open token ranges: (start, end, version).
    versions: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float | None:
        """α: mean of Σ min(p, q) over compared positions; None if none was compared."""
        return self.overlap / self.compared if self.compared else None

    def add_probe(self, overlap: float, compared: int) -> None:
        """Adds positions on which a draft was compared without drafting for them."""
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
        self._extend(version, emitted)

    def _extend(self, version: int, emitted: int) -> None:
        """Adds `emitted` tokens of a draft version to the ranges."""
        start, end, last = self.versions[-1] if self.versions else (0, 0, None)
        if last == version:
            self.versions[-1] = (start, end + emitted, version)
        else:
            self.versions.append((end, end + emitted, version))


@dataclass(frozen=True, slots=True)
class Delta:
    """The next tokens of one sequence. The last delta has `finish_reason` and `stats`."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stats: SpeculationStats | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ArmSeen:
    """One arm of a canary test: requests for which this version alone drafted."""

    version: int
    requests: int  # finished requests
    acceptance: float | None  # their mean acceptance rate


@dataclass(frozen=True, slots=True)
class CanarySeen:
    """Both arms of a canary test, as one decoder has seen them."""

    canary: ArmSeen
    active: ArmSeen


@dataclass(frozen=True, slots=True)
class Loaded:
    """The draft version that a decoder runs on a route, which may lag behind the active one."""

    version: int
    error: str = ""  # why the active version could not be loaded
    canary: CanarySeen | None = None  # None until a canary drafts


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
    """The engine, as the API uses it. Every method is thread-safe."""

    def submit(self, query: Query, on_delta: Callable[[Delta], None]) -> None:
        """Queues a query. Deltas arrive on the engine's thread.

        Raises:
            Overloaded: the queue is full.
            Unavailable: the engine is dead.
        """

    def cancel(self, query_id: str) -> None:
        """Ends a query early. Unknown ids are ignored."""

    def status(self) -> EngineStatus: ...

    def nudge(self) -> None:
        """Makes the engine look for a new activation now, without waiting for the next poll."""


class TextCodec(Protocol):
    """The target's tokenizer, as the API uses it."""

    model_name: str
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def token(self, token_id: int) -> str: ...
