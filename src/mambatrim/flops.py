"""FLOPs of a model under its reducer, and the schedule that reaches a wanted saving. One multiply-add is one FLOP."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

from . import methods
from .reduction import STEM, Cost, Method, Reducer, Schedule, Section, default_stages
from .reduction.schedule import checked_blocks

# how far from the wanted saving `solve` may land: half a point
TOLERANCE = 0.005

ImageSize = int | tuple[int, ...] | None


class Trunk(Protocol):
    """What counting asks of a flat model; an image size of None is the model's own."""

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


class Pyramid(Protocol):
    """What counting asks of a model whose tokens are all there again behind every section."""

    reducer: Reducer

    def special_tokens(self, image_size: ImageSize) -> tuple[int, ...]:
        """Where the stem puts class and register tokens."""

    def sections(self, image_size: ImageSize) -> tuple[Section, ...]:
        """Blocks that lose tokens together, one section behind the other."""

    def stem_cost(self, image_size: ImageSize) -> Cost:
        """Cost of the patch embedding, and of what else is no block."""

    def head_cost(self) -> Cost:
        """Cost of the classifier."""


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one image.

    total: stem, blocks, reduction and head.
    dense_total: the same model without reduction.
    ratio: total / dense_total.
    per_block: each block, without the reduction after it.
    reduction: scores, matching and merging of all steps together.
    lengths: tokens that enter each block; in a stage with windows, those of one window.
    convention: which of `reduction.CONVENTIONS` counted.
    """

    total: int
    dense_total: int
    ratio: float
    per_block: tuple[int, ...]
    reduction: int
    lengths: tuple[int, ...]
    convention: str


def sections(model: Trunk | Pyramid, image_size: ImageSize = None) -> tuple[Section, ...]:
    """The sections of a pyramid; a flat model is one."""
    own = getattr(model, "sections", None)
    if own is not None:
        return cast(Pyramid, model).sections(image_size)
    flat = cast(Trunk, model)
    patches, special = flat.num_patches(image_size), len(flat.special_tokens(image_size))
    costs = (flat.block_cost,) * flat.depth
    return (Section(patches, flat.d_model, flat.d_inner, costs, default_stages(flat.depth), special),)


def count_flops(model: Trunk | Pyramid, image_size: ImageSize = None, convention: str = "both") -> FlopsReport:
    """Count the model as its reducer runs it.

    Args:
        model: any model of the zoo.
        image_size: side or sides of the input; the model's own by default.
        convention: "both" scan directions (what runs), "paper" (one direction, as R-MeeTo and DyVM count), or
            "projections" (the scan unseen). The ratio hardly differs between them.
    """
    reducer, parts = model.reducer, sections(model, image_size)
    schedule = reducer.schedule if reducer.schedule.depth else Schedule.none(_depth(parts))
    return _count(model, parts, schedule, reducer.method, image_size, convention)


def solve(
    model: Trunk | Pyramid,
    target: float,
    stages: Sequence[int] | None = None,
    image_size: ImageSize = None,
    method: Method | None = None,
    convention: str = "both",
) -> Schedule:
    """Find the schedule that saves a share of the FLOPs, the cost of the reduction itself included.

    Args:
        target: share to save, from 0 up to below 0.9.
        stages: blocks after which patches go, 0-based, or STEM, the same share of them at each; by default those of the
            method, three unless it says otherwise; and three in each stage of a pyramid that has as many blocks.
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
    parts = sections(model, image_size)
    depth = _depth(parts)
    if target == 0:
        return Schedule.none(depth)
    method = methods.get("mtr") if method is None else method
    usual = method.stages(depth)
    if len(parts) > 1:
        usual = tuple(start + block for start, part in _starts(parts) for block in part.after)
    after = checked_blocks(usual if stages is None else stages, depth)
    if STEM in after:
        refuse_stem(model)
    if not after:
        raise ValueError("no stage of this model has three blocks, so say after which blocks tokens go: stages=...")

    @cache
    def saving(schedule: Schedule) -> float:
        return 1 - _count(model, parts, schedule, method, image_size, convention).ratio

    def build(keep: float) -> Schedule:
        counts: dict[int, int] = {}
        for start, part in _starts(parts):
            first = start or STEM
            own = [block - start for block in after if first <= block < start + part.depth]
            schedule = Schedule.stages(part.depth, part.patches, own, keep)
            counts |= {start + block: schedule.at(block) for block in own}
        return Schedule.from_counts(depth, counts)

    less, more = _bracket(build, saving, target)
    near = [nearby for base in (less, more) for nearby in _neighbours(base, after, parts)]
    best = min(near, key=lambda schedule: abs(saving(schedule) - target))
    if abs(saving(best) - target) > TOLERANCE:
        raise ValueError(
            f"no schedule with stages after blocks {after} saves {target:.1%} of the FLOPs; "
            f"the nearest saves {saving(best):.1%}"
        )
    return best


def refuse_stem(model: object) -> None:
    """ValueError unless patches can go before block 0 of the model."""
    if not getattr(model, "reduces_stem", False):
        raise ValueError(
            f"patches cannot go before block 0 of {type(model).__name__}: only Vim, VideoMamba and Mamba-Reg can lose "
            "some there"
        )


def _bracket(
    build: Callable[[float], Schedule], saving: Callable[[Schedule], float], target: float
) -> tuple[Schedule, Schedule]:
    """Bisect the share kept: the schedules just below and just above the target."""
    low, high = 0.0, 1.0  # low saves more
    for _ in range(30):
        keep = (low + high) / 2
        low, high = (keep, high) if saving(build(keep)) > target else (low, keep)
    return build(high), build(max(low, 2.0**-30))


def _neighbours(base: Schedule, after: tuple[int, ...], parts: Sequence[Section]) -> list[Schedule]:
    """Schedules that remove a few patches more or less at the last two stages; a late stage is the finest step."""
    found = []
    for late, early in itertools.product(range(-8, 9), range(-2, 3) if len(after) > 1 else (0,)):
        counts = {block: base.at(block) for block in after}
        counts[after[-1]] += late
        if early:
            counts[after[-2]] += early
        if min(counts.values()) < 0:
            continue
        schedule = Schedule.from_counts(base.depth, counts)
        if all(part.patches > schedule.only(start, part.depth).total for start, part in _starts(parts)):
            found.append(schedule)
    return found


def _count(
    model: Trunk | Pyramid,
    parts: Sequence[Section],
    schedule: Schedule,
    method: Method,
    image_size: ImageSize,
    convention: str,
) -> FlopsReport:
    if schedule.depth != _depth(parts):
        raise ValueError(f"the schedule is for {schedule.depth} blocks, but the model has {_depth(parts)}")

    @cache
    def block(cost: Callable[..., Cost], length: int, stem: int) -> int:
        return cost(length, **method.sequence.positions(length, stem)).total(convention)

    lengths: list[int] = []
    per_block: list[int] = []
    reduction = dense = 0
    for start, part in _starts(parts):
        here = schedule.only(start, part.depth)
        patches = here.lengths(part.patches)[start : start + part.depth]
        before = dict(enumerate(patches, start=start)) | {STEM: part.patches}
        own = [method.cost(before[block], here.at(block), part.d_model, part.d_inner) for block in here.places]
        reduction += part.windows * sum(own)
        lengths += [p + part.special for p in patches]
        stem = part.patches + part.special
        per_block += [block(cost, p + part.special, stem) for cost, p in zip(part.costs, patches, strict=True)]
        dense += sum(block(cost, stem, stem) for cost in part.costs)
    reduction = Cost(reduction=reduction).total(convention)
    ends = (model.stem_cost(image_size) + model.head_cost()).total(convention)
    total, dense = ends + sum(per_block) + reduction, ends + dense
    return FlopsReport(total, dense, total / dense, tuple(per_block), reduction, tuple(lengths), convention)


def _depth(parts: Sequence[Section]) -> int:
    return sum(part.depth for part in parts)


def _starts(parts: Sequence[Section]) -> list[tuple[int, Section]]:
    """Every section with the number of its first block."""
    return list(zip(itertools.accumulate((part.depth for part in parts), initial=0), parts, strict=False))
