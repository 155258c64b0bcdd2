"""MaMe: token merging by the timescale (arXiv 2508.13599). Its code is not released: our reading of the abstract."""

from dataclasses import replace

from torch import Tensor

from ..reduction import DELTA, Method, Signals
from .mtr import all_others, by_rank, lowest_half, mtr


def by_delta(signals: Signals) -> Tensor:
    """Weights of a mean by informativeness: (B, M) size times the timescale summed over directions."""
    return signals.size * DELTA.pool(signals)


def mame(feature: str = "hidden") -> Method:
    """Merge the r less informative tokens that are most like a more informative one, weighted by the timescale.

    arXiv 2508.13599 says: the timescale measures informativeness, and tokens are arranged such that information keeps
    flowing along the sequence. Guessed: the less informative half are the sources, the others the targets, the r
    strongest links by cosine of the residual stream are merged; the mean is weighted by size and timescale; the
    arrangement is the original order, a merged token at the place of the more informative one.

    Args:
        feature: what similarity is measured on, one of FEATURES.
    """
    base = mtr(groups=by_rank(all_others, lowest_half), feature=feature, weight=by_delta)
    return replace(base, name="mame", source="our reading of arXiv 2508.13599")
