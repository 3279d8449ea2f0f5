"""Divergences between target and draft, per position. Training makes one of them small.

Each module of this package registers one divergence; importing the package
registers all. To add one, add a module and its test: recipes validate by
the registry, and `searched=True` makes it a candidate of the recipe search.

Legend: P supervised positions · C classes (see `trainer.truncated`).
"""

from importlib import import_module
from pkgutil import iter_modules

from trainer.divergences.registry import (
    Divergence,
    divergence,
    names,
    searched_names,
)

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["Divergence", "divergence", "names", "searched_names"]
