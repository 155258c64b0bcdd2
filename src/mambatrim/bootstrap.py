"""Confidence intervals by the paired bootstrap: how far a figure would move on other images of the same kind.

Images are drawn anew with replacement, and both models are scored on the same draw. What a draw can hold is counted in
two or three numbers (for a pair: images that only one gets right, only the other, both or neither), and these counts
follow a multinomial distribution: drawing them is drawing the images, at a cost that does not grow with their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0


@dataclass(frozen=True)
class Interval:
    """Bounds of a share, or of a difference of two shares, that a resample is between with the wanted probability."""

    low: float
    high: float


def share_interval(hits: Tensor, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Interval of the share of hits (n,) bool, such as an accuracy."""
    (right,) = _same_images(hits)
    return _interval([int(right.sum())], [1.0], len(right), resamples, level)


def difference_interval(ours: Tensor, theirs: Tensor, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Interval of the difference of two shares of hits, (n,) bool each, of the same images in the same order.

    Raises:
        ValueError: there are no images, not the same number of them, or a level or number of resamples that means
            nothing.
    """
    mine, its = _same_images(ours, theirs)
    only_mine, only_its = int((mine & ~its).sum()), int((its & ~mine).sum())
    return _interval([only_mine, only_its], [1.0, -1.0], len(mine), resamples, level)


def _same_images(*hits: Tensor) -> tuple[Tensor, ...]:
    counts = [len(each) for each in hits]
    if min(counts) < 1 or len(set(counts)) > 1 or any(each.dtype != torch.bool for each in hits):
        raise ValueError(f"hits must be booleans of the same images, at least one of them, got {counts}")
    return hits


def _interval(counts: list[int], values: list[float], images: int, resamples: int, level: float) -> Interval:
    """Percentiles of the mean over images, `counts[i]` of which are worth `values[i]`, and the others nothing."""
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 1 and level between 0 and 1, not {resamples} and {level}")
    shares = np.array([*counts, images - sum(counts)]) / images
    drawn = np.random.default_rng(SEED).multinomial(images, shares, size=resamples)  # (resamples, kinds)
    means = drawn[:, :-1] @ np.array(values) / images
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
