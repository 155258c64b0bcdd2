"""FLOPs of a model under its reducer, and the schedule that reaches a wanted saving. One multiply-add is one FLOP."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

from . import methods
from .reduction import Cost, Method, Reducer, Schedule, default_stages

# how far from the wanted saving `solve` may land: half a point
TOLERANCE = 0.005

ImageSize = int | tuple[int, ...] | None


class Trunk(Protocol):
    """What counting asks of a model; an image size of None is the model's own."""

    reducer: Reducer

    @property
    def depth(self) -> int:
        """Blocks."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""

    @property
    def d_inner(self) -> int:
        """Channels of the scan."""

    def special_tokens(self, image_size: ImageSize) -> tuple[int, ...]:
        """Where the stem puts class and register tokens."""

    def num_patches(self, image_size: ImageSize) -> int:
        """Patches that the stem makes."""

    def stem_cost(self, image_size: ImageSize) -> Cost:
        """Cost of the patch embedding."""

    def block_cost(self, length: int) -> Cost:
        """Cost of one block on `length` tokens."""

    def head_cost(self) -> Cost:
        """Cost of the classifier."""


class Whole(Protocol):
    """What counting asks of a model whose tokens all stay."""

    def cost(self, image_size: ImageSize) -> Cost:
        """Cost of one image."""


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one image.

    total: stem, blocks, reduction and head.
    dense_total: the same model without reduction.
    ratio: total / dense_total.
    per_block: each block, without the reduction after it.
    reduction: scores, matching and merging of all steps together.
    lengths: tokens that enter each block; none, and no per_block, for a model on a grid, which keeps all its tokens.
    convention: which of `reduction.CONVENTIONS` counted.
    """

    total: int
    dense_total: int
    ratio: float
    per_block: tuple[int, ...]
    reduction: int
    lengths: tuple[int, ...]
    convention: str


def count_flops(model: Trunk | Whole, image_size: ImageSize = None, convention: str = "both") -> FlopsReport:
    """Count the model as its reducer runs it.

    Args:
        model: any model of the zoo.
        image_size: side or sides of the input; the model's own by default.
        convention: "both" scan directions (what runs), "paper" (one direction, as R-MeeTo and DyVM count), or
            "projections" (the scan unseen). The ratio hardly differs between them.
    """
    reducer: Reducer | None = getattr(model, "reducer", None)
    if reducer is None:
        total = cast(Whole, model).cost(image_size).total(convention)
        return FlopsReport(total, total, 1.0, (), 0, (), convention)
    trunk = cast(Trunk, model)
    schedule = reducer.schedule if reducer.schedule.depth else Schedule.none(trunk.depth)
    return _count(trunk, schedule, reducer.method, image_size, convention)


def solve(
    model: Trunk,
    target: float,
    stages: Sequence[int] | None = None,
    image_size: ImageSize = None,
    method: Method | None = None,
    convention: str = "both",
) -> Schedule:
    """Find the schedule that saves a share of the FLOPs, the cost of the reduction itself included.

    Args:
        target: share to save, from 0 up to below 0.9.
        stages: 0-based blocks after which patches go, the same share of them at each; by default three, as in
            `default_stages`.
        image_size: as in `count_flops`.
        method: whose own cost is counted; MTR by default.
        convention: as in `count_flops`.

    Returns:
        A schedule within half a point of the target.

    Raises:
        ValueError: where no such schedule comes that near; the message says how near it can come.
    """
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 <= target < 0.9:
        raise ValueError(f"the share of FLOPs to save must be from 0 up to below 0.9, got {target!r}")
    if target == 0:
        return Schedule.none(model.depth)
    method = methods.get("mtr") if method is None else method
    after = tuple(sorted(default_stages(model.depth) if stages is None else stages))
    patches = model.num_patches(image_size)

    @cache
    def saving(schedule: Schedule) -> float:
        return 1 - _count(model, schedule, method, image_size, convention).ratio

    less, more = _bracket(lambda keep: Schedule.stages(model.depth, patches, after, keep), saving, target)
    near = [nearby for base in (less, more) for nearby in _neighbours(base, after, patches)]
    best = min(near, key=lambda schedule: abs(saving(schedule) - target))
    if abs(saving(best) - target) > TOLERANCE:
        raise ValueError(
            f"no schedule with stages after blocks {after} saves {target:.1%} of the FLOPs; "
            f"the nearest saves {saving(best):.1%}"
        )
    return best


def _bracket(
    build: Callable[[float], Schedule], saving: Callable[[Schedule], float], target: float
) -> tuple[Schedule, Schedule]:
    """Bisect the share kept: the schedules just below and just above the target."""
    low, high = 0.0, 1.0  # low saves more
    for _ in range(30):
        keep = (low + high) / 2
        low, high = (keep, high) if saving(build(keep)) > target else (low, keep)
    return build(high), build(max(low, 2.0**-30))


def _neighbours(base: Schedule, after: tuple[int, ...], patches: int) -> list[Schedule]:
    """Schedules that remove a few patches more or less at the last two stages; a late stage is the finest step."""
    found = []
    for late, early in itertools.product(range(-8, 9), range(-2, 3) if len(after) > 1 else (0,)):
        removed = list(base.removed)
        removed[after[-1]] += late
        if early:
            removed[after[-2]] += early
        if min(removed) >= 0 and sum(removed) < patches:
            found.append(Schedule(tuple(removed)))
    return found


def _count(model: Trunk, schedule: Schedule, method: Method, image_size: ImageSize, convention: str) -> FlopsReport:
    if schedule.depth != model.depth:
        raise ValueError(f"the schedule is for {schedule.depth} blocks, but the model has {model.depth}")

    @cache
    def block(length: int) -> int:
        return model.block_cost(length).total(convention)

    special, patches = len(model.special_tokens(image_size)), model.num_patches(image_size)
    lengths = tuple(length + special for length in schedule.lengths(patches))
    per_block = tuple(block(length) for length in lengths)
    steps = zip(lengths, schedule.removed, strict=True)
    own = [method.cost(length - special, r, model.d_model, model.d_inner) for length, r in steps if r]
    reduction = Cost(reduction=sum(own)).total(convention)
    ends = (model.stem_cost(image_size) + model.head_cost()).total(convention)
    dense = ends + model.depth * block(patches + special)
    total = ends + sum(per_block) + reduction
    return FlopsReport(total, dense, total / dense, per_block, reduction, lengths, convention)
