"""`python -m lab COMMAND`: every command explains itself with --help, and ends with one line of JSON."""

import sys
from importlib import import_module

COMMANDS = {
    "demo": ("lab.demo", "serve, learn and swap on this machine, and show what it gained"),
    "bench": ("lab.bench", "measure this engine beside transformers, under load, with swaps, with the recorder"),
    "replay": ("lab.replay", "replay real queries through the whole loop, and compare ways to learn"),
    "distil": ("lab.distil", "warm a draft up on prompts, offline"),
    "gate": ("lab.gate", "how often the gate is wrong, on real signals"),
    "reference-pair": ("lab.reference_pair", "train the embedded target, draft and tokenizer anew"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        listing = "\n".join(f"  {name:16} {what}" for name, (_, what) in COMMANDS.items())
        print(f"usage: python -m lab COMMAND [--help]\n\n{listing}")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    command = sys.argv.pop(1)
    import_module(COMMANDS[command][0]).main()


if __name__ == "__main__":
    main()
