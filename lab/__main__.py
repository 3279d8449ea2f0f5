"""`python -m lab COMMAND`: every command explains itself with --help, and ends with one line of JSON."""

import sys
from importlib import import_module

from online.errors import SlipstreamError

COMMANDS = {
    "demo": ("lab.demo", "serve, learn and swap on this machine, and show what it gained"),
    "bench": (
        "lab.bench",
        "measure this engine beside transformers, under load, with swaps, with the recorder",
    ),
    "replay": (
        "lab.replay",
        "replay real queries through the whole loop, and compare ways to learn",
    ),
    "gate": ("lab.gate", "how often the gate is wrong, on real signals"),
    "warm-up": (
        "lab.warmup.align",
        "a draft for a target without traffic: initialise, answer prompts, distil, register",
    ),
    "cold-start": (
        "lab.warmup.cold_start",
        "prompts from nothing: where two students disagree, beside random ones",
    ),
    "g2sd": (
        "lab.warmup.generic",
        "features on any text first, outputs on one domain then, beside one stage",
    ),
    "two-stage": (
        "lab.warmup.two_stage",
        "a smaller target from a larger one, and a draft for it: what it costs and gains",
    ),
    "reference-pair": ("lab.reference_pair", "train the embedded target, draft and tokenizer anew"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        listing = "\n".join(f"  {name:16} {what}" for name, (_, what) in COMMANDS.items())
        print(f"usage: python -m lab COMMAND [--help]\n\n{listing}")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    command = sys.argv.pop(1)
    try:
        import_module(COMMANDS[command][0]).main()
    except (SlipstreamError, ValueError, OSError) as error:
        sys.exit(f"{command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{command}: stopped")


if __name__ == "__main__":
    main()
