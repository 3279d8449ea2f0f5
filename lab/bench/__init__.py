"""Benchmarks of the engine; `python -m lab bench` lists them."""
