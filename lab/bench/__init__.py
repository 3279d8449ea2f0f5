"""`python -m lab bench NAME`: each benchmark prints a table and ends with one line of JSON; --help explains it."""

import sys
from importlib import import_module

BENCHMARKS = {
    "decode": "this engine beside transformers: tokens per second alone and in batches",
    "drafters": "every way to draft beside the chain: τ, verified tokens, tokens per second",
    "swap": "100 draft swaps under load: requests dropped, longest pause",
    "tap": "what recording signals costs",
    "soak": "a long mixed load with swaps, cancellations and long prompts: nothing leaks, everyone is answered",
    "gpu": "against the memory-bandwidth floor of a CUDA device",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
        listing = "\n".join(f"  {name:8} {what}" for name, what in BENCHMARKS.items())
        print(f"usage: python -m lab bench NAME [--help]\n\n{listing}")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    name = sys.argv.pop(1)
    import_module(f"lab.bench.{name}").main()
