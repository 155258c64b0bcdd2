"""Agglomerative clustering of the rows of a matrix: `mambatrim::agglomerate`.

Two clusters cost (1 - cosine of their means) times Ward's factor of their weights, plus the distance of their mean
coordinates; the cheapest pair is joined until so many rows are left. The means are never made: the products of all
rows are enough, for those of a sum are sums. And no pair costs less than the distance of its coordinates, so that the
compiled kernel multiplies near rows only, and needs no memory for all pairs.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .library import register

# a cluster of norm zero is like nobody
SMALLEST_NORM = 1e-12


def agglomerate(x: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float = 1.0) -> tuple[Tensor, Tensor]:
    """Join r pairs of rows, the cheapest first; of equals the pair that stands first.

    Args:
        x: (B, M, F), a row is the mean of what it stands for.
        weight: (B, M), how many tokens each row stands for.
        coordinates: (B, M, P); the sum of absolute differences is added to the cost of a pair.
        r: how many rows go.
        exponent: of Ward's factor 2 w v / (w + v), which is one for two rows of weight one.

    Returns:
        keep (B, M - r) int64, ascending: the rows that stand for their clusters, the heavier one of every pair, of
        equals the first; and dest (B, M) int64: the cluster of every row.

    Raises:
        ValueError: a shape does not fit, or r is not from 0 to M - 1.
    """
    if x.dim() != 3 or weight.shape != x.shape[:2] or coordinates.dim() != 3 or coordinates.shape[:2] != x.shape[:2]:
        raise ValueError(
            "x must be (B, M, F), weight (B, M) and coordinates (B, M, P), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(coordinates.shape)}"
        )
    rows = x.shape[1]
    if not 0 <= r < rows:
        raise ValueError(f"from 0 to {rows - 1} of {rows} rows can be joined to others, got {r}")
    exact = [each.to(torch.float32) for each in (x, weight, coordinates)]
    return torch.ops.mambatrim.agglomerate(*exact, r, exponent)


def pair_costs(gram: Tensor, weight: Tensor, coordinates: Tensor, exponent: float) -> Tensor:
    """Costs of all pairs (B, M, M) from the products of weighted rows; of a row with itself infinite."""
    length = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # (B, M)
    inverse = torch.where(length > SMALLEST_NORM, 1 / length.clamp(min=SMALLEST_NORM), 0.0)
    cosine = gram * inverse[:, :, None] * inverse[:, None, :]
    ward = 2 * weight[:, :, None] * weight[:, None, :] / (weight[:, :, None] + weight[:, None, :])
    apart = (coordinates[:, :, None] - coordinates[:, None]).abs().sum(dim=3)
    cost = (1 - cosine).clamp(min=0) * ward**exponent + apart  # not below the distance, whatever rounding does
    cost = torch.nan_to_num(cost, nan=torch.finfo(cost.dtype).max)  # what is no number comes last
    return cost + torch.diag_embed(torch.full_like(length, torch.inf))


def _pytorch(x: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float) -> tuple[Tensor, Tensor]:
    """The definition: the whole batch a pair at a time."""
    batch, rows = weight.shape
    sums, weight, coordinates = x * weight.unsqueeze(2), weight.clone(), coordinates.clone()
    gram = sums @ sums.transpose(1, 2)  # (B, M, M)
    everyone = torch.arange(rows, device=x.device)
    root = everyone.repeat(batch, 1)
    image = torch.arange(batch, device=x.device)
    gone = torch.zeros(batch, rows, dtype=torch.bool, device=x.device)
    for _ in range(r):
        cost = pair_costs(gram, weight, coordinates, exponent)
        cost = cost.masked_fill(gone[:, :, None] | gone[:, None, :], torch.inf)
        first = cost.flatten(1).argmin(dim=1)  # (B)
        a, b = torch.stack([first // rows, first % rows]).aminmax(dim=0)
        swap = weight[image, b] > weight[image, a]
        kept, lost = torch.where(swap, b, a), torch.where(swap, a, b)
        w, v = weight[image, kept, None], weight[image, lost, None]
        coordinates[image, kept] = (w * coordinates[image, kept] + v * coordinates[image, lost]) / (w + v)
        weight[image, kept] += weight[image, lost]
        gram[image, kept] += gram[image, lost]
        gram[image, :, kept] += gram[image, :, lost]
        gone[image, lost] = True
        root = torch.where(root == lost[:, None], kept[:, None], root)
    keep = torch.argsort(gone.to(torch.int8), dim=1, stable=True)[:, : rows - r]
    place = torch.zeros_like(root).scatter(1, keep, torch.arange(rows - r, device=x.device).expand_as(keep))
    return keep, place.gather(1, root)


def _cpu(x: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float) -> tuple[Tensor, Tensor]:
    if not cpu.handles(x):
        return _pytorch(x, weight, coordinates, r, exponent)
    x, weight, coordinates = x.contiguous(), weight.contiguous(), coordinates.contiguous()
    batch, rows, width = x.shape
    keep, dest = x.new_empty(batch, rows - r, dtype=torch.int64), x.new_empty(batch, rows, dtype=torch.int64)
    if dest.numel():
        record = struct.pack(
            cpu.CLUSTER,
            *(batch, rows, width, coordinates.shape[2], r, torch.get_num_threads()),
            *(each.data_ptr() for each in (x, weight, coordinates, keep, dest)),
            exponent,
        )
        cpu.call("agglomerate", record)
    return keep, dest


def _fake(x: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float) -> tuple[Tensor, Tensor]:
    batch, rows = weight.shape
    return x.new_empty(batch, rows - r, dtype=torch.int64), x.new_empty(batch, rows, dtype=torch.int64)


register(
    "agglomerate",
    "(Tensor x, Tensor weight, Tensor coordinates, int r, float exponent) -> (Tensor keep, Tensor dest)",
    *(_cpu, _pytorch, _fake),
)


@register_flop_formula(torch.ops.mambatrim.agglomerate)
def _flops(x: Any, weight: Any, coordinates: Any, r: int, *_: Any, **__: Any) -> int:
    return 2 * x[0] * cluster_macs(x[1], r, x[2])


def cluster_macs(rows: int, r: int, width: int) -> int:
    """Multiply-adds for one image: the products of all pairs of rows, the costs, and what each join changes in them."""
    return rows * (rows + 1) // 2 * (width + 4) + 5 * r * rows
