"""Studies of single questions; `python -m lab --help` lists them."""
