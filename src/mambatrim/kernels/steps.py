"""Whole steps between two blocks, each one compiled kernel: the same to the bit as the operations that define it
(methods/mtr.py, methods/virtual.py), which at batch 1 cost what calling them costs.

Callers ask `takes` first. A compiled model calls them as operators, `mambatrim::ranked_step` and
`mambatrim::clustered_step`, which exist for the CPU alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
from .library import register

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
    tensors = (x, size, keep, dest, *others)
    if not (cpu.direct(*tensors) or (cpu.compiling(*tensors) and cpu.compiled())):
        return False
    return all(each.dtype == torch.float32 for each in (x, size, *others))


def ranked_step(before: Before, score: Tensor, r: int, targets: int) -> After:
    """The r patches of lowest score join, as means by size, the most similar of those next in rank.

    Args:
        score: (B, S, L), summed over S; of equals the first in the sequence goes first.
        targets: how many may be joined.
    """
    run = torch.ops.mambatrim.ranked_step if torch.compiler.is_compiling() else _ranked
    return After(*run(*before, score, r, targets))


def clustered_step(
    before: Before, r: int, exponent: float, distance: float, apart: float, grid: Sequence[int]
) -> After:
    """r pairs of patches are joined as by `agglomerate`, with sizes as weights.

    Args:
        distance: of two neighbours in the sequence of patches; apart: in each axis of the `grid`, or 0.
    """
    run = torch.ops.mambatrim.clustered_step if torch.compiler.is_compiling() else _clustered
    return After(*run(*before, r, exponent, distance, apart, grid))


def _ranked(
    x: Tensor, size: Tensor, keep: Tensor, dest: Tensor, special: Sequence[int], score: Tensor, r: int, targets: int
) -> After:
    x, size, keep, dest, score = (each.contiguous() for each in (x, size, keep, dest, score))
    after = _empty(x, keep, dest, r)
    record = _RANKED(
        *(x.shape[0], dest.shape[1], *x.shape[1:], score.shape[1], len(special), r, targets),
        *(torch.get_num_threads(), score.data_ptr()),
        *_pointers(size, x, keep, dest, after),
    )
    cpu.call("ranked_step", record + _numbers(special))
    return after


def _clustered(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    dest: Tensor,
    special: Sequence[int],
    r: int,
    exponent: float,
    distance: float,
    apart: float,
    grid: Sequence[int],
) -> After:
    x, size, keep, dest = (each.contiguous() for each in (x, size, keep, dest))
    after = _empty(x, keep, dest, r)
    record = _CLUSTERED(
        *(x.shape[0], dest.shape[1], *x.shape[1:], len(special), r, len(grid), torch.get_num_threads()),
        *_pointers(size, x, keep, dest, after),
        *(exponent, distance, apart),
    )
    cpu.call("clustered_step", record + _numbers((*grid, *special)))
    return after


def _ranked_fake(
    x: Tensor, size: Tensor, keep: Tensor, dest: Tensor, special: Sequence[int], score: Tensor, r: int, targets: int
) -> After:
    return _empty(x, keep, dest, r)


def _clustered_fake(
    x: Tensor, size: Tensor, keep: Tensor, dest: Tensor, special: Sequence[int], r: int, *_: object
) -> After:
    return _empty(x, keep, dest, r)


_BEFORE, _AFTER = "Tensor x, Tensor size, Tensor keep, Tensor dest, int[] special", "(Tensor, Tensor, Tensor, Tensor)"
register("ranked_step", f"({_BEFORE}, Tensor score, int r, int targets) -> {_AFTER}", _ranked, None, _ranked_fake)
register(
    "clustered_step",
    f"({_BEFORE}, int r, float exponent, float distance, float apart, int[] grid) -> {_AFTER}",
    *(_clustered, None, _clustered_fake),
)


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
