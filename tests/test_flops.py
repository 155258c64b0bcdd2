"""FLOPs: published totals by formula, sums that close, and schedules that land on their target."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrim import methods
from mambatrim.flops import count_flops, solve
from mambatrim.reduction import CONVENTIONS, Cost, Reducer, Schedule, default_stages


class Formula:
    """A Vim by the formulas of the literature: 24 blocks, 16 states, patches of 16 pixels, no weights."""

    d_state, channels, classes = 16, 3, 1000

    def __init__(self, d_model: int, depth: int = 24, side: int = 224, patch: int = 16) -> None:
        self.d_model, self.d_inner, self.depth, self.side, self.patch = d_model, 2 * d_model, depth, side, patch
        self.reducer = Reducer.dense()

    def num_patches(self, image_size: int | None) -> int:
        return ((image_size or self.side) // self.patch) ** 2

    def special_tokens(self, image_size: int | None) -> tuple[int, ...]:
        return (self.num_patches(image_size) // 2,)

    def stem_cost(self, image_size: int | None) -> Cost:
        one = self.channels * self.patch**2 * self.d_model
        return Cost(stem=self.num_patches(image_size) * one, quirks=one)

    def head_cost(self) -> Cost:
        return Cost(head=self.classes * self.d_model)

    def block_cost(self, length: int) -> Cost:
        e, n, rank = self.d_inner, self.d_state, -(-self.d_model // 16)
        conv = 4 * e * length
        scan = e * (rank + 2 * n) * length + rank * e * length + 9 * e * n * length + 2 * e * length
        return Cost(
            projections=3 * self.d_model * e * length, conv=conv, scan=scan, directions=conv + scan, quirks=12 * e
        )


@pytest.mark.parametrize(
    ("d_model", "paper", "both", "projections"),
    [(192, "1.449", "1.823", "1.07"), (384, "5.077", "5.912", "4.24"), (768, "18.868", "20.886", "16.85")],
)
def test_published_totals(d_model, paper, both, projections):
    model = Formula(d_model)
    for convention, expected in (("paper", paper), ("both", both), ("projections", projections)):
        report = count_flops(model, convention=convention)
        digits = len(expected.split(".")[1])
        assert f"{report.total / 1e9:.{digits}f}" == expected
        assert report.ratio == 1 and report.reduction == 0


def test_every_part_is_in_the_sum():
    model = Formula(384)
    schedule = Schedule.stages(24, 196)
    model.reducer = Reducer(methods.mtr(), schedule, model.special_tokens(None))
    for convention in CONVENTIONS:
        report = count_flops(model, convention=convention)
        ends = (model.stem_cost(None) + model.head_cost()).total(convention)
        assert report.total == ends + sum(report.per_block) + report.reduction
        assert report.per_block == tuple(model.block_cost(length).total(convention) for length in report.lengths)
        assert report.ratio == report.total / report.dense_total
    assert report.lengths == model.reducer.lengths(197)
    assert report.reduction == sum(
        methods.mtr().cost(patches, r, 384, 768) for patches, r in ((196, 39), (157, 31), (126, 25))
    )


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        # HSA, 197 -> 157 -> 125 -> 101 tokens after blocks 5, 10, 15
        ({4: 40, 9: 32, 14: 24}, 29.8),
        # R-MeeTo without its matching, 11 patches before blocks 2, 4, ..., 22
        (dict.fromkeys(range(1, 22, 2), 11), 30.4),
    ],
)
def test_published_savings(removed, expected):
    """Schedules of the literature on Vim-S, the reduction's own cost left out."""
    model = Formula(384)
    schedule = Schedule(tuple(removed.get(block, 0) for block in range(24)))
    model.reducer = Reducer(methods.prune(), schedule, model.special_tokens(None))
    report = count_flops(model, convention="paper")
    assert round(100 * (1 - (report.total - report.reduction) / report.dense_total), 1) == expected


def test_the_saving_hardly_depends_on_the_convention():
    model = Formula(384)
    model.reducer = Reducer(methods.mtr(), Schedule.stages(24, 196), model.special_tokens(None))
    ratios = [count_flops(model, convention=convention).ratio for convention in CONVENTIONS]
    assert max(ratios) - min(ratios) < 0.003


@pytest.mark.parametrize("d_model", [192, 384, 768])
@pytest.mark.parametrize("target", [0.0, 0.05, 0.2, 0.3, 0.4, 0.5, 0.7])
def test_solve_lands_within_half_a_point(d_model, target):
    model = Formula(d_model)
    schedule = solve(model, target)
    model.reducer = Reducer(methods.mtr(), schedule, model.special_tokens(None))
    assert abs(1 - count_flops(model).ratio - target) <= 0.005
    after = tuple(block for block, r in enumerate(schedule.removed) if r)
    assert set(after) <= set(default_stages(24))
    if target == 0:
        assert schedule == Schedule.none(24)


@given(st.floats(0.02, 0.6), st.sampled_from([12, 24, 32]), st.sampled_from([(32, 4), (64, 4), (224, 16), (384, 16)]))
@settings(deadline=None, max_examples=15)
def test_solve_lands_on_other_depths_and_sizes(target, depth, sides):
    model = Formula(96, depth, *sides)
    schedule = solve(model, target)
    model.reducer = Reducer(methods.mtr(), schedule, model.special_tokens(None))
    assert abs(1 - count_flops(model).ratio - target) <= 0.005


def test_solve_takes_stages_sizes_and_methods():
    model = Formula(192)
    one = solve(model, 0.4, stages=(1,))
    assert [block for block, r in enumerate(one.removed) if r] == [1]
    many = solve(model, 0.3, stages=range(1, 22, 2), method=methods.get("prune"))
    assert sum(r > 0 for r in many.removed) == 11
    large = solve(model, 0.3, image_size=448)
    model.reducer = Reducer(methods.mtr(), large, model.special_tokens(None))
    assert abs(1 - count_flops(model, image_size=448).ratio - 0.3) <= 0.005


def test_solve_says_how_near_it_can_come():
    with pytest.raises(ValueError, match=r"saves 85\.0% of the FLOPs; the nearest saves 7\d\.\d%"):
        solve(Formula(192), 0.85)
    with pytest.raises(ValueError, match="the nearest saves"):
        solve(Formula(96, 12, 8, 4), 0.3)
    for wrong in (0.9, -0.1, "0.3", True, float("nan")):
        with pytest.raises(ValueError, match=r"from 0 up to below 0\.9"):
            solve(Formula(192), wrong)


def test_costs_add_up_by_kind():
    total = Cost(projections=1, conv=2, quirks=10) + Cost(conv=3, scan=4, directions=5, reduction=6)
    assert total == Cost(projections=1, conv=5, scan=4, directions=5, reduction=6, quirks=10)
    assert (total.total("both"), total.total("paper"), total.total("projections")) == (21, 26, 7)
    with pytest.raises(ValueError, match="unknown convention 'fvcore'; known: both, paper, projections"):
        total.total("fvcore")


def test_mistakes_are_named():
    model = Formula(192)
    model.reducer = Reducer(methods.mtr(), Schedule((1, 1)), model.special_tokens(None))
    with pytest.raises(ValueError, match="for 2 blocks, but the model has 24"):
        count_flops(model)


def test_counts_are_whole_numbers_and_independent_of_tensors():
    with torch.device("meta"):
        report = count_flops(Formula(192))
    assert isinstance(report.total, int) and all(isinstance(block, int) for block in report.per_block)
