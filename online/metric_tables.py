"""The metrics by name: vLLM's names for what vLLM has, `slipstream_*` for the training loop."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PAUSE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
MODEL = ("model_name",)
ROUTE = ("route",)


class ModelMetrics:
    """Requests, tokens and occupancy of the served model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        seconds = partial(Histogram, registry=registry, buckets=SECONDS)

        name = "vllm:spec_decode_num_drafts"
        self.drafts = counter(name, "Steps that verified a draft", MODEL)
        name = "vllm:spec_decode_num_draft_tokens"
        self.draft_tokens = counter(name, "Tokens drafted", MODEL)
        name = "vllm:spec_decode_num_accepted_tokens"
        self.accepted_tokens = counter(name, "Drafted tokens accepted", MODEL)
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        by_position = (*MODEL, "position")
        self.accepted_at = counter(name, "Tokens accepted, by position in the draft", by_position)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens", MODEL)
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens generated", MODEL)
        by_reason = (*MODEL, "finished_reason")
        self.success = counter("vllm:request_success", "Finished requests", by_reason)
        name = "vllm:prefix_cache_queries"
        self.prefix_queries = counter(name, "Prompt tokens looked up in the prefix cache", MODEL)
        name = "vllm:prefix_cache_hits"
        self.prefix_hits = counter(name, "Prompt tokens found in the prefix cache", MODEL)

        name = "vllm:time_to_first_token_seconds"
        self.ttft = seconds(name, "Time to the first token", MODEL)
        name = "vllm:e2e_request_latency_seconds"
        self.e2e = seconds(name, "Time from arrival to the last token", MODEL)
        name = "vllm:inter_token_latency_seconds"
        self.itl = seconds(name, "Time per token after the first", MODEL)
        name = "vllm:request_queue_time_seconds"
        self.queue_time = seconds(name, "Time in the queue", MODEL)

        self.running = gauge("vllm:num_requests_running", "Sequences being decoded", MODEL)
        self.waiting = gauge("vllm:num_requests_waiting", "Sequences in the queue", MODEL)
        self.cache_usage = gauge(
            "vllm:kv_cache_usage_perc", "Share of KV cache slots in use", MODEL
        )


class LoopMetrics:
    """Draft versions, swaps, signals, canaries and training cycles, by route."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        by_state = (*ROUTE, "state")

        self.active_version = gauge("slipstream_active_version", "Active draft version", ROUTE)
        self.loaded_version = gauge("slipstream_loaded_version", "Loaded draft version", ROUTE)
        name = "slipstream_live_acceptance"
        self.acceptance = gauge(name, "Live acceptance rate of the loaded version", ROUTE)
        self.swaps = counter("slipstream_swaps", "Draft swaps, by outcome", (*ROUTE, "outcome"))
        self.swap_pause = Histogram(
            "slipstream_swap_pause_seconds",
            "Pause between two steps during a swap",
            buckets=PAUSE_SECONDS,
            registry=registry,
        )

        name = "slipstream_canary_share"
        self.canary_share = gauge(name, "Share of requests that a canary drafts for", ROUTE)
        name = "slipstream_canary_acceptance"
        by_arm = (*ROUTE, "arm")
        self.canary_acceptance = gauge(name, "Acceptance rates in the last canary, by arm", by_arm)
        self.canaries = gauge("slipstream_canaries", "Canaries, by state", by_state)

        self.signals_written = counter("slipstream_signals_written", "Signals written", ROUTE)
        self.signal_bytes = counter("slipstream_signal_bytes", "Bytes of signals written", ROUTE)
        by_reason = (*ROUTE, "reason")
        self.signals_dropped = counter("slipstream_signals_dropped", "Signals dropped", by_reason)
        self.buffer_signals = gauge("slipstream_buffer_signals", "Signals in the buffer", ROUTE)
        self.buffer_bytes = gauge("slipstream_buffer_bytes", "Bytes in the buffer", ROUTE)

        self.cycles = gauge("slipstream_cycles", "Training cycles, by state", by_state)
        name = "slipstream_gate_verdicts"
        by_verdict = (*ROUTE, "verdict")
        self.verdicts = gauge(name, "Candidates evaluated by the gate, by verdict", by_verdict)
        self.faults = counter("slipstream_engine_faults", "Engine steps that failed", ("part",))
