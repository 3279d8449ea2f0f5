"""Replays real queries against a configuration and measures it. `python -m lab --help` lists the commands."""
