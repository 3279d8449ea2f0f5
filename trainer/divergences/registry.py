"""The registry of divergences: which exist, which take β, which the recipe search tries."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]  # p_PC, draft_logp_PC → loss [P]
Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True, slots=True)
class _Entry:
    function: Callable[..., Tensor]
    takes_beta: bool
    searched: bool


_REGISTRY: dict[str, _Entry] = {}


def register(
    name: str, *, takes_beta: bool = False, searched: bool = False
) -> Callable[[Function], Function]:
    """Makes a divergence available to recipes as `name`.

    `takes_beta`: it has a third argument, the recipe's β. `searched`: the
    recipe search tries it.

    Raises:
        ValueError: the name is taken.
    """

    def add(function: Function) -> Function:
        if name in _REGISTRY:
            raise ValueError(f"divergence: {name!r} is registered twice")
        _REGISTRY[name] = _Entry(function, takes_beta, searched)
        return function

    return add


def names() -> list[str]:
    return list(_REGISTRY)


def searched_names() -> list[str]:
    """Divergences that the recipe search tries beside the configured one."""
    return [name for name, entry in _REGISTRY.items() if entry.searched]


def divergence(name: str, beta: float) -> Divergence:
    """The divergence that a recipe names. Only some depend on β.

    Raises:
        ValueError: no such divergence.
    """
    if name not in _REGISTRY:
        raise ValueError(f"divergence: {name!r} is none of {', '.join(_REGISTRY)}")
    entry = _REGISTRY[name]
    return partial(entry.function, beta=beta) if entry.takes_beta else entry.function
