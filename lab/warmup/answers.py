"""What every way of warming a draft up shares: the target's answers, a model that learns from them, and its folder."""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from lab import rig, traffic
from lab.stored import stored
from lab.warmup.initial import spread, thinned
from online.messages import Query
from online.signals import Signal, decode
from trainer.batches import step_count
from trainer.distill import Distilled, distill
from trainer.examples import held_out, usable
from trainer.recipe import Recipe

AT_ONCE = 32  # queries answered together
HELD_OUT_GAMMA = 4
BOTH = (0.0, 1.0)  # greedy and sampled traffic in turn: both will be drafted for
SAMPLED = (1.0,)
Prompts = list[list[int]]


def say(line: str) -> None:
    print(line, flush=True)


def add_arguments(parser: argparse.ArgumentParser, prompt_count: int) -> None:
    """Those of a rig, and how prompts are answered and held out."""
    rig.add_arguments(parser)
    parser.set_defaults(prompt_count=prompt_count)
    parser.add_argument(
        "--held-out",
        type=Path,
        help="prompts to judge by (default: one in five, or other files' code)",
    )
    parser.add_argument(
        "--held-out-count",
        type=int,
        default=100,
        help="prompts taken from there (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=96, help="of an answer (default: %(default)s)"
    )


def training_and_held_out(
    args: argparse.Namespace, pair: rig.Pair, temperatures: Sequence[float] = BOTH, gamma: int = 0
) -> tuple[list[Signal], list[Signal]]:
    """The target's answers: those to learn from, and those to judge by."""
    prompts = pair.prompts
    judged = tokenized(pair, args.held_out, args.held_out_count) if args.held_out else []
    if args.prompts is None and not getattr(args, "unprompted", False):
        # Cuts of one file share much of their text: those to learn from are made of other files.
        judged = judged or prompts[: args.held_out_count]
        texts = traffic.package_prompts(
            traffic.shifted_package(), len(prompts), held_out=False, seed=2
        )
        prompts = [rig.tokenize(pair.tokenizer, text) for text in texts]
    signals = answers(
        pair, prompts + judged, args.max_tokens, temperatures=temperatures, gamma=gamma
    )
    if not judged:
        return [s for s in signals if not held_out(s)], [s for s in signals if held_out(s)]
    learnt = {f"q{i}" for i in range(len(prompts))}
    return [s for s in signals if s.request_id in learnt], [
        s for s in signals if s.request_id not in learnt
    ]


def tokenized(pair: rig.Pair, path: Path, count: int) -> Prompts:
    tokenizer = pair.tokenizer
    return [rig.tokenize(tokenizer, text) for text in rig.read_prompts(path, count)]


def answers(
    pair: rig.Pair,
    prompts: Prompts,
    max_tokens: int,
    name: str = "q",
    seed: int = 0,
    temperatures: Sequence[float] = BOTH,
    gamma: int | None = 0,
) -> list[Signal]:
    """What the target said and thought, by the path that the service takes; in the prompts' order.

    Prompts take the temperatures in turn. Answers that teach nothing are left out. γ None: the engine's own choice.
    """
    heat = itertools.cycle(temperatures)
    queries = [
        Query(
            f"{name}{i}",
            rig.ROUTE,
            tuple(prompt),
            max_tokens,
            next(heat),
            seed=seed + i,
            gamma=gamma,
        )
        for i, prompt in enumerate(prompts)
    ]
    started = time.monotonic()
    with rig.rig(
        replace(pair, prompts=prompts), pair.files.draft, AT_ONCE, max_tokens=max_tokens
    ) as serving:
        for at in range(0, len(queries), 8 * AT_ONCE):
            serving.complete(queries[at : at + 8 * AT_ONCE])
            done = min(at + 8 * AT_ONCE, len(queries))
            say(f"answered {done} of {len(queries)}, {time.monotonic() - started:.0f} s")
        # The step that ended the last answers has handed them to the recorder.
        serving.engine.between_steps(lambda: None).result()
        serving.recorder.stop(60)
        records = [entry.record for entry in stored(serving.buffer, rig.ROUTE)]
        vocab_size = serving.engine.batch.target.vocab_size
    torch.set_num_threads(
        pair.threads
    )  # The engine's thread has ended: its cores are free for what learns.
    by_name = {
        signal.request_id: signal for signal in map(decode, records) if usable(signal, vocab_size)
    }
    return [by_name[query.id] for query in queries if query.id in by_name]


def output_tokens(signals: Sequence[Signal]) -> int:
    return sum(len(signal.output_ids) for signal in signals)


def load_model(source: str | Path) -> nn.Module:
    """As it learns: in float32."""
    module: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return module


def stored_dtype(source: str | Path) -> torch.dtype:
    return AutoConfig.from_pretrained(source).dtype or torch.float32


def pad_id(module: nn.Module) -> int:
    return int(module.config.pad_token_id or 0)


def save_model(
    module: nn.Module, folder: Path, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As the service publishes artifacts: one file, tensors under the live module's names."""
    module.to(dtype).save_pretrained(folder, max_shard_size="1TB", save_original_format=False)
    tokenizer.save_pretrained(folder)


def model_from_target(
    target: str, layers: int, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Writes a model of some of the target's layers into `folder`; says which."""
    whole = load_model(target)
    kept = spread(layers, whole.config.num_hidden_layers)
    save_model(thinned(whole, kept), folder, stored_dtype(target), tokenizer)
    return kept


def train(what: str, module: nn.Module, signals: Sequence[Signal], recipe: Recipe) -> Distilled:
    """Distils `module` in place, with a line at every tenth of it."""
    runs = 2 if recipe.selected_share < 1 else 1  # a reference learns first
    return distill(
        module,
        [signals],
        recipe,
        pad_id(module),
        Progress(what, runs * step_count([signals], recipe)),
    )


class Progress:
    """A line at every tenth of a training run."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._started = what, total, 0, time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        if self._done % max(1, self._total // 10) == 0:
            say(
                f"{self._what}: step {self._done} of {self._total}, {time.monotonic() - self._started:.0f} s"
            )
