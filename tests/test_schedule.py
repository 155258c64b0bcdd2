"""Schedules are plain counts: builders, lengths, JSON, sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambatrim.reduction import Schedule, default_stages


def test_three_stages_of_a_published_model():
    schedule = Schedule.stages(depth=24, patches=196)
    assert {i: r for i, r in enumerate(schedule.removed) if r} == {4: 39, 9: 31, 14: 25}
    lengths = schedule.lengths(196)
    assert (lengths[4], lengths[5], lengths[10], lengths[15], lengths[23]) == (196, 157, 126, 101, 101)


def test_default_stages_scale_with_depth():
    assert default_stages(24) == (4, 9, 14)
    assert default_stages(12) == (2, 4, 7)
    assert default_stages(32) == (6, 12, 19)
    for depth in range(1, 60):
        stages = default_stages(depth)
        assert stages == tuple(sorted(set(stages))) and 0 <= stages[0] <= stages[-1] < depth


def test_a_share_per_stage_and_constant_counts():
    assert Schedule.stages(4, 10, after=(0, 2), keep=(0.5, 0.2)).removed == (5, 0, 4, 0)
    assert Schedule.stages(2, 10, after=(0,), keep=1).removed == (0, 0)
    assert Schedule.stages(2, 3, after=(0,), keep=1e-9).removed == (2, 0)  # one patch always stays
    assert Schedule.constant(5, 3).removed == (3, 3, 3, 3, 0)
    assert Schedule.constant(5, 3, after=(1, 3)).removed == (0, 3, 0, 3, 0)
    assert Schedule.none(3).removed == (0, 0, 0)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 9))
def test_json_round_trip(removed, stem):
    schedule = Schedule(tuple(removed), stem)
    assert Schedule.from_json(schedule.to_json()) == schedule


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 30))
def test_lengths_go_down_by_what_is_removed_and_never_below_one(removed, patches):
    schedule = Schedule(tuple(removed))
    if sum(removed) >= patches:
        with pytest.raises(ValueError, match="at most"):
            schedule.lengths(patches)
    else:
        lengths = schedule.lengths(patches)
        assert lengths == tuple(patches - sum(removed[:block]) for block in range(len(removed)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schedule((1, -2)), "whole numbers from 0 up, got -2"),
        (lambda: Schedule((1, 2.0)), "got 2.0"),
        (lambda: Schedule((True,)), "got True"),
        (lambda: Schedule.stages(4, 9, after=(4,)), r"blocks from 0 to 3, or -1 for before block 0, got \(4,\)"),
        (lambda: Schedule.constant(4, 1, after=(1, 1)), "different blocks"),
        (lambda: Schedule.stages(4, 9, after=(0,), keep=1.5), "up to 1, got 1.5"),
        (lambda: Schedule.stages(4, 9, after=(0, 1), keep=(0.5,)), "got 1 for 2 stages"),
        (lambda: Schedule((0, 9)).lengths(9), "removes 9 of 9 patches after block 1; at most 8 can go"),
        (lambda: Schedule((0, 9)).at(2), "there is no block 2"),
        (lambda: Schedule.from_json("[1, 2]"), "looks like"),
        (lambda: Schedule.from_json("{"), "looks like"),
        (lambda: Schedule.from_json('{"removed": ["a"]}'), "got 'a'"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
