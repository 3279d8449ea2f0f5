"""Prometheus metrics of one decoder process: vLLM's names for what vLLM has, `slipstream_*` for the loop."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from online.messages import MAX_GAMMA, SpeculationStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServiceMetrics:
    """Each instance has its own registry, so that tests and several engines in a process do not share counters."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        r, by_model = self.registry, ["model_name"]
        self.drafts = Counter(
            "vllm:spec_decode_num_drafts", "Steps that verified a draft", by_model, registry=r
        )
        self.draft_tokens = Counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens drafted", by_model, registry=r
        )
        self.accepted_tokens = Counter(
            "vllm:spec_decode_num_accepted_tokens", "Tokens accepted", by_model, registry=r
        )
        self.accepted_at = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Tokens accepted, by place in the draft",
            ["model_name", "position"],
            registry=r,
        )
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens computed", by_model, registry=r
        )
        self.generation_tokens = Counter(
            "vllm:generation_tokens", "Tokens generated", by_model, registry=r
        )
        self.success = Counter(
            "vllm:request_success",
            "Finished requests",
            ["model_name", "finished_reason"],
            registry=r,
        )
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds",
            "Time to first token",
            by_model,
            buckets=_SECONDS,
            registry=r,
        )
        self.e2e = Histogram(
            "vllm:e2e_request_latency_seconds",
            "Request latency",
            by_model,
            buckets=_SECONDS,
            registry=r,
        )
        self.itl = Histogram(
            "vllm:inter_token_latency_seconds",
            "Time per token after the first",
            by_model,
            buckets=_SECONDS,
            registry=r,
        )
        self.queue_time = Histogram(
            "vllm:request_queue_time_seconds",
            "Time in the queue",
            by_model,
            buckets=_SECONDS,
            registry=r,
        )
        self.running = Gauge(
            "vllm:num_requests_running", "Sequences being decoded", by_model, registry=r
        )
        self.waiting = Gauge(
            "vllm:num_requests_waiting", "Sequences in the queue", by_model, registry=r
        )
        self.cache_usage = Gauge(
            "vllm:kv_cache_usage_perc", "Share of slots in use", by_model, registry=r
        )

        self.prefix_queries = Counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up", by_model, registry=r
        )
        self.prefix_hits = Counter(
            "vllm:prefix_cache_hits", "Prompt tokens not computed again", by_model, registry=r
        )
        self._generated, self._drafts = (
            self.generation_tokens.labels(model_name),
            self.drafts.labels(model_name),
        )
        self._drafted, self._accepted = (
            self.draft_tokens.labels(model_name),
            self.accepted_tokens.labels(model_name),
        )
        self._accepted_at = [self.accepted_at.labels(model_name, str(i)) for i in range(MAX_GAMMA)]
        self._running, self._waiting = (
            self.running.labels(model_name),
            self.waiting.labels(model_name),
        )
        self._usage = self.cache_usage.labels(model_name)

        route = ["route"]
        self.active_version = Gauge(
            "slipstream_active_version", "Version that should serve", route, registry=r
        )
        self.loaded_version = Gauge(
            "slipstream_loaded_version", "Version that serves", route, registry=r
        )
        self.acceptance = Gauge(
            "slipstream_live_acceptance",
            "Live Σ min(p, q) of the loaded version",
            route,
            registry=r,
        )
        self.canary_share = Gauge(
            "slipstream_canary_share",
            "Share of requests that a canary drafts for",
            route,
            registry=r,
        )
        self.canary_acceptance = Gauge(
            "slipstream_canary_acceptance",
            "Σ min(p, q) of either arm of the last canary",
            ["route", "arm"],
            registry=r,
        )
        self.canaries = Gauge(
            "slipstream_canaries", "Canaries, by state", ["route", "state"], registry=r
        )
        self.swaps = Counter("slipstream_swaps", "Draft swaps", ["route", "outcome"], registry=r)
        self.swap_pause = Histogram(
            "slipstream_swap_pause_seconds",
            "Time between two steps that a swap took",
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0),
            registry=r,
        )
        self.signals_written = Counter(
            "slipstream_signals_written", "Signals appended", route, registry=r
        )
        self.signal_bytes = Counter(
            "slipstream_signal_bytes", "Bytes of signals appended", route, registry=r
        )
        self.signals_dropped = Counter(
            "slipstream_signals_dropped", "Signals lost", ["route", "reason"], registry=r
        )
        self.buffer_signals = Gauge(
            "slipstream_buffer_signals", "Signals in the buffer", route, registry=r
        )
        self.buffer_bytes = Gauge(
            "slipstream_buffer_bytes", "Bytes in the buffer", route, registry=r
        )
        self.cycles = Gauge(
            "slipstream_cycles", "Training cycles, by state", ["route", "state"], registry=r
        )
        self.verdicts = Gauge(
            "slipstream_gate_verdicts",
            "Candidates the gate judged",
            ["route", "verdict"],
            registry=r,
        )
        self.faults = Counter("slipstream_engine_faults", "Steps that failed", ["part"], registry=r)

    def step(self, drafted: Sequence[int], accepted: Sequence[int], emitted: int) -> None:
        """One step, by row: summed first, because a counter costs more than an addition."""
        self._generated.inc(emitted)
        if rows := sum(count > 0 for count in drafted):
            self._drafts.inc(rows)
            self._drafted.inc(sum(drafted))
            self._accepted.inc(sum(accepted))
            for position in range(max(accepted)):
                self._accepted_at[position].inc(sum(count > position for count in accepted))

    def prefix(self, tokens: int, reused: int) -> None:
        self.prefix_queries.labels(self._model).inc(tokens)
        self.prefix_hits.labels(self._model).inc(reused)

    def admitted(self, prompt_tokens: int, queued_s: float) -> None:
        self.prompt_tokens.labels(self._model).inc(prompt_tokens)
        self.queue_time.labels(self._model).observe(queued_s)

    def finished(
        self, reason: str, stats: SpeculationStats, first_s: float | None, total_s: float
    ) -> None:
        tokens = stats.versions[-1][1] if stats.versions else 0
        self.success.labels(self._model, reason).inc()
        self.e2e.labels(self._model).observe(total_s)
        if first_s is not None:
            self.ttft.labels(self._model).observe(first_s)
            if tokens > 1:
                self.itl.labels(self._model).observe((total_s - first_s) / (tokens - 1))

    def occupancy(self, running: int, waiting: int, slots: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._usage.set(running / slots)

    def signal_written(self, route: str, size: int) -> None:
        self.signals_written.labels(route).inc()
        self.signal_bytes.labels(route).inc(size)

    def signal_dropped(self, route: str, reason: str) -> None:
        self.signals_dropped.labels(route, reason).inc()
