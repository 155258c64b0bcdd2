"""Clustering as grouping: DPC-KNN and k-medoids. The number of clusters is what has to be left, in every image."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..names import lookup
from ..reduction import FEATURES, OUTPUT, Assignment, Method, Score, Signals, by_size, rank, take_rows
from ..reduction.matching import distances


def members_merged(clusters: Assignment) -> Assignment:
    """A cluster becomes the mean of its members, at the place of its centre."""
    return clusters


def members_dropped(clusters: Assignment) -> Assignment:
    """A cluster becomes its centre alone."""
    return Assignment.from_keep(clusters.keep, clusters.length)


def dpcknn(
    feature: str = "hidden",
    neighbours: int = 5,
    rest: Callable[[Assignment], Assignment] = members_merged,
    weight: Callable[[Signals], Tensor] = by_size,
) -> Method:
    """DPC-KNN: centres are dense and far from what is denser; every other token joins its nearest centre.

    Du et al., Knowledge-Based Systems 2016, as TCFormer (arXiv 2204.08680) and TokenReduction (arXiv 2308.04657) use
    it. Here the learnt weights of the mean are sizes, ties go by position and not by noise, and centres stay in
    sequence order.

    Args:
        feature: what distance is measured on, one of FEATURES.
        neighbours: how many nearest tokens make up the density, the token itself among them.
        rest: `members_merged` or `members_dropped`.
        weight: `by_size` or `plain`.
    """
    if not isinstance(neighbours, int) or neighbours < 1:
        raise ValueError(f"neighbours of dpcknn must be a whole number from 1 up, got {neighbours!r}")
    found = lookup("feature of dpcknn", feature, FEATURES)

    def plan(signals: Signals, r: int) -> Assignment:
        x = found.read(signals)  # (B, M, F)
        apart = distances(x, x) / x.shape[2] ** 0.5  # (B, M, M)
        return rest(_assign(apart, _peaks(apart, neighbours, x.shape[1] - r)))

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        return patches * patches * found.width(d_model, d_inner) + r * d_model

    return Method("dpcknn", found.needs, plan, weight, cost=cost, source="arXiv 2204.08680, 2308.04657")


def kmedoids(
    feature: str = "hidden",
    steps: int = 3,
    start: Score = OUTPUT,
    rest: Callable[[Assignment], Assignment] = members_merged,
    weight: Callable[[Signals], Tensor] = by_size,
) -> Method:
    """K-medoids: centres are the members with the smallest distance to the rest of their cluster.

    Token Pooling (arXiv 2110.03860) and TokenReduction (arXiv 2308.04657). Their first centres are the tokens of
    largest attention, here of `start`. TokenReduction keeps the centres and drops the rest, `members_dropped`, and
    sums distances over all tokens; here over the cluster.

    Args:
        feature: what distance is measured on, one of FEATURES.
        steps: how often clusters and centres are made anew.
        start: a Score; the highest are the first centres.
        rest: `members_merged` or `members_dropped`.
        weight: `by_size` or `plain`.
    """
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps of kmedoids must be a whole number from 0 up, got {steps!r}")
    if not isinstance(start, Score):
        raise ValueError(f"start of kmedoids must be a Score such as OUTPUT or NORM, got {start!r}")
    found = lookup("feature of kmedoids", feature, FEATURES)

    def plan(signals: Signals, r: int) -> Assignment:
        x = found.read(signals)  # (B, M, F)
        apart = distances(x, x)  # (B, M, M)
        clusters = _assign(apart, _highest(start.pool(signals), x.shape[1] - r))
        for _ in range(steps):
            clusters = _assign(apart, _medoids(apart, clusters))
        return rest(clusters)

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        width = found.width(d_model, d_inner)
        return patches * start.cost(d_model, d_inner) + patches * patches * (width + steps) + r * d_model

    needs = tuple(dict.fromkeys((*start.needs, *found.needs)))
    return Method("kmedoids", needs, plan, weight, cost=cost, source="arXiv 2110.03860, 2308.04657")


def _highest(score: Tensor, count: int) -> Tensor:
    """Positions (B, count) of the highest scores (B, M), ascending; of equals the first."""
    (lowest,) = rank(-score, sizes=(count,))
    return Assignment.from_keep(lowest, score.shape[1]).keep


def _peaks(apart: Tensor, neighbours: int, count: int) -> Tensor:
    """Density peaks (B, count) of distances (B, M, M), ascending."""
    patches = apart.shape[1]
    nearest = apart.topk(min(neighbours, patches), dim=2, largest=False).values
    density = torch.exp(-nearest.square().mean(dim=2))  # (B, M)
    place = torch.arange(patches, device=apart.device)
    # of equals the earlier one counts as denser, so that exactly one token has nobody above
    denser = (density.unsqueeze(1) > density.unsqueeze(2)) | (
        (density.unsqueeze(1) == density.unsqueeze(2)) & (place < place[:, None])
    )  # (B, M, M): is column j denser than row i
    farthest = apart.flatten(1).amax(dim=1)[:, None, None]
    height = torch.where(denser, apart, farthest).amin(dim=2)  # (B, M)
    return _highest(density * height, count)


def _medoids(apart: Tensor, clusters: Assignment) -> Tensor:
    """The member of each cluster that is nearest to its others, (B, K), ascending."""
    dest, shape = clusters.dest, clusters.keep.shape
    together = dest.unsqueeze(1) == dest.unsqueeze(2)  # (B, M, M)
    effort = (apart * together).sum(dim=2)  # (B, M)
    least = effort.new_full(shape, torch.inf).scatter_reduce(1, dest, effort, "amin")  # (B, K)
    place = torch.arange(dest.shape[1], device=dest.device).expand_as(dest)
    best = torch.where(effort == least.gather(1, dest), place, dest.shape[1])
    first = dest.new_full(shape, dest.shape[1]).scatter_reduce(1, dest, best, "amin")
    return Assignment.from_keep(first, dest.shape[1]).keep


def _assign(apart: Tensor, centres: Tensor) -> Assignment:
    """Every token to its nearest centre (B, K), ascending, and every centre to itself: M -> K."""
    dest = take_rows(apart, centres).min(dim=1).indices  # (B, M)
    own = torch.arange(centres.shape[1], device=centres.device).expand_as(centres)
    return Assignment(centres, dest.scatter(1, centres, own))
