"""Whole steps between two blocks, each one compiled kernel: the same to the bit as the operations that define it
(methods/mtr.py, methods/virtual.py), which at batch 1 cost what calling them costs.

Callers ask `takes` first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu

_RANKED, _CLUSTERED = struct.Struct(cpu.RANKED).pack, struct.Struct(cpu.CLUSTERED).pack


class Before(NamedTuple):
    """What a step is made of."""

    x: Tensor  # (B, L, D) fp32
    size: Tensor  # (B, L) fp32: weights of the means too
    keep: Tensor  # (B, L) and
    dest: Tensor  # (B, L0) of all steps before
    special: Sequence[int]  # places in the stem of tokens that stay and that nothing joins


class After(NamedTuple):
    """What it leaves."""

    x: Tensor  # (B, L - r, D)
    size: Tensor  # (B, L - r)
    keep: Tensor  # (B, L - r)
    dest: Tensor  # (B, L0)


def takes(before: Before, *others: Tensor) -> bool:
    """Whether the compiled kernels make steps of these, and of other tensors in fp32."""
    x, size, keep, dest, _ = before
    if not cpu.direct(x, size, keep, dest, *others):
        return False
    return all(each.dtype == torch.float32 for each in (x, size, *others))


def ranked_step(before: Before, score: Tensor, r: int, targets: int) -> After:
    """The r patches of lowest score join, as means by size, the most similar of those next in rank.

    Args:
        score: (B, S, L), summed over S; of equals the first in the sequence goes first.
        targets: how many may be joined.
    """
    (x, size, keep, dest), score = _contiguous(before), score.contiguous()
    after = _empty(x, keep, dest, r)
    record = _RANKED(
        *(x.shape[0], dest.shape[1], *x.shape[1:], score.shape[1], len(before.special), r, targets),
        *(torch.get_num_threads(), score.data_ptr()),
        *_pointers(size, x, keep, dest, after),
    )
    cpu.call("ranked_step", record + _numbers(before.special))
    return after


def clustered_step(
    before: Before, r: int, exponent: float, distance: float, apart: float, grid: Sequence[int]
) -> After:
    """r pairs of patches are joined as by `agglomerate`, with sizes as weights.

    Args:
        distance: of two neighbours in the sequence of patches; apart: in each axis of the `grid`, or 0.
    """
    x, size, keep, dest = _contiguous(before)
    after = _empty(x, keep, dest, r)
    record = _CLUSTERED(
        *(x.shape[0], dest.shape[1], *x.shape[1:], len(before.special), r, len(grid), torch.get_num_threads()),
        *_pointers(size, x, keep, dest, after),
        *(exponent, distance, apart),
    )
    cpu.call("clustered_step", record + _numbers((*grid, *before.special)))
    return after


def _contiguous(before: Before) -> list[Tensor]:
    return [each.contiguous() for each in before[:4]]


def _empty(x: Tensor, keep: Tensor, dest: Tensor, r: int) -> After:
    batch, length, columns = x.shape
    left = length - r
    return After(
        *(x.new_empty((batch, left, columns)), x.new_empty((batch, left))),
        *(keep.new_empty((batch, left)), torch.empty_like(dest)),
    )


def _pointers(size: Tensor, x: Tensor, keep: Tensor, dest: Tensor, after: After) -> list[int]:
    return [each.data_ptr() for each in (size, x, keep, dest, after.size, after.x, after.keep, after.dest)]


def _numbers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)
