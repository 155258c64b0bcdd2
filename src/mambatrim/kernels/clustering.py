"""Agglomerative clustering of the rows of a matrix: `mambatrim::agglomerate`, a pair at a time, and in rounds.

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
from .library import cast, register

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
    x, weight, coordinates = _checked(x, weight, coordinates, r)
    run = _cpu if cpu.direct(x, weight, coordinates) else torch.ops.mambatrim.agglomerate
    return run(x, weight, coordinates, r, exponent)


def _checked(x: Tensor, weight: Tensor, coordinates: Tensor, r: int) -> list[Tensor]:
    """The three in fp32; ValueError where they do not fit."""
    if x.dim() != 3 or weight.shape != x.shape[:2] or coordinates.dim() != 3 or coordinates.shape[:2] != x.shape[:2]:
        raise ValueError(
            "x must be (B, M, F), weight (B, M) and coordinates (B, M, P), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(coordinates.shape)}"
        )
    rows = x.shape[1]
    if not 0 <= r < rows:
        raise ValueError(f"from 0 to {rows - 1} of {rows} rows can be joined to others, got {r}")
    return [cast(each, torch.float32) for each in (x, weight, coordinates)]


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
    return _plan(gone, root, r)


def _plan(gone: Tensor, root: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """keep (B, M - r) and dest (B, M) of rows that are gone (B, M), each with the row that stands for it (B, M)."""
    keep = torch.argsort(gone.to(torch.int8), dim=1, stable=True)[:, : gone.shape[1] - r]
    places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    return keep, torch.zeros_like(root).scatter(1, keep, places).gather(1, root)


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
            *(rows, x.data_ptr(), 0),  # the rows as they stand
            *(each.data_ptr() for each in (weight, coordinates, keep, dest)),
            exponent,
        )
        cpu.call("agglomerate", record)
    return keep, dest


def _fake(x: Tensor, weight: Tensor, coordinates: Tensor, r: int, *_: Any) -> tuple[Tensor, Tensor]:
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


# ------------------------------------------------------------------------------------------------------------ in rounds


def agglomerate_rounds(
    x: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float = 1.0, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Join r pairs of rows in `count` rounds (None: `rounds(r)`): arguments and results of `agglomerate`, and nearly
    its clusters.

    In a round two rows that are each other's cheapest partner join, all such pairs at once, but the cheapest of them
    only until half of what is left to do is done. Of equally cheap partners a row takes the one whose index differs in
    the lowest bits, so that like rows pair up side by side. The number of rounds depends on r alone; what is left after
    them (where costs grow along a chain, each round has few such pairs) joins in one step, each row to its cheapest
    partner among those before it. No step waits for a value, and all shapes are known beforehand.

    Differs from `agglomerate` where a join makes a pair cheaper than one that joined in the same round.
    """
    return torch.ops.mambatrim.agglomerate_rounds(*_checked(x, weight, coordinates, r), r, exponent, count)


def _rounds(
    x: Tensor, weight: Tensor, coordinates: Tensor, r: int, exponent: float, count: int | None
) -> tuple[Tensor, Tensor]:
    """In PyTorch, on every device."""
    batch, rows = weight.shape
    sums, place = x * weight.unsqueeze(2), torch.arange(rows, device=x.device)
    gram = sums @ sums.transpose(1, 2)
    gone = torch.zeros(batch, rows, dtype=torch.bool, device=x.device)
    root, left = place.repeat(batch, 1), torch.full((batch, 1), r, device=x.device)
    for _ in range(rounds(r) if count is None else count):
        cost = _costs_left(gram, weight, coordinates, exponent, gone)
        partner = _cheapest(cost, place)
        joined = _mutual(cost, partner, place, (left + 1) // 2) & ~gone
        other = weight.gather(1, partner)
        kept = joined & ((weight > other) | ((weight == other) & (place < partner)))
        gone, left = gone | (joined & ~kept), left - kept.sum(dim=1, keepdim=True)
        root = torch.where(joined & ~kept, partner, place).gather(1, root)
        coordinates = _merged(coordinates, weight, partner, kept)
        weight = torch.where(kept, weight + other, weight)
        for _ in range(2):  # the rows, then the columns
            lost = gram.gather(1, partner.unsqueeze(2).expand_as(gram))
            gram = torch.where(kept.unsqueeze(2), gram + lost, gram).transpose(1, 2)
    cost = _costs_left(gram, weight, coordinates, exponent, gone)
    price, before = cost.masked_fill(place >= place[:, None], torch.inf).min(dim=2)
    lost = _ranks(price) < left
    parent = torch.where(lost, before, place)
    for _ in range(rows.bit_length()):  # chains of parents, halved in every step
        parent = parent.gather(1, parent)
    return _plan(gone | lost, parent.gather(1, root), r)


def rounds(r: int) -> int:
    """How many rounds it takes to join r pairs, where each round does half of what is left, and one to spare."""
    return r.bit_length() + 1 if r else 0


def rounds_macs(rows: int, r: int, width: int) -> int:
    """Multiply-adds for one image: all products, and in every round and at the end all costs, and the rows and columns
    that are added."""
    return rows * rows * (width + 6 * (rounds(r) + 1))


def _costs_left(gram: Tensor, weight: Tensor, coordinates: Tensor, exponent: float, gone: Tensor) -> Tensor:
    """Costs (B, M, M), the same in both directions to the last bit, infinite for rows that are gone."""
    cost = pair_costs(gram, weight, coordinates, exponent)
    cost = torch.minimum(cost, cost.transpose(1, 2))
    return cost.masked_fill(gone[:, :, None] | gone[:, None, :], torch.inf)


def _cheapest(cost: Tensor, place: Tensor) -> Tensor:
    """(B, M): the partner of least cost; of equals the one whose index differs in the lowest bits."""
    differ = place ^ place[:, None]
    return differ.masked_fill(cost > cost.amin(dim=2, keepdim=True), len(place) * 2).argmin(dim=2)


def _mutual(cost: Tensor, partner: Tensor, place: Tensor, most: Tensor) -> Tensor:
    """(B, M): rows in one of the `most` (B, 1) cheapest pairs of rows that are each other's partner."""
    first = (partner.gather(1, partner) == place) & (place < partner)
    price = cost.gather(2, partner.unsqueeze(2)).squeeze(2).masked_fill(~first, torch.inf)
    first = first & (_ranks(price) < most)
    return first | (first.gather(1, partner) & (partner.gather(1, partner) == place))


def _ranks(x: Tensor) -> Tensor:
    """The rank of every entry of x (B, M) in its row, of equals the first lower."""
    return torch.argsort(torch.argsort(x, dim=1, stable=True), dim=1, stable=True)


def _merged(coordinates: Tensor, weight: Tensor, partner: Tensor, kept: Tensor) -> Tensor:
    """Means of coordinates (B, M, P) where a row keeps standing for its partner too."""
    w, v = weight.unsqueeze(2), weight.gather(1, partner).unsqueeze(2)
    other = coordinates.gather(1, partner.unsqueeze(2).expand_as(coordinates))
    return torch.where(kept.unsqueeze(2), (w * coordinates + v * other) / (w + v), coordinates)


register(
    "agglomerate_rounds",
    "(Tensor x, Tensor weight, Tensor coordinates, int r, float exponent, int? count) -> (Tensor keep, Tensor dest)",
    *(_rounds, _rounds, _fake),
)


@register_flop_formula(torch.ops.mambatrim.agglomerate_rounds)
def _rounds_flops(x: Any, weight: Any, coordinates: Any, r: int, *_: Any, **__: Any) -> int:
    return 2 * x[0] * rounds_macs(x[1], r, x[2])
