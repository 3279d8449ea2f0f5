"""`python -m lab COMMAND`: every command has --help, and ends with one line of JSON."""

import sys
from collections.abc import Mapping
from importlib import import_module

from online.errors import SlipstreamError

COMMANDS = {
    "demo": "serve, learn and swap on this machine, and show the gain",
    "bench": "measure the engine: decode, drafters, load, tap, gpu",
    "replay": "replay real queries through the whole loop, and compare configurations",
    "warm-up": "a draft for a target without traffic: initialise, answer prompts, distil, register",
    "cold-start": "prompts from nothing: where two students disagree, compared with random ones",
    "g2sd": "features on any text first, then outputs on one domain, compared with one stage",
    "two-stage": "a smaller target distilled from a larger one, and a draft for it",
    "reference-pair": "train the embedded target, draft and tokenizer anew",
}
BENCHMARKS = {
    "decode": "this engine and transformers: tokens per second alone and in batches",
    "drafters": "every drafter and the chain: τ, verified tokens, tokens per second",
    "load": "steady or Poisson load: latency, swap pauses, nothing leaks, everyone is answered",
    "tap": "the cost of recording signals",
    "gpu": "against the memory-bandwidth floor of a CUDA device",
}
MODULES = {
    **{name: f"lab.{name.replace('-', '_')}" for name in COMMANDS},
    **{f"bench {name}": f"lab.bench.{name}" for name in BENCHMARKS},
    "replay": "lab.replay.command",
    "warm-up": "lab.warmup.align",
    "cold-start": "lab.warmup.cold_start",
    "g2sd": "lab.warmup.generic",
    "two-stage": "lab.warmup.two_stage",
}


def main() -> None:
    name = _chosen("COMMAND", COMMANDS)
    if name == "bench":
        name = f"bench {_chosen('bench NAME', BENCHMARKS)}"
    try:
        import_module(MODULES[name]).main()
    except (SlipstreamError, ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")


def _chosen(usage: str, commands: Mapping[str, str]) -> str:
    """Takes the next word of the command line; without a known one, lists the commands."""
    words = sys.argv[1:]
    if words and words[0] in commands:
        return sys.argv.pop(1)
    listing = "\n".join(f"  {name:16} {what}" for name, what in commands.items())
    print(f"usage: python -m lab {usage} [--help]\n\n{listing}")
    sys.exit(0 if words in ([], ["-h"], ["--help"]) else 2)


if __name__ == "__main__":
    main()
