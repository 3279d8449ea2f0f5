"""Every setting of every process, read from SLIPSTREAM_* variables at an entry point."""

import difflib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import NonNegativeInt, TypeAdapter, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from online.settings.learning import RolloutSettings, SignalSettings, TrainingSettings
from online.settings.serving import ModelSettings, ServingSettings, StorageSettings
from online.settings.types import is_route_name
from online.speculation import DraftingOptions

log = logging.getLogger("slipstream.settings")

PREFIX = "SLIPSTREAM_"
_COUNT = TypeAdapter(NonNegativeInt)


# Pydantic lists the fields of the last base first.
class Settings(
    RolloutSettings,
    TrainingSettings,
    SignalSettings,
    ServingSettings,
    ModelSettings,
    StorageSettings,
    BaseSettings,
):
    """The defaults run the whole stack on one machine with nothing installed."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    @model_validator(mode="after")
    def _routes_are_consistent(self) -> Self:
        if not self.routes:
            raise ValueError("routes: at least one is needed")
        for name in ("closed_routes", "drafters"):
            if unknown := set(getattr(self, name)) - set(self.routes):
                raise ValueError(f"{name}: {sorted(unknown)} are not among routes")
        return self

    @model_validator(mode="after")
    def _clusters_are_possible(self) -> Self:
        if not self.learnt_routes:
            return self
        if taken := set(self.cluster_routes) & set(self.routes):
            raise ValueError(
                f"learnt_routes: {sorted(taken)} would be names of clusters, but are among routes"
            )
        if not is_route_name(longest := self.cluster_routes[-1]):
            raise ValueError(f"learnt_routes: {longest!r} is too long a name for a route")
        if self.default_route in self.closed_routes:
            raise ValueError(
                "learnt_routes: the default route is closed, so nothing would be learnt"
            )
        return self

    @model_validator(mode="after")
    def _numbers_are_consistent(self) -> Self:
        if self.canary_requests < self.guard_requests:
            raise ValueError(
                "canary_requests is below guard_requests: no canary would ever be compared"
            )
        if self.cycle_max_signals < self.cycle_min_signals:
            raise ValueError("cycle_max_signals is below cycle_min_signals")
        return self

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        if bool(self.admin_keys) != bool(self.generation_keys):
            raise ValueError(
                "generation_keys and admin_keys go together: "
                "with only one of them, the other half of the API would stand open"
            )
        return self

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.absolute()}/slipstream.db"

    @property
    def artifacts_path(self) -> Path:
        return (self.artifacts_dir or self.data_dir / "artifacts").absolute()

    @property
    def default_route(self) -> str:
        return self.routes[0]

    @property
    def cluster_routes(self) -> tuple[str, ...]:
        """Parts of the default route. Prompts are sorted into them; no request can name one."""
        numbers = range(1, self.learnt_routes + 1)
        return tuple(f"{self.default_route}-c{number}" for number in numbers)

    @property
    def served_routes(self) -> tuple[str, ...]:
        return self.routes + self.cluster_routes

    @property
    def bind_host(self) -> str:
        """Without keys the server stays on loopback unless `host` names an address."""
        return self.host or ("0.0.0.0" if self.admin_keys else "127.0.0.1")

    def drafting(self, route: str) -> DraftingOptions:
        """Default drafting options of a route. A cluster has those of the default route."""
        name = self.default_route if route in self.cluster_routes else route
        return self.drafters.get(name, DraftingOptions())

    @property
    def branch_tokens(self) -> int:
        """Tokens recorded of each rejected branch: as many as the recipe learns from.

        Raises:
            ValidationError: the recipe's value is not a count.
        """
        return _COUNT.validate_python(self.recipe.get("branch_tokens", 0))

    def redis_bytes(self, routes: int) -> int:
        """Memory that Redis needs for this many routes: signals, kept samples, some room."""
        return routes * self.buffer_bytes * 3 // 2 + 2**28


def warn_about_unknown_variables(names: Iterable[str] | None = None) -> None:
    """Logs a warning for each SLIPSTREAM_* variable that is no setting: it has no effect.

    `names`: variables to check; None: those of this process.
    """
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(os.environ if names is None else names):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            similar = difflib.get_close_matches(name.upper(), known, 1, 0.85)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            log.warning("%s is not a setting and has no effect%s", name, hint)
