"""What takes part in a comparison: a method, and how a wanted saving becomes its schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from .apply import reduce
from .flops import Trunk, count_flops, solve
from .reduction import Method, Schedule

Scheduler = Callable[[Trunk, float, Method], Schedule]


def in_stages(blocks: Sequence[int] | Callable[[int], Sequence[int]] | None = None) -> Scheduler:
    """The same share of the patches goes at each of a few blocks, such that the saving is reached.

    Args:
        blocks: 0-based blocks after which patches go, or a function from the depth of a model to them; by default
            those of `solve`.
    """

    def schedule(model: Trunk, target: float, method: Method) -> Schedule:
        depth = len(count_flops(model).lengths)
        return solve(model, target, blocks(depth) if callable(blocks) else blocks, method=method)

    return schedule


def nearest(candidates: Callable[[Trunk], Iterable[Schedule]]) -> Scheduler:
    """The schedule of a family whose saving is nearest, for methods that come with schedules of their own.

    Args:
        candidates: all schedules that may be chosen for a model; those that it cannot run are passed over.
    """

    def schedule(model: Trunk, target: float, method: Method) -> Schedule:
        found: list[tuple[float, Schedule]] = []
        for each in candidates(model):
            try:
                saved = 1 - count_flops(reduce(cast(Any, model), schedule=each, method=method)).ratio
            except ValueError:  # more patches than there are
                continue
            found.append((abs(saved - target), each))
        if not found:
            raise ValueError(f"method {method.name!r} has no schedule of its own that this model can run")
        return min(found, key=lambda pair: pair[0])[1]

    return schedule


@dataclass(frozen=True)
class Entry:
    """A method, and how a saving becomes its schedule: `in_stages(...)` or `nearest(...)`."""

    method: Method
    schedule: Scheduler = field(default_factory=in_stages)


Entrant = Method | Entry | nn.Module
