"""Prometheus metrics of one decoder process. The names are in `online.metric_tables`."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from online.messages import MAX_GAMMA, SpeculationStats
from online.metric_tables import LoopMetrics, ModelMetrics


class ServiceMetrics(LoopMetrics):
    """All metrics, in a registry of their own: several engines in a process share no counters."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)
        self.model = ModelMetrics(self.registry)
        self._name = model_name
        # Looking a label up costs more than counting: each step uses these.
        self._generated = self.model.generation_tokens.labels(model_name)
        self._drafts = self.model.drafts.labels(model_name)
        self._drafted = self.model.draft_tokens.labels(model_name)
        self._accepted = self.model.accepted_tokens.labels(model_name)
        self._running = self.model.running.labels(model_name)
        self._waiting = self.model.waiting.labels(model_name)
        self._usage = self.model.cache_usage.labels(model_name)
        self._accepted_at = [
            self.model.accepted_at.labels(model_name, str(position))
            for position in range(MAX_GAMMA)
        ]

    def step(self, drafted: Sequence[int], accepted: Sequence[int], emitted: int) -> None:
        """Counts one step. `drafted`, `accepted`: tokens of each sequence.

        Sums come first, because a counter costs more than an addition.
        """
        self._generated.inc(emitted)
        drafts = sum(count > 0 for count in drafted)
        if not drafts:
            return
        self._drafts.inc(drafts)
        self._drafted.inc(sum(drafted))
        self._accepted.inc(sum(accepted))
        for position in range(max(accepted)):
            self._accepted_at[position].inc(sum(count > position for count in accepted))

    def prefix(self, tokens: int, reused: int) -> None:
        self.model.prefix_queries.labels(self._name).inc(tokens)
        self.model.prefix_hits.labels(self._name).inc(reused)

    def admitted(self, prompt_tokens: int, queued_s: float) -> None:
        self.model.prompt_tokens.labels(self._name).inc(prompt_tokens)
        self.model.queue_time.labels(self._name).observe(queued_s)

    def finished(
        self, reason: str, stats: SpeculationStats, first_s: float | None, total_s: float
    ) -> None:
        """Counts a finished sequence. `first_s`: seconds to its first token, if it has one."""
        tokens = stats.versions[-1][1] if stats.versions else 0
        self.model.success.labels(self._name, reason).inc()
        self.model.e2e.labels(self._name).observe(total_s)
        if first_s is None:
            return
        self.model.ttft.labels(self._name).observe(first_s)
        if tokens > 1:
            self.model.itl.labels(self._name).observe((total_s - first_s) / (tokens - 1))

    def occupancy(self, running: int, waiting: int, slots: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._usage.set(running / slots)

    def signal_written(self, route: str, size: int) -> None:
        self.signals_written.labels(route).inc()
        self.signal_bytes.labels(route).inc(size)

    def signal_dropped(self, route: str, reason: str) -> None:
        self.signals_dropped.labels(route, reason).inc()
