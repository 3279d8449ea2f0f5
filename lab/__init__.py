"""Demo, replays, benchmarks and studies; `python -m lab --help` lists the commands."""
