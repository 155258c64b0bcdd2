"""Agglomerative clustering of the rows of a matrix: `mambatrim::agglomerate`.

Two clusters cost (1 - cosine of their sums) times Ward's factor of their weights, plus the distance of their mean
coordinates; the cheapest pair is joined until so many rows are left. Means are not needed: the products of all rows
are enough, for those of a sum are sums.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .library import register

# a cluster of norm zero is like nobody
SMALLEST_NORM = 1e-12


def agglomerate(gram: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float = 1.0) -> Tensor:
    """Join r pairs of rows, the cheapest first; of equals the pair that stands first.

    Args:
        gram: (B, M, M) fp32, products of all rows with each other, each row times its weight.
        weight: (B, M) fp32, how many tokens each row stands for.
        coordinates: (B, M, P) fp32; the sum of absolute differences is added to the cost of a pair.
        r: how many rows go.
        exponent: of Ward's factor 2 w v / (w + v), which is one for two rows of weight one.

    Returns:
        (B, M) int64: of every row the one that stands for its cluster, which stands for itself: the heavier one of
        every pair, of equals the first.

    Raises:
        ValueError: a shape does not fit, or r is not from 0 to M - 1.
    """
    batch, rows = weight.shape
    if tuple(gram.shape) != (batch, rows, rows) or coordinates.dim() != 3 or coordinates.shape[:2] != weight.shape:
        raise ValueError(
            f"gram must be ({batch}, {rows}, {rows}) and coordinates ({batch}, {rows}, P), "
            f"got {tuple(gram.shape)} and {tuple(coordinates.shape)}"
        )
    if not 0 <= r < rows:
        raise ValueError(f"from 0 to {rows - 1} of {rows} rows can be joined to others, got {r}")
    exact = [x.to(torch.float32) for x in (gram, weight, coordinates)]
    return torch.ops.mambatrim.agglomerate(*exact, r, exponent)


def pair_costs(gram: Tensor, weight: Tensor, coordinates: Tensor, exponent: float) -> Tensor:
    """Costs of all pairs (B, M, M) from what `agglomerate` takes; of a row with itself infinite."""
    length = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # (B, M)
    inverse = torch.where(length > SMALLEST_NORM, 1 / length.clamp(min=SMALLEST_NORM), 0.0)
    cosine = gram * inverse[:, :, None] * inverse[:, None, :]
    ward = 2 * weight[:, :, None] * weight[:, None, :] / (weight[:, :, None] + weight[:, None, :])
    apart = (coordinates[:, :, None] - coordinates[:, None]).abs().sum(dim=3)
    cost = (1 - cosine) * ward**exponent + apart
    return cost + torch.diag_embed(torch.full_like(length, torch.inf))


def _pytorch(gram: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float) -> Tensor:
    """The definition: the whole batch a pair at a time."""
    batch, rows = weight.shape
    gram, weight, coordinates = gram.clone(), weight.clone(), coordinates.clone()
    everyone = torch.arange(rows, device=gram.device)
    root = everyone.repeat(batch, 1)
    image = torch.arange(batch, device=gram.device)
    gone = torch.zeros(batch, rows, dtype=torch.bool, device=gram.device)
    for _ in range(r):
        cost = pair_costs(gram, weight, coordinates, exponent)
        cost = cost.masked_fill(gone[:, :, None] | gone[:, None, :], torch.inf)
        first = cost.flatten(1).argmin(dim=1)  # (B)
        a, b = first // rows, first % rows
        swap = (weight[image, b] > weight[image, a]) | ((weight[image, b] == weight[image, a]) & (b < a))
        kept, lost = torch.where(swap, b, a), torch.where(swap, a, b)
        w, v = weight[image, kept, None], weight[image, lost, None]
        coordinates[image, kept] = (w * coordinates[image, kept] + v * coordinates[image, lost]) / (w + v)
        weight[image, kept] += weight[image, lost]
        gram[image, kept] += gram[image, lost]
        gram[image, :, kept] += gram[image, :, lost]
        gone[image, lost] = True
        root = torch.where(root == lost[:, None], kept[:, None], root)
    return root


def _cpu(gram: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float) -> Tensor:
    if not cpu.handles(gram):
        return _pytorch(gram, weight, coordinates, r, exponent)
    gram, weight, coordinates = gram.contiguous(), weight.contiguous(), coordinates.contiguous()
    root = torch.empty(weight.shape, dtype=torch.int64)
    if root.numel():
        record = struct.pack(
            cpu.CLUSTER,
            *(*coordinates.shape, r, torch.get_num_threads()),
            *(x.data_ptr() for x in (gram, weight, coordinates, root)),
            exponent,
        )
        cpu.call("agglomerate", record)
    return root


def _fake(gram: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.int64)


register(
    "agglomerate",
    "(Tensor gram, Tensor weight, Tensor coordinates, int r, float exponent) -> Tensor",
    *(_cpu, _pytorch, _fake),
)
