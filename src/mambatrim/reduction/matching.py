"""Matching: who is most like whom. Functions of features and positions; the L x L matrix is never built."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import cpu, merging
from .assignment import take_rows

# rows of the similarity matrix that exist at a time: all of them up to 512 patches (one product, as if unblocked), and
# for 12,544 video patches 6 MB per image where half against half would take 157 MB
SOURCES_PER_BLOCK = 256
# a token of norm zero becomes a zero vector, similar to nobody, and never NaN
SMALLEST_NORM = 1e-12


class Links(NamedTuple):
    """The best partner of each source.

    target: (B, n) positions in the sequence.
    similarity: (B, n) fp32, higher is more alike.
    """

    target: Tensor
    similarity: Tensor


def cosine(feature: Tensor, source: Tensor, target: Tensor, nth: int = 1) -> Links:
    """Best target of each source by cosine similarity; of equals the first in `target`.

    Args:
        feature: (B, M, F).
        source: (B, n) positions that look for a partner.
        target: (B, m) positions to choose from.
        nth: 1 for the best, 2 for the second best, ...; the last where there are fewer.
    """
    if nth == 1 and target.shape[1] and feature.dtype == torch.float32:
        if cpu.direct(feature, source, target):
            return Links(*merging.nearest(feature, source, target))
        if cpu.compiling(feature):
            return Links(*torch.ops.mambatrim.nearest(feature, source, target))
    a, b = unit(take_rows(feature, source)), unit(take_rows(feature, target))  # (B, n, F), (B, m, F)
    return _best(a, b, target, nth, lambda a, b: a @ b.transpose(1, 2))


def l1(feature: Tensor, source: Tensor, target: Tensor, nth: int = 1) -> Links:
    """Best target of each source by smallest sum of absolute differences; arguments as for `cosine`."""
    a, b = take_rows(feature, source), take_rows(feature, target)
    return _best(a, b, target, nth, lambda a, b: -torch.cdist(a, b, p=1.0))


def l2(feature: Tensor, source: Tensor, target: Tensor, nth: int = 1) -> Links:
    """Best target of each source by smallest Euclidean distance; arguments as for `cosine`."""
    a, b = take_rows(feature, source), take_rows(feature, target)
    return _best(a, b, target, nth, lambda a, b: -distances(a, b))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of a (B, n, F) to b (B, m, F): (B, n, m)."""
    # without matrix products: |a|^2 + |b|^2 - 2ab cancels just where the nearest ones are compared
    return torch.cdist(a, b, p=2.0, compute_mode="donot_use_mm_for_euclid_dist")


def even_odd(batch: int, length: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Split a sequence by parity: even positions (B, ceil(M/2)) as sources, odd ones (B, floor(M/2)) as targets."""
    positions = torch.arange(length, device=device).repeat(batch, 1)  # (B, M)
    return positions[:, 0::2], positions[:, 1::2]


def strongest(source: Tensor, links: Links, count: int) -> tuple[Tensor, Tensor]:
    """The `count` links of greatest similarity, strongest first: source (B, n) -> source, target (B, count) each."""
    if not 0 <= count <= source.shape[1]:
        raise ValueError(f"{count} links were asked for, but there are {source.shape[1]} sources")
    order = torch.argsort(links.similarity, dim=1, descending=True, stable=True)[:, :count]
    return source.gather(1, order), links.target.gather(1, order)


def lattice(ids: Tensor, grid: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Split a grid into 2x2 windows: the top left patch of each as target, the others as sources.

    Args:
        ids: (B, M) where each token stands in the stem's grid, in raster order.
        grid: (h, w); windows of (t, h, w) lie inside a frame.
        count: number of targets. Where it is not that of the windows, or some top left patches are gone, the patches
            that are on the coarsest lattice (every 2nd, 4th, ... row and column) come first, then the earliest ones.

    Returns:
        Sources (B, M - count) and targets (B, count), each in sequence order.
    """
    width = grid[-1]
    height = grid[-2] if len(grid) > 1 else 1
    row, column = ids // width % height, ids % width  # (B, M)
    both = row | column
    # trailing zero bits of both coordinates: 0 off the lattice of windows, 1 on it, 2 on every second of it, ...
    level = sum(((both & mask) == 0).to(ids.dtype) for mask in (1, 3, 7, 15, 31, 63, 127))
    order = torch.argsort(level, dim=1, descending=True, stable=True)  # type: ignore[arg-type]
    chosen = torch.zeros_like(ids).scatter(1, order[:, :count], 1)
    by_kind = torch.argsort(chosen, dim=1, stable=True)
    return by_kind[:, : ids.shape[1] - count], by_kind[:, ids.shape[1] - count :]


def windows(grid: tuple[int, ...]) -> int:
    """Number of 2x2 windows that cover a grid, those cut off at the edges counted."""
    *frames, height, width = grid if len(grid) > 1 else (1, *grid)
    return math.prod(frames) * math.ceil(height / 2) * math.ceil(width / 2)


def unit(x: Tensor) -> Tensor:
    """x (B, M, F) with rows of length one; a row of zeros stays one."""
    return torch.nn.functional.normalize(x, dim=-1, eps=SMALLEST_NORM)


def _best(a: Tensor, b: Tensor, target: Tensor, nth: int, similarity: Callable[[Tensor, Tensor], Tensor]) -> Links:
    """Arg-max over b (B, m, F) for each row of a (B, n, F), a block of rows at a time."""
    blocks = [_nth_best(similarity(rows, b), nth) for rows in a.split(SOURCES_PER_BLOCK, dim=1)]
    value = torch.cat([value for value, _ in blocks], dim=1)  # (B, n)
    index = torch.cat([index for _, index in blocks], dim=1)  # (B, n)
    return Links(target.gather(1, index), value)


def _nth_best(similarity: Tensor, nth: int) -> tuple[Tensor, Tensor]:
    """Value and column (B, n) of the nth largest entry of each row of (B, n, m)."""
    if nth == 1:
        best = similarity.max(dim=2)
        return best.values, best.indices
    last = min(nth, similarity.shape[2]) - 1
    ranked = similarity.sort(dim=2, descending=True, stable=True)
    return ranked.values[:, :, last], ranked.indices[:, :, last]
