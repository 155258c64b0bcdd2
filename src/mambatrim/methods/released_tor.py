"""What ToR_SSM's published code does (wuyushuwys/ToR_SSM): its EViT, PuMer and UTR, bugs included, for traceability.

The functions carry over line by line where they act on patches; the code knows no class token, which is protected here
as for every method. At most half of the patches can go in one step; where the code would silently remove fewer, the
reducer says so.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..names import lookup
from ..reduction import OUTPUT, Assignment, Feature, Links, Method, Score, Signals, plain, rank
from ..reduction.matching import cosine, even_odd, strongest, unit
from ..reduction.reducer import half
from ..reduction.scores import clipped
from .bipartite import Pairing
from .ranking import topk

CLIPPED = clipped("update")


def evit_released(score: Score = OUTPUT) -> Method:
    """EViT in ToR_SSM as released: it keeps the r least of what it should keep, and drops the most important tokens.

    wuyushuwys/ToR_SSM, src/pom/modules/pom.py:34-45: scores are sorted ascending and those up to the threshold are
    kept. The code keeps one token more than it was asked for; here the schedule's count goes.

    Args:
        score: OUTPUT, the code's metric "clip"; any other Score is inverted too.
    """
    cost = topk(score, name="evit_released").cost

    def plan(signals: Signals, r: int) -> Assignment:
        importance = score.pool(signals)  # (B, M)
        (lowest,) = rank(importance, sizes=(importance.shape[1] - r,))
        return Assignment.from_keep(lowest, importance.shape[1])

    return Method("evit_released", score.needs, plan, plain, cost=cost, source="wuyushuwys/ToR_SSM")


def _someone_elses(source: Tensor, links: Links, r: int, length: int) -> Assignment:
    """The r strongest links, but with the sources sorted by position and the targets not (tome.py:51-58)."""
    sources, targets = strongest(source, links, r)
    return Assignment.from_links(sources.sort(dim=1, stable=True).values, targets, length)


def _mismatched(metric: Tensor, r: int) -> Assignment:
    """PuMer's links for a metric (B, M, F)."""
    source, target = even_odd(metric.shape[0], metric.shape[1], metric.device)
    return _someone_elses(source, cosine(metric, source, target), r, metric.shape[1])


def _mixed(metric: Tensor, r: int) -> Assignment:
    """UTR's links: every channel of the metric (B, M, F) is sorted on its own, so that a row is no longer a token.

    tome.py:133-155: the upper half of these rows is matched against the lower half, and the indices found are then
    used for the odd and even tokens.
    """
    rows = unit(metric).sort(dim=1, descending=True, stable=True).values
    targets = metric.shape[1] // 2
    best = (rows[:, targets:] @ rows[:, :targets].transpose(1, 2)).max(dim=2)
    source, target = even_odd(metric.shape[0], metric.shape[1], metric.device)
    return _someone_elses(source, Links(target.gather(1, best.indices), best.values), r, metric.shape[1])


def pumer_released(feature: Feature = CLIPPED) -> Method:
    """PuMer in ToR_SSM as released: every source is merged into some other source's match.

    wuyushuwys/ToR_SSM, src/pom/modules/tome.py:51-58. Which tokens go is right; where they go is not. The code also
    drops a surviving token with a channel that is exactly zero (pom.py:58), which does not happen in practice.

    Args:
        feature: the clipped update; the code can be told not to clip, which is `joined("update")`.
    """
    pairing = Pairing(feature)
    return Method(
        "pumer_released",
        pairing.feature.needs,
        lambda signals, r: _mismatched(pairing.feature.read(signals), r),
        plain,
        cost=pairing.cost,
        most=half,
        source="wuyushuwys/ToR_SSM",
    )


def _prune_only(x: Tensor, plan: Assignment) -> Tensor:
    return plan.select(x)


def _merge_only(x: Tensor, plan: Assignment) -> Tensor:
    return plan.merge(x, torch.ones_like(x[:, :, 0]))


def _hybrid(x: Tensor, plan: Assignment, counted: Tensor | None = None) -> Tensor:
    """Add, per channel, the r // 2 largest of the sources' values, and divide by a size that counts r // 2 sources.

    tome.py:382-400. Which sources are counted is a top-k over equal sizes there, so that the kernel decides: here the
    first ones, or those at `counted` (B, r // 2).
    """
    source = Assignment.from_prune(plan.keep, plan.length).keep  # (B, r)
    target, few = plan.dest.gather(1, source), source.shape[1] // 2
    values = x.gather(1, source.unsqueeze(2).expand(-1, -1, x.shape[2]))  # (B, r, D)
    # per channel on purpose: this is the bug
    largest = values.argsort(dim=1, descending=True, stable=True)[:, :few]
    kept = torch.zeros_like(values).scatter(1, largest, values.gather(1, largest))
    if counted is None:
        counted = torch.arange(few, device=x.device).expand(x.shape[0], -1)
    total = plan.select(x).scatter_add(1, target.unsqueeze(2).expand_as(kept), kept)
    ones = torch.ones_like(total[:, :, 0])
    size = ones.scatter_add(1, target.gather(1, counted), torch.ones_like(counted, dtype=ones.dtype))
    return total / size.unsqueeze(2)


_TOR_STRATEGIES: dict[str, Callable[[Tensor, Assignment], Tensor]] = {
    "prune_only": _prune_only,
    "merge_only": _merge_only,
    "hybrid": _hybrid,
}


def utr_released(hidden: str = "hybrid", residual: str = "merge_only", feature: Feature = CLIPPED) -> Method:
    """UTR in ToR_SSM as released: the first even tokens go into the first odd one, whatever they show.

    wuyushuwys/ToR_SSM, src/pom/modules/tome.py: channels are sorted on their own before matching (:133), so that with
    clipped outputs the choice hardly depends on the image; targets are those of other sources (as in
    `pumer_released`); `hybrid` keeps the largest source values per channel and adds them up (:389-394). The hidden
    strategy acts on the block's update and the residual strategy on the rest of the stream, which are the two streams
    of the code.

    Args:
        hidden: "prune_only", "merge_only" or "hybrid". residual: the same; the defaults are those of the code.
        feature: as in `pumer_released`.
    """
    on_hidden = lookup("hidden strategy of utr_released", hidden, _TOR_STRATEGIES)
    on_residual = lookup("residual strategy of utr_released", residual, _TOR_STRATEGIES)

    def merge(x: Tensor, plan: Assignment, signals: Signals) -> Tensor:
        return on_hidden(signals.update, plan) + on_residual(x - signals.update, plan)

    def plan(signals: Signals, r: int) -> Assignment:
        return _mixed(feature.read(signals), r)

    cost = Pairing(feature).cost
    needs = tuple(dict.fromkeys((*feature.needs, "update")))
    method = Method("utr_released", needs, plan, plain, cost=cost, most=half, source="wuyushuwys/ToR_SSM")
    return replace(method, merge=merge)


def utr_released_merge(feature: Feature = CLIPPED) -> Method:
    """UTR in ToR_SSM as released, with `merge_only` in both streams."""
    return replace(utr_released("merge_only", "merge_only", feature), name="utr_released_merge")


def utr_released_prune(feature: Feature = CLIPPED) -> Method:
    """UTR in ToR_SSM as released, with `prune_only` in both streams."""
    both = utr_released("prune_only", "prune_only", feature)

    def plan(signals: Signals, r: int) -> Assignment:
        return Assignment.from_keep(both.plan(signals, r).keep, signals.ids.shape[1])

    return replace(both, name="utr_released_prune", plan=plan, merge=None)
