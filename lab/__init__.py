"""Demo, replays, benchmarks and warm-up; `python -m lab --help` lists the commands."""
