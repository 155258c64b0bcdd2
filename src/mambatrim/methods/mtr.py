"""MTR: Mamba token reduction by the timescale (arXiv 2507.14042). Its code was never released: our reading."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..names import lookup
from ..reduction import DELTA, Assignment, Method, Score, Signals, by_size, exact, rank
from ..reduction.matching import cosine

# features to match on, with their width for the FLOPs; dt and y join two directions
FEATURES: dict[str, Callable[[int, int], int]] = {
    "hidden": lambda d_model, d_inner: d_model,
    "update": lambda d_model, d_inner: d_model,
    "dt": lambda d_model, d_inner: 2 * d_inner,
    "y": lambda d_model, d_inner: 2 * d_inner,
}


def next_in_rank(patches: int, r: int) -> int:
    """As many targets as sources, the next in rank; all others where fewer than 2r patches are there."""
    return min(r, patches - r)


def all_others(patches: int, r: int) -> int:
    """Every token that is not a source is a target."""
    return patches - r


def mtr(
    score: Score = DELTA,
    feature: str = "hidden",
    targets: Callable[[int, int], int] = next_in_rank,
    weight: Callable[[Signals], Tensor] = by_size,
    place: Callable[[Assignment, Tensor], Assignment] = exact,
) -> Method:
    """Merge the r tokens of lowest score into the most similar ones of the middle group; the highest stay untouched.

    The paper gives the score (mean over channels of the timescale after softplus, summed over directions in token
    order), the three groups by rank, merging by similarity, and the original order. What it leaves open is an
    argument here; the timescale is that of the block that just ran, and sizes persist from stage to stage.

    Args:
        score: importance of a token.
        feature: what similarity is measured on, one of FEATURES; the residual stream by default.
        targets: (patches, r) -> number of targets: `next_in_rank` or `all_others`.
        weight: weights of the mean: `by_size` or `plain`.
        place: where special tokens go: `exact`, `centre` or `proportional`.
    """
    width = lookup("feature of mtr", feature, FEATURES)
    if not isinstance(score, Score):
        raise ValueError(f"score of mtr must be a Score such as DELTA, NORM or inverse(DELTA), got {score!r}")
    for name, choice, allowed in (
        ("targets", targets, "next_in_rank or all_others"),
        ("weight", weight, "by_size or plain"),
        ("place", place, "exact, centre or proportional"),
    ):
        if not callable(choice):
            raise ValueError(f"{name} of mtr must be a function such as {allowed}, got {choice!r}")

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        """Score, unit vectors, the products of sources with targets, and the mean."""
        count, f = targets(patches, r), width(d_model, d_inner)
        return patches * score.cost(d_model, d_inner) + (r + count) * f + r * count * f + r * d_model

    return Method(
        "mtr",
        needs=tuple(dict.fromkeys((*score.needs, feature))),
        plan=partial(_plan, score=score, feature=feature, targets=targets),
        weight=weight,
        place=place,
        cost=cost,
        source="arXiv 2507.14042",
    )


def _plan(signals: Signals, r: int, score: Score, feature: str, targets: Callable[[int, int], int]) -> Assignment:
    """M -> M - r."""
    importance = score.pool(signals)  # (B, M)
    patches = importance.shape[1]
    source, target = rank(importance, sizes=(r, targets(patches, r)))  # (B, r), (B, m)
    links = cosine(signals.feature(feature), source, target)
    return Assignment.from_links(source, links.target, patches)
