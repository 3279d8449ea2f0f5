"""Every setting of every process, read once at an entry point from SLIPSTREAM_* variables and passed on."""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, TypeAdapter, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from online.messages import MAX_GAMMA
from online.speculation import DraftingOptions

_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_COUNT = TypeAdapter(NonNegativeInt)
CommaSeparated = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Defaults run the whole stack on one machine with nothing installed."""

    model_config = SettingsConfigDict(env_prefix="SLIPSTREAM_", frozen=True, extra="ignore")

    # Where things are kept
    data_dir: Path = Field(
        Path(".slipstream"), description="embedded database, embedded Redis, artifacts"
    )
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in data_dir")
    redis_url: str = Field(
        "", description="redis:// URL of broker and buffer; empty: `slipstream up` starts a server"
    )
    artifacts_dir: Path | None = Field(None, description="draft weights; empty: data_dir/artifacts")

    # Models
    target: str = Field(
        "", description="target: folder or hub id; empty: the embedded reference target"
    )
    draft: str = Field(
        "", description="first draft: folder or hub id; empty: the embedded reference draft"
    )
    model_name: str = Field(
        "", description="name shown by /v1/models; empty: the target's folder or hub name"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N; auto: cuda where there is one")
    dtype: str = Field(
        "auto",
        pattern="^(auto|float32|bfloat16|float16)$",
        description="auto: float32 on a CPU, else as stored",
    )
    threads: int = Field(
        0, ge=0, description="torch threads of the decoder; 0: one fewer than cores"
    )

    # Serving
    host: str = Field(
        "", description="address to bind; empty: loopback without keys, all addresses with keys"
    )
    port: int = Field(8000, ge=0, le=65535)
    generation_keys: CommaSeparated = Field(
        (), description="name:sha256 of each generation key, comma-separated"
    )
    admin_keys: CommaSeparated = Field(
        (), description="name:sha256 of each admin key, comma-separated"
    )
    slots: int = Field(16, ge=1, le=1024, description="sequences decoded together")
    max_waiting: int = Field(
        256, ge=1, description="queued sequences beyond which a request gets 429"
    )
    max_context: int = Field(
        2048, ge=16, description="tokens of prompt and output together, capped by the model's own"
    )
    gamma: int = Field(
        6,
        ge=0,
        le=MAX_GAMMA,
        description="drafted tokens a step, at most: steps draft as many as is fastest",
    )
    drafters: dict[str, DraftingOptions] = Field(
        {},
        description='JSON: by route what drafts where a request does not say, as {"default": {"drafter": "tree"}}',
    )
    lenience_floor: float = Field(
        1.0,
        gt=0,
        le=1,
        description="smallest epsilon of lossy decoding that a request may ask for; 1: all is exact",
    )
    prefill_tokens: int = Field(
        0,
        ge=0,
        description="prompt tokens computed between two steps, at most; 0: 256 on a CPU, else 2048",
    )
    kept_contexts: int = Field(
        8,
        ge=0,
        le=1024,
        description="finished contexts whose beginnings later requests of the route may reuse",
    )

    # Signals
    routes: CommaSeparated = Field(
        ("default",), description="routes, each with a draft, a buffer and a history"
    )
    closed_routes: CommaSeparated = Field((), description="routes whose requests are never logged")
    learnt_routes: int = Field(
        0,
        ge=0,
        le=8,
        description="clusters of the default route's prompts that get a draft each, at most; 0: none",
    )
    signal_top_k: int = Field(
        32, ge=1, le=256, description="target log-probabilities kept per position"
    )
    signal_queue: int = Field(
        256, ge=1, description="finished requests waiting to be written; more are dropped"
    )
    buffer_signals: int = Field(20_000, ge=1, description="signals kept per route")
    buffer_bytes: int = Field(
        256 * 2**20,
        ge=2**16,
        description="bytes of new signals per route; half as many again are kept as a sample",
    )
    retention_s: int = Field(7 * 86400, ge=60, description="age at which a signal is deleted")

    # Training
    cycle_min_signals: int = Field(200, ge=2, description="new signals that start a cycle")
    worth_gain: float = Field(
        0.01,
        ge=0,
        description="gain in tokens per step below which a cycle was not worth it, and the next one waits",
    )
    cycle_max_signals: int = Field(2000, ge=2, description="signals in one cycle's window, at most")
    kept_signals: int = Field(
        4000,
        ge=0,
        description="sample of all of a route's signals, within retention, for replay and the gate",
    )
    replay_signals: int = Field(
        400, ge=0, description="older signals that each pass trains on again, at most"
    )
    held_out_signals: int = Field(
        200, ge=1, description="held-out requests the gate compares on, at most"
    )
    search_recipe: bool = Field(
        True,
        description="try a few recipes on a route's own signals, and keep the best until its traffic shifts",
    )
    client_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of a cycle's lessons, and of its exam, that one client may have; 1: all",
    )
    forgetting_tolerance: float = Field(
        0.03,
        ge=0,
        le=1,
        description="share of its tokens per step on earlier traffic that a better draft may lose",
    )
    tick_s: float = Field(10.0, gt=0, description="how often the trainer looks for work")
    cycle_limit_s: int = Field(1800, ge=1, description="a cycle that runs longer is killed")
    cycle_attempts: int = Field(3, ge=1, description="attempts at one window before it is given up")
    lease_s: float = Field(
        30.0, gt=0, description="silence after which another worker may take a cycle over"
    )
    trainer_device: str = Field("cpu", description="device of the trainer")
    trainer_threads: int = Field(1, ge=1, description="torch threads of the trainer")
    recipe: dict[str, str | bool | int | float] = Field(
        {},
        description="JSON: how drafts are distilled, where other than by default; fields of trainer.distill.Recipe",
    )

    # Swaps and rollback
    poll_s: float = Field(
        0.5, gt=0, description="how often a decoder looks for another active version"
    )
    guard_requests: int = Field(
        20,
        ge=2,
        description="requests on a version before its live acceptance may roll it back or decide a canary",
    )
    canary_share: float = Field(
        0.2,
        ge=0,
        le=0.5,
        allow_inf_nan=False,
        description="share of a route's requests that a candidate drafts for on trial; 0: it is promoted at once",
    )
    canary_requests: int = Field(
        400, ge=2, description="requests on a canary, and beside it, after which the means decide"
    )
    canary_margin: float = Field(
        0.03,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="live acceptance that a candidate may lose and be promoted",
    )

    @field_validator("generation_keys", "admin_keys", "routes", "closed_routes", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )

    @field_validator("routes", "closed_routes")
    @classmethod
    def _route_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _NAME.match(name):
                raise ValueError(
                    f"route {name!r}: lower-case letters, digits, '-' and '_', 63 characters at most"
                )
        return value

    @field_validator("generation_keys", "admin_keys")
    @classmethod
    def _key_hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            name, _, digest = entry.partition(":")
            if not name or not _SHA256.match(digest):
                # The entry itself is not repeated: it may be a key that someone pasted unhashed.
                raise ValueError("each entry is name:sha256, as `slipstream key NAME` prints it")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.routes:
            raise ValueError("routes: at least one is needed")
        if unknown := set(self.closed_routes) - set(self.routes):
            raise ValueError(f"closed_routes: {sorted(unknown)} are not among routes")
        if unknown := set(self.drafters) - set(self.routes):
            raise ValueError(f"drafters: {sorted(unknown)} are not among routes")
        if taken := set(self.cluster_routes) & set(self.routes):
            raise ValueError(
                f"learnt_routes: {sorted(taken)} would be clusters' names, but are among routes"
            )
        if self.learnt_routes and not _NAME.match(self.cluster_routes[-1]):
            raise ValueError(
                f"learnt_routes: {self.cluster_routes[-1]!r} is too long a name for a route"
            )
        if self.learnt_routes and self.default_route in self.closed_routes:
            raise ValueError(
                "learnt_routes: the default route is among closed_routes, so nothing would be learnt"
            )
        if self.canary_requests < self.guard_requests:
            raise ValueError(
                "canary_requests is below guard_requests: no canary would ever be compared"
            )
        if self.cycle_max_signals < self.cycle_min_signals:
            raise ValueError("cycle_max_signals is below cycle_min_signals")
        if bool(self.admin_keys) != bool(self.generation_keys):
            raise ValueError(
                "generation_keys and admin_keys go together: with only one of them the other half stands open"
            )
        return self

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.absolute()}/slipstream.db"

    @property
    def artifacts_path(self) -> Path:
        return (self.artifacts_dir or self.data_dir / "artifacts").absolute()

    @property
    def branch_tokens(self) -> int:
        """Tokens of every rejected branch that recipes learn from, hence that signals hold.

        Raises:
            ValidationError: the recipe's value is not a count.
        """
        return _COUNT.validate_python(self.recipe.get("branch_tokens", 0))

    @property
    def default_route(self) -> str:
        return self.routes[0]

    def drafting(self, route: str) -> DraftingOptions:
        """Of a route's requests, where they don't say; a cluster's is that of the route it is a part of."""
        return self.drafters.get(
            self.default_route if route in self.cluster_routes else route, DraftingOptions()
        )

    @property
    def cluster_routes(self) -> tuple[str, ...]:
        """Parts of the default route that nobody can ask for: prompts are sorted into them."""
        return tuple(
            f"{self.default_route}-c{number}" for number in range(1, self.learnt_routes + 1)
        )

    def redis_bytes(self, routes: int) -> int:
        """What a Redis for so many routes needs: their signals, half as much for samples of them, and some room."""
        return routes * self.buffer_bytes * 3 // 2 + 2**28

    @property
    def served_routes(self) -> tuple[str, ...]:
        return self.routes + self.cluster_routes

    @property
    def bind_host(self) -> str:
        """Without keys the server stays on loopback unless an address is asked for by name."""
        return self.host or ("0.0.0.0" if self.admin_keys else "127.0.0.1")
