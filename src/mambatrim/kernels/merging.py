"""The compiled kernels of the step between two blocks: rows by position, the most similar target of each source, and
assignments (definitions in PyTorch: reduction/assignment.py and reduction/matching.py).

A step is many small operations, and at batch 1 it costs what calling them costs. So these kernels are called directly,
not as operators, where `cpu.direct` says that they can be; whoever compiles, exports, traces or needs a gradient gets
the PyTorch form. Only `mambatrim::nearest` is an operator too, for compilers: a choice between two that are nearly
alike must not depend on who makes it.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .library import register

_ROWS, _INVERSE, _NEAREST, _LINKS, _LIFT, _MERGE = (
    struct.Struct(record).pack for record in (cpu.ROWS, cpu.INVERSE, cpu.NEAREST, cpu.LINKS, cpu.LIFT, cpu.MERGE)
)


def take_rows(x: Tensor, positions: Tensor, directions: int = 1, or_zeros: bool = False) -> Tensor:
    """Rows of x (B S, L, ...), contiguous, at the positions (B, n) of each image: (B S, n, ...); where it is to be
    `or_zeros`, position L is a row of zeros."""
    length, (batch, count) = x.shape[1], positions.shape
    positions = cpu.dense_rows(positions)
    y = x.new_empty((x.shape[0], count, *x.shape[2:]))
    if y.numel():
        row = y.numel() // (y.shape[0] * count) * y.element_size()
        cpu.call(
            "take_rows",
            _ROWS(
                *(batch, directions, length, count, row, torch.get_num_threads(), or_zeros),
                *(x.data_ptr(), positions.data_ptr(), positions.stride(0), y.data_ptr()),
            ),
        )
    return y


def inverse(x: Tensor) -> Tensor:
    """1 / x, fp32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    cpu.call("inverse", _INVERSE(x.numel(), x.data_ptr(), y.data_ptr()))
    return y


def nearest(feature: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target of greatest cosine similarity and that similarity, (B, n) both: feature (B, M, F) fp32, source (B, n),
    target (B, m), m > 0; of equals the first in `target`."""
    batch, length, columns = feature.shape
    feature, source, target = feature.contiguous(), cpu.dense_rows(source), cpu.dense_rows(target)
    best = source.new_empty(source.shape)
    similarity = feature.new_empty(source.shape)
    if best.numel():
        cpu.call(
            "nearest",
            _NEAREST(
                *(batch, length, columns, source.shape[1], target.shape[1], torch.get_num_threads()),
                *(feature.data_ptr(), source.data_ptr(), source.stride(0), target.data_ptr(), target.stride(0)),
                *(best.data_ptr(), similarity.data_ptr()),
            ),
        )
    return best, similarity


def _nearest_cpu(feature: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    run = nearest if cpu.compiled() and feature.dtype == torch.float32 else _nearest_pytorch
    return run(feature, source, target)


def _nearest_pytorch(feature: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    unit = F.normalize(feature, dim=2, eps=1e-12)
    a, b = (unit.take_along_dim(positions.unsqueeze(2), dim=1) for positions in (source, target))
    blocks = [(rows @ b.transpose(1, 2)).max(dim=2) for rows in a.split(256, dim=1)]  # never (B, n, m) at once
    index = torch.cat([best.indices for best in blocks], dim=1)
    return target.gather(1, index), torch.cat([best.values for best in blocks], dim=1)


def _nearest_fake(feature: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(source), feature.new_empty(source.shape)


register(
    "nearest",
    "(Tensor feature, Tensor source, Tensor target) -> (Tensor best, Tensor similarity)",
    *(_nearest_cpu, _nearest_pytorch, _nearest_fake),
)


def links(source: Tensor, target: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """`keep` (B, L - r) and `dest` (B, L) where the tokens at `source` (B, r) join those at `target`, or are gone."""
    batch, count = source.shape
    source = cpu.dense_rows(source)
    target = target if target is None else cpu.dense_rows(target)
    keep, dest = source.new_empty((batch, length - count)), source.new_empty((batch, length))
    cpu.call(
        "links",
        _LINKS(
            *(batch, length, count, source.data_ptr(), source.stride(0)),
            *((0, 0) if target is None else (target.data_ptr(), target.stride(0))),
            *(keep.data_ptr(), dest.data_ptr()),
        ),
    )
    return keep, dest


def lift(plan: tuple[Tensor, Tensor], patches: Tensor, special: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A plan over patches, keep (B, K) and dest (B, M), as one over the sequence of L tokens in which they stand at
    `patches` (B, M) and special tokens, which stay, at `special` (B, n): (B, K + n) and (B, L)."""
    batch, kept = plan[0].shape
    keep, dest = (x.contiguous() for x in plan)
    patches, special = patches.contiguous(), cpu.dense_rows(special)
    fixed = special.shape[1]
    new_keep, new_dest = keep.new_empty((batch, kept + fixed)), keep.new_empty((batch, length))
    cpu.call(
        "lift",
        _LIFT(
            *(batch, length, fixed, kept, patches.shape[1], patches.data_ptr()),
            *(special.data_ptr(), special.stride(0), keep.data_ptr(), dest.data_ptr()),
            *(new_keep.data_ptr(), new_dest.data_ptr()),
        ),
    )
    return new_keep, new_dest


def merge(
    x: Tensor, weight: Tensor, size: Tensor, step: tuple[Tensor, Tensor], origin: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """One step on all that travels between blocks.

    Args:
        x: (B, L, D) fp32. weight, size: (B, L) fp32.
        step: keep (B, K) and dest (B, L).
        origin: keep (B, L) and dest (B, L0) of all steps before.

    Returns:
        The weighted means (B, K, D), the sums of the sizes (B, K), and keep (B, K) and dest (B, L0) of all steps.
    """
    x, weight, size = x.contiguous(), weight.contiguous(), size.contiguous()
    (keep, dest), (first_keep, first_dest) = ([part.contiguous() for part in pair] for pair in (step, origin))
    batch, length, columns = x.shape
    kept = keep.shape[1]
    new_x, new_size = x.new_empty((batch, kept, columns)), size.new_empty((batch, kept))
    new_keep, new_dest = torch.empty_like(keep), torch.empty_like(first_dest)
    cpu.call(
        "merge",
        _MERGE(
            *(batch, first_dest.shape[1], length, kept, columns, torch.get_num_threads()),
            *(keep.data_ptr(), dest.data_ptr(), first_keep.data_ptr(), first_dest.data_ptr()),
            *(weight.data_ptr(), size.data_ptr(), x.data_ptr()),
            *(new_size.data_ptr(), new_x.data_ptr(), new_keep.data_ptr(), new_dest.data_ptr()),
        ),
    )
    return new_x, new_size, (new_keep, new_dest)
