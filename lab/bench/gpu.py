"""`python -m lab bench gpu`: how near decoding comes to the device's limits.

A random Llama-shaped pair, or --target and --draft. Compared are plain decoding of one sequence
with one reading of the target's weights, and a step of γ drafted tokens with one target forward and
γ draft forwards; a swap's pause is timed. On a CPU it is a smoke test.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder.device.placement import device_of
from decoder.models.base import LanguageModel
from lab import rig
from lab.options import PairOptions, option, parse
from lab.output import finish, table
from online.messages import Query

COPIED_BYTES = 1 << 30  # long enough a copy to show the device's bandwidth
CPU_COPIED_BYTES = COPIED_BYTES // 16
FORWARDS, COPIES, SWAPS = 20, 5, 5
CONTEXT = 64  # tokens in the cache of a timed forward
SHAPES = {  # hidden size, intermediate size, layers, heads
    "target": (2048, 8192, 16, 32),
    "draft": (768, 3072, 12, 12),
    "small": (64, 128, 2, 4),
}


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    gamma: int = option(4, "drafted tokens of a step")
    tokens: int = option(200, "decoded for each figure")
    small: bool = option(False, "a tiny random pair, to see that everything runs")


def main() -> None:
    options = parse(Options, "bench gpu", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        if not options.target:
            options = _with_random_pair(options, Path(folder))
        figures = _measure(rig.pair_of(options), options)
    table(["", ""], list(figures.items()))
    finish(figures)


def _with_random_pair(options: Options, folder: Path) -> Options:
    """Weights at random: time does not depend on them. The tokenizer is the embedded pair's."""
    tokenizer = rig.pair_of(options).tokenizer
    for name in ("target", "draft"):
        hidden, intermediate, layers, heads = SHAPES["small" if options.small else name]
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=4,
            max_position_embeddings=4096,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return replace(options, target=str(folder / "target"), draft=str(folder / "draft"))


def _measure(pair: rig.Pair, options: Options) -> dict[str, Any]:
    gamma, tokens, device = options.gamma, options.tokens, device_of(pair.device)
    own = {"gamma": gamma, "max_tokens": tokens, "kept_contexts": 0}
    with rig.rig(pair, pair.files.draft, 1, **own) as serving:
        batch = serving.engine.batch
        target, draft = batch.target, batch.drafts[rig.ROUTE]
        weights = target.weights().values()  # type: ignore[attr-defined]
        plain_s, step_s = (_step_s(serving, pair, tokens, g) for g in (0, gamma))
        live = {name: tensor.clone() for name, tensor in draft.model.weights().items()}

        def pause_s() -> float:
            staged = draft.model.prepare(live)
            return _synchronised_s(lambda: draft.install(staged, 1), device)

        between = serving.engine.between_steps
        pauses_s = [between(pause_s).result() for _ in range(SWAPS)]
        verify_s = between(lambda: _forward_s(target, gamma + 1, device)).result()
        draft_s = between(lambda: _forward_s(draft.model, 1, device)).result()
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    floor_s = weight_bytes / _bandwidth(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "target_parameters": sum(tensor.numel() for tensor in weights),
        "plain_ms_per_token": round(1000 * plain_s, 3),
        "weights_read_ms": round(1000 * floor_s, 3),
        "floor_vs_plain": round(floor_s / plain_s, 3),
        "speculative_step_ms": round(1000 * step_s, 3),
        "target_forward_ms": round(1000 * verify_s, 3),
        "draft_forward_ms": round(1000 * draft_s, 3),
        "step_vs_forwards": round(step_s / (verify_s + gamma * draft_s), 3),
        "swap_pause_ms": round(1000 * statistics.median(pauses_s), 3),
    }


def _step_s(serving: rig.Rig, pair: rig.Pair, tokens: int, gamma: int) -> float:
    """Mean time between two steps of one sequence, after a first run to warm up."""
    query = Query(
        id="step",
        route=rig.ROUTE,
        prompt_ids=tuple(pair.prompts[0]),
        max_tokens=tokens,
        temperature=0.0,
        gamma=gamma,
        ignore_eos=True,
        store=False,
    )
    serving.complete([query])
    (answer,) = serving.complete([query])
    arrivals = answer.arrivals
    return (arrivals[-1][0] - arrivals[0][0]) / (len(arrivals) - 1)


def _forward_s(model: LanguageModel, new: int, device: torch.device) -> float:
    ids = torch.ones((1, new), dtype=torch.long, device=device)
    starts = torch.full((1,), CONTEXT, device=device)
    forward = lambda: model.forward(slice(0, 1), ids, starts, CONTEXT + new)
    forward()
    return statistics.median(_synchronised_s(forward, device) for _ in range(FORWARDS))


def _bandwidth(device: torch.device) -> float:
    """Bytes a second, by a copy within the device, which reads and writes."""
    size = COPIED_BYTES if device.type == "cuda" else CPU_COPIED_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    there = torch.empty_like(source)
    there.copy_(source)
    fastest_s = min(_synchronised_s(lambda: there.copy_(source), device) for _ in range(COPIES))
    return 2 * size / fastest_s


def _synchronised_s(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
