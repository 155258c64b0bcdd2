"""Methods of token reduction: a name, and a factory whose arguments are the method's options."""

from collections.abc import Callable

from ..names import lookup
from ..reduction import Method
from .controls import prune, random
from .mtr import all_others, mtr, next_in_rank

__all__ = ["METHODS", "all_others", "get", "mtr", "next_in_rank", "prune", "random"]

METHODS: dict[str, Method | Callable[[], Method]] = {
    "mtr": mtr,
    "prune": prune,
    "random": random,
}


def get(name: str) -> Method:
    """The method of this name with its default options; ValueError with the nearest name where there is none."""
    entry = lookup("method", name, METHODS)
    return entry if isinstance(entry, Method) else entry()
