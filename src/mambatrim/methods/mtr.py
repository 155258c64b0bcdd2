"""MTR: Mamba token reduction by the timescale (arXiv 2507.14042). Its code was never released: our reading."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..kernels import steps
from ..names import lookup
from ..reduction import (
    DELTA,
    FEATURES,
    Assignment,
    Feature,
    Method,
    Score,
    Signals,
    Tokens,
    by_size,
    exact,
    merged,
    rank,
    restored,
)
from ..reduction.matching import cosine, even_odd, strongest
from ..reduction.reducer import all_but_one, half


@dataclass(frozen=True)
class Groups:
    """Who may disappear, and who may receive.

    divide: (importance (B, M), r) -> sources (B, n) of which r go, targets (B, m).
    sizes: (patches, r) -> n, m.
    most: patches -> how many can go.
    """

    divide: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    sizes: Callable[[int, int], tuple[int, int]]
    most: Callable[[int], int] = all_but_one


def next_in_rank(patches: int, sources: int) -> int:
    """As many targets as sources, the next in rank; all others where there are not as many."""
    return min(sources, patches - sources)


def all_others(patches: int, sources: int) -> int:
    """Every token that is not a source is a target."""
    return patches - sources


def only_r(patches: int, r: int) -> int:
    """The r tokens of lowest rank go, whatever their similarity."""
    return r


def lowest_half(patches: int, r: int) -> int:
    """The less important half may go; of it the r tokens that are most like a target do."""
    return max(r, patches // 2)


def by_rank(
    targets: Callable[[int, int], int] = next_in_rank, candidates: Callable[[int, int], int] = only_r
) -> Groups:
    """Source, Target and Keep by rank of importance, from below: the asymmetric groups of MTR.

    The paper does not say how large the groups are.

    Args:
        targets: (patches, sources) -> number of targets: `next_in_rank` or `all_others`.
        candidates: (patches, r) -> number of sources, of which the r strongest links are taken: `only_r` or
            `lowest_half`.
    """
    for name, choice, allowed in (
        ("targets", targets, "next_in_rank or all_others"),
        ("candidates", candidates, "only_r or lowest_half"),
    ):
        if not callable(choice):
            raise ValueError(f"{name} of by_rank must be a function such as {allowed}, got {choice!r}")

    def sizes(patches: int, r: int) -> tuple[int, int]:
        sources = candidates(patches, r)
        return sources, targets(patches, sources)

    def divide(importance: Tensor, r: int) -> tuple[Tensor, Tensor]:
        source, target = rank(importance, sizes(importance.shape[1], r))
        return source, target

    return Groups(divide, sizes)


# symmetric groups: even tokens are sources, odd ones targets, and the r strongest links are merged, as in ToMe
EVEN_ODD = Groups(
    lambda importance, r: even_odd(importance.shape[0], importance.shape[1], importance.device),
    lambda patches, r: (patches - patches // 2, patches // 2),
    half,
)


def mtr(
    score: Score = DELTA,
    groups: Groups | None = None,
    feature: str = "hidden",
    combine: Callable[[Tensor, Tensor, int], Assignment] = merged,
    weight: Callable[[Signals], Tensor] = by_size,
    order: Callable[[Assignment, Tensor], Assignment] = restored,
    place: Callable[[Assignment, Tensor], Assignment] = exact,
) -> Method:
    """Merge the r tokens of lowest score into the most similar ones of the middle group; the highest stay untouched.

    arXiv 2507.14042. The paper gives the score (mean over channels of the timescale after softplus, summed over
    directions in token order), the three groups by rank, merging by similarity, and the original order. What it leaves
    open is an argument here; the timescale is that of the block that just ran, and sizes persist from stage to stage.
    Its ablations are arguments too; the stages are those of the schedule.

    Args:
        score: importance: DELTA, `delta(forward)` or `delta(backward)`, `scan_score("B")` or "C", CLASS_TOKEN,
            `random_score(seed)`, NORM, CENTRALITY, ...; how B and C become one number is not said: here the mean.
        groups: `by_rank(...)`, asymmetric, the default, or EVEN_ODD, symmetric (the paper's is not described; in
            EVEN_ODD similarity alone decides, and at most half can go).
        feature: what similarity is measured on, one of FEATURES; the residual stream by default.
        combine: `merged` or `pruned`.
        weight: weights of the mean: `by_size` or `plain`.
        order: `restored`, or `as_grouped`: by falling score, without reordering.
        place: where the class token goes: `exact`, `centre` or `proportional`.
    """
    chosen, found = by_rank() if groups is None else groups, lookup("feature of mtr", feature, FEATURES)
    if not isinstance(score, Score):
        raise ValueError(f"score of mtr must be a Score such as DELTA, NORM or inverse(DELTA), got {score!r}")
    if not isinstance(chosen, Groups):
        raise ValueError(f"groups of mtr must be by_rank() or EVEN_ODD, got {groups!r}")
    for name, choice, allowed in (
        ("combine", combine, "merged or pruned"),
        ("weight", weight, "by_size or plain"),
        ("order", order, "restored or as_grouped"),
        ("place", place, "exact, centre or proportional"),
    ):
        if not callable(choice):
            raise ValueError(f"{name} of mtr must be a function such as {allowed}, got {choice!r}")

    def plan(signals: Signals, r: int) -> Assignment:
        importance = score.pool(signals)  # (B, M)
        source, target = link(found.read(signals), importance, chosen, r)  # (B, r) each
        return order(combine(source, target, importance.shape[1]), -importance)

    plain = feature == "hidden" and all(
        choice is usual
        for choice, usual in zip(
            (score, groups, combine, weight, order, place), (DELTA, None, merged, by_size, restored, exact), strict=True
        )
    )
    return Method(
        "mtr",
        needs=tuple(dict.fromkeys((*score.needs, *found.needs))),
        plan=plan,
        weight=weight,
        place=place,
        cost=linking_cost(score, found, chosen),
        most=chosen.most,
        at_once=_at_once if plain else None,
        source="arXiv 2507.14042",
    )


def _at_once(tokens: Tokens, special: tuple[int, ...], captured: Mapping[str, Tensor], r: int) -> Tokens | None:
    """The step of `mtr()` as one compiled kernel."""
    before, score = tokens.before(special), captured.get("dt_mean")
    # blocks of others may have another stream; more than two summands have no one order
    if captured.get("hidden") is not tokens.x or score is None or score.shape[1] > 2 or not steps.takes(before, score):
        return None
    return tokens.after(steps.ranked_step(before, score, r, next_in_rank(tokens.x.shape[1] - len(special), r)))


def link(feature: Tensor, importance: Tensor, groups: Groups, r: int) -> tuple[Tensor, Tensor]:
    """The r sources that go and the target of each, (B, r) both: feature (B, M, F), importance (B, M)."""
    source, target = groups.divide(importance, r)
    links = cosine(feature, source, target)
    return (source, links.target) if source.shape[1] == r else strongest(source, links, r)


def linking_cost(score: Score, feature: Feature, groups: Groups) -> Callable[[int, int, int, int], int]:
    """Score, unit vectors, the products of sources with targets, and the mean."""

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        sources, targets = groups.sizes(patches, r)
        f = feature.width(d_model, d_inner)
        return patches * score.cost(d_model, d_inner) + (sources + targets) * f + sources * targets * f + r * d_model

    return cost
