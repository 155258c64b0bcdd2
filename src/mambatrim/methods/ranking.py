"""Pruning by rank: EViT for Mamba, HSA / ToP-ViM, and top-k with any score."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..reduction import (
    OUTPUT,
    Assignment,
    Method,
    Score,
    Signals,
    both,
    exact,
    plain,
    rank,
    scan_score,
)
from ..reduction.scores import positive_mean


def dropped(importance: Tensor, r: int) -> Assignment:
    """The r least important tokens are gone: importance (B, M), M -> M - r."""
    (source,) = rank(importance, sizes=(r,))
    return Assignment.from_prune(source, importance.shape[1])


def fused(importance: Tensor, r: int) -> Assignment:
    """The r + 1 least important tokens become one, which stands where the most important of them stood: M -> M - r."""
    lowest, one = rank(importance, sizes=(r, 1))  # (B, r), (B, 1)
    return Assignment.from_links(lowest, one.expand(-1, r), importance.shape[1])


def topk(
    score: Score,
    rest: Callable[[Tensor, int], Assignment] = dropped,
    name: str = "topk",
    place: Callable[[Assignment, Tensor], Assignment] = exact,
    source: str = "control",
) -> Method:
    """Keep the tokens of highest score, in sequence order.

    Args:
        score: any Score.
        rest: what becomes of the others: `dropped`, or `fused` into one token.
        name, place, source: as in Method.
    """
    if not isinstance(score, Score):
        raise ValueError(f"score of {name} must be a Score such as DELTA, NORM or inverse(DELTA), got {score!r}")
    if not callable(rest):
        raise ValueError(f"rest of {name} must be a function such as dropped or fused, got {rest!r}")
    return Method(
        name,
        needs=score.needs,
        plan=partial(_plan, score=score, rest=rest),
        # only fused tokens are means, and they weigh their parts by what made them unimportant
        weight=plain if rest is dropped else partial(_by_score, score=score),
        place=place,
        cost=lambda patches, r, d_model, d_inner: (
            patches * score.cost(d_model, d_inner) + (0 if rest is dropped else (r + 1) * d_model)
        ),
        source=source,
    )


def _plan(signals: Signals, r: int, score: Score, rest: Callable[[Tensor, int], Assignment]) -> Assignment:
    return rest(score.pool(signals), r)


def _by_score(signals: Signals, score: Score) -> Tensor:
    """(B, M) weights that are not negative."""
    return score.pool(signals).clamp(min=0)


def evit(score: Score = OUTPUT, rest: Callable[[Tensor, int], Assignment] = dropped) -> Method:
    """EViT for Mamba: keep the top-k tokens; the others are dropped, or fused into one.

    arXiv 2202.07800, section 3. Its score is the class token's attention, which a Mamba has not: as in the adaptation
    of ToR_SSM the channel sum of the clipped mixer output stands in for it, without that code's inversion
    (`evit_released`). ToR_SSM drops the rest; EViT fuses it into one extra token, by attention: `rest=fused`. There
    the fused token is a sum; here, in a stream whose norm carries meaning, a mean with the same weights. The paper
    appends it; here it stands where the most important of its parts stood, and counts as one of the tokens kept.

    Args:
        score: any Score; with `fused` it is also the weight, clipped at zero.
        rest: `dropped` or `fused`.
    """
    return topk(score, rest, "evit", source="arXiv 2202.07800")


def evit_fused() -> Method:
    """EViT for Mamba that fuses the tokens it does not keep into one."""
    return replace(evit(rest=fused), name="evit_fused")


def hsa(
    directions: Callable[[Tensor], Tensor] = both,
    channels: Callable[[Tensor], Tensor] = positive_mean,
    place: Callable[[Assignment, Tensor], Assignment] = exact,
) -> Method:
    """HSA / ToP-ViM: keep the tokens whose gated scan output is largest, prune the others.

    arXiv 2409.18962 (NeurIPS 2024), token importance evaluation. The score is the channel mean of what is above zero in
    the scan's output; we take it after the gate, as the code does, and of both directions, where the code takes the
    backward one. The paper's alignment of hidden states is not in its code, and is not done here: survivors only keep
    their order. `hsa_released` has the mirrored scores.

    Args:
        directions: `both`, or `backward` as in the code, or `forward`.
        channels: `positive_mean`, or `mean` as in the code.
        place: `exact`, or `centre` as in the code.
    """
    for name, choice, allowed in (
        ("directions", directions, "both, forward or backward"),
        ("channels", channels, "positive_mean or mean"),
        ("place", place, "exact or centre"),
    ):
        if not callable(choice):
            raise ValueError(f"{name} of hsa must be a function such as {allowed}, got {choice!r}")
    return topk(scan_score("y_gated", directions, channels), dropped, "hsa", place, "arXiv 2409.18962")
