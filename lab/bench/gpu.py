"""`python -m lab bench gpu`: how near to the device's limits plain decoding, a speculative step and a swap come.

A random Llama-shaped pair (or --target and --draft): plain decoding of one sequence against the time it takes to read
the target's weights once, a step with γ drafted tokens against one target forward and γ draft forwards, and a swap's
pause. Runs on a CPU too, where it is a smoke test.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder.device.placement import device_of
from decoder.models.base import LanguageModel
from lab import rig
from lab.rig import Pair
from online.messages import Query

COPIED_BYTES = 1 << 30  # a copy long enough that the device's bandwidth shows
TARGET_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
}
DRAFT_SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
SMALL_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab bench gpu", description=__doc__)
    rig.add_arguments(parser)
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200, help="decoded for each figure")
    parser.add_argument(
        "--small", action="store_true", help="a tiny random pair, to see that everything runs"
    )
    args = parser.parse_args()
    device = device_of(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if not args.target:
            args.target, args.draft = _random_pair(Path(folder), args.small, rig.pair_of(args))
        figures = _measure(rig.pair_of(args), args.gamma, args.tokens, device)
    for name, value in figures.items():
        print(f"{name:24} {value}")
    print(json.dumps(figures))


def _random_pair(folder: Path, small: bool, embedded: Pair) -> tuple[str, str]:
    """Weights at random: time does not depend on them. The tokenizer is the embedded pair's."""
    for name, shape in (
        ("target", SMALL_SHAPE if small else TARGET_SHAPE),
        ("draft", SMALL_SHAPE if small else DRAFT_SHAPE),
    ):
        config = LlamaConfig(
            vocab_size=len(embedded.tokenizer),
            num_key_value_heads=4,
            max_position_embeddings=4096,
            **shape,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / name)
        embedded.tokenizer.save_pretrained(folder / name)
    return str(folder / "target"), str(folder / "draft")


def _measure(pair: Pair, gamma: int, tokens: int, device: torch.device) -> dict[str, object]:
    with rig.rig(
        pair, pair.files.draft, 1, gamma=gamma, max_tokens=tokens, kept_contexts=0
    ) as serving:
        batch = serving.engine.batch
        target, draft = batch.target, batch.drafts[rig.ROUTE]
        weights = target.weights().values()  # type: ignore[attr-defined]
        target_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights)
        floor_s = target_bytes / _bandwidth(device)
        plain_s, spec_s = (_step_s(serving, pair, tokens, g) for g in (0, gamma))
        outcome: list[float] = []
        live = {name: tensor.clone() for name, tensor in draft.model.weights().items()}

        def swap() -> None:
            staged = draft.model.prepare(live)
            outcome.append(_synchronised_s(lambda: draft.install(staged, 1), device))

        def forwards() -> None:
            outcome.append(_forward_s(target, gamma + 1, device))
            outcome.append(_forward_s(draft.model, 1, device))

        for work in (*[swap] * 5, forwards):
            serving.engine.between_steps(work).result()
        *pauses, verify_s, draft_s = outcome
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "target_parameters": sum(tensor.numel() for tensor in weights),
        "plain_ms_per_token": round(1000 * plain_s, 3),
        "weights_read_ms": round(1000 * floor_s, 3),
        "floor_vs_plain": round(floor_s / plain_s, 3),
        "speculative_step_ms": round(1000 * spec_s, 3),
        "target_forward_ms": round(1000 * verify_s, 3),
        "draft_forward_ms": round(1000 * draft_s, 3),
        "step_vs_forwards": round(spec_s / (verify_s + gamma * draft_s), 3),
        "swap_pause_ms": round(1000 * statistics.median(pauses), 3),
    }


def _step_s(serving: rig.Rig, pair: Pair, tokens: int, gamma: int) -> float:
    query = Query(
        "step",
        rig.ROUTE,
        tuple(pair.prompts[0]),
        tokens,
        0.0,
        gamma=gamma,
        ignore_eos=True,
        store=False,
    )
    serving.complete([query])
    (answer,) = serving.complete([query])
    return (answer.arrivals_s[-1] - answer.arrivals_s[0]) / (len(answer.arrivals_s) - 1)


def _forward_s(model: LanguageModel, new: int, device: torch.device) -> float:
    ids, starts = (
        torch.ones((1, new), dtype=torch.long, device=device),
        torch.full((1,), 64, device=device),
    )
    work = lambda: model.forward(slice(0, 1), ids, starts, 64 + new)
    work()
    return statistics.median(_synchronised_s(work, device) for _ in range(20))


def _bandwidth(device: torch.device) -> float:
    """Bytes a second that can be read, by a copy within the device (which reads and writes)."""
    source = torch.ones(
        COPIED_BYTES // (1 if device.type == "cuda" else 16), dtype=torch.uint8, device=device
    )
    there = torch.empty_like(source)
    there.copy_(source)
    return (
        2
        * len(source)
        / min(_synchronised_s(lambda: there.copy_(source), device) for _ in range(5))
    )


def _synchronised_s(work: Callable[[], object], device: torch.device) -> float:
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    settle()
    started = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - started
