"""The bootstrap: against the normal approximation where that holds, and where the answer is plain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mambatrim.bootstrap import difference_interval, share_interval


def flags(*counts: tuple[int, bool]) -> Tensor:
    return torch.cat([torch.full((count,), value) for count, value in counts])


def test_a_share_has_the_binomial_interval() -> None:
    found = share_interval(flags((800, True), (200, False)), resamples=100_000)
    error = 1.959964 * math.sqrt(0.8 * 0.2 / 1000)
    assert (found.low, found.high) == pytest.approx((0.8 - error, 0.8 + error), abs=0.0015)


def test_a_paired_difference_has_the_interval_of_its_variance() -> None:
    # 60 images that only ours gets right, 40 that only theirs does: mean 0.02, variance 0.1 - 0.02^2
    ours = flags((60, True), (40, False), (700, True), (200, False))
    theirs = flags((60, False), (40, True), (700, True), (200, False))
    found = difference_interval(ours, theirs, resamples=100_000)
    error = 1.959964 * math.sqrt((0.1 - 0.02**2) / 1000)
    assert (found.low, found.high) == pytest.approx((0.02 - error, 0.02 + error), abs=0.0015)
    # unpaired, it would be 2.2 times as wide
    unpaired = 1.959964 * math.sqrt((0.76 * 0.24 + 0.74 * 0.26) / 1000)
    assert (found.high - found.low) / 2 < unpaired / 1.9
    other_way = difference_interval(theirs, ours, resamples=100_000)
    assert (other_way.low, other_way.high) == pytest.approx((-found.high, -found.low), abs=0.002)


def test_it_is_the_bootstrap_over_images() -> None:
    """The counts are drawn; drawing the images themselves gives the same percentiles."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(200, generator=generator) < share for share in (0.6, 0.5))
    drawn = torch.randint(0, 200, (20_000, 200), generator=generator)
    means = (ours[drawn].float() - theirs[drawn].float()).mean(dim=1)
    expected = torch.quantile(means.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    found = difference_interval(ours, theirs, resamples=20_000)
    assert [found.low, found.high] == pytest.approx(expected, abs=0.011)  # two images of 200


def test_what_is_certain_has_no_width() -> None:
    hits = flags((30, True), (10, False))
    same = difference_interval(hits, hits.clone())
    assert (same.low, same.high) == (0, 0)
    sure = share_interval(flags((40, True)))
    assert (sure.low, sure.high) == (1, 1)


def test_the_same_question_has_the_same_answer_and_a_higher_level_is_wider() -> None:
    hits = flags((30, True), (10, False))
    assert share_interval(hits) == share_interval(hits)
    wide, narrow = share_interval(hits, level=0.99), share_interval(hits, level=0.5)
    assert wide.low < narrow.low < 0.75 < narrow.high < wide.high


@pytest.mark.parametrize(
    ("ours", "theirs", "more", "words"),
    [
        (flags((0, True)), flags((0, True)), {}, "at least one of them"),
        (flags((3, True)), flags((4, True)), {}, r"of the same images, .* got \[3, 4\]"),
        (torch.ones(3), flags((3, True)), {}, "must be booleans"),
        (flags((3, True)), flags((3, True)), {"level": 1.0}, "level between 0 and 1"),
        (flags((3, True)), flags((3, True)), {"resamples": 0}, "resamples must be at least 1"),
    ],
)
def test_wrong_input_is_said(ours: Tensor, theirs: Tensor, more: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        difference_interval(ours, theirs, **more)  # type: ignore[arg-type]
