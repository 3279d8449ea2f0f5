"""Settings of routes and signals, training and rollout."""

from pydantic import BaseModel, Field

from online.settings.types import Routes


class SignalSettings(BaseModel):
    routes: Routes = Field(
        ("default",),
        description="routes, comma-separated; each has its own draft, buffer and history",
    )
    closed_routes: Routes = Field(
        (),
        description="routes whose requests are never recorded",
    )
    learnt_routes: int = Field(
        0,
        ge=0,
        le=8,
        description="maximum number of prompt clusters of the default route with an own draft; "
        "0: none",
    )
    signal_top_k: int = Field(
        32,
        ge=1,
        le=256,
        description="target log-probabilities recorded per position",
    )
    buffer_signals: int = Field(
        20_000,
        ge=1,
        description="signals kept per route",
    )
    buffer_bytes: int = Field(
        256 * 2**20,
        ge=2**16,
        description="bytes of new signals per route; the kept sample may use half as many more",
    )
    retention_s: int = Field(
        7 * 86400,
        ge=60,
        description="age in seconds at which a signal is deleted",
    )


class TrainingSettings(BaseModel):
    cycle_min_signals: int = Field(
        200,
        ge=2,
        description="new signals that start a cycle",
    )
    cycle_max_signals: int = Field(
        2000,
        ge=2,
        description="maximum of signals in the window of one cycle",
    )
    kept_signals: int = Field(
        4000,
        ge=0,
        description="size of the sample of a route's earlier signals, for replay and the gate",
    )
    replay_signals: int = Field(
        400,
        ge=0,
        description="maximum of earlier signals that each pass trains on again",
    )
    search_recipe: bool = Field(
        True,
        description="try a few recipes on a route's own signals and keep the best one "
        "until its traffic shifts",
    )
    client_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="maximum share of one client in the examples and in the held-out set; "
        "1: no limit",
    )
    forgetting_tolerance: float = Field(
        0.03,
        ge=0,
        le=1,
        description="share of tokens per step on earlier traffic that a better draft may lose",
    )
    tick_s: float = Field(
        10.0,
        gt=0,
        description="seconds between two checks whether a cycle is due",
    )
    cycle_limit_s: int = Field(
        1800,
        ge=1,
        description="seconds after which a running cycle is killed",
    )
    lease_s: float = Field(
        30.0,
        gt=0,
        description="seconds without a heartbeat after which another worker takes a cycle over",
    )
    trainer_device: str = Field(
        "cpu",
        description="device of the trainer",
    )
    trainer_threads: int = Field(
        1,
        ge=1,
        description="torch threads of the trainer",
    )
    recipe: dict[str, str | bool | int | float] = Field(
        {},
        description="JSON: changes to the default recipe; fields of trainer.distill.Recipe",
    )


class RolloutSettings(BaseModel):
    poll_s: float = Field(
        0.5,
        gt=0,
        description="seconds between two checks of a decoder for another active version",
    )
    guard_requests: int = Field(
        20,
        ge=2,
        description="requests of a version before its live acceptance may roll it back "
        "or decide a canary",
    )
    canary_share: float = Field(
        0.2,
        ge=0,
        le=0.5,
        allow_inf_nan=False,
        description="share of a route's requests that a canary drafts for; "
        "0: candidates are promoted without a canary",
    )
    canary_requests: int = Field(
        400,
        ge=2,
        description="requests of each version after which the mean acceptance decides a canary",
    )
    canary_margin: float = Field(
        0.03,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="live acceptance that a candidate may lose and still be promoted",
    )
