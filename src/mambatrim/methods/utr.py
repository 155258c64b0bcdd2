"""UTR: unified token reduction (arXiv 2410.14725, EMNLP 2024): importance chooses the sides, similarity the pairs.

The paper reduces two streams, the output of a block (hidden states) and the residual it has not yet been added to, and
may treat them differently. Here the stream x is their sum. A mean or a selection is linear, so the same operation on
both is that operation on x. Two different ones are P_h(update) + P_r(x - update): the survivors are the same, but a
token whose update is pruned may still give its residual to its target. That sum is what `utr` computes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..names import lookup
from ..reduction import FEATURES, Assignment, Method, Signals, both, plain, scan_score
from ..reduction.scores import positive_mean
from .mtr import all_others, by_rank, link, linking_cost, lowest_half

Strategy = Callable[[Tensor, Tensor, Tensor], Tensor]


def _merge_all(source: Tensor, target: Tensor, importance: Tensor) -> Tensor:
    return target


def _prune_all(source: Tensor, target: Tensor, importance: Tensor) -> Tensor:
    return source


def _hybrid(source: Tensor, target: Tensor, importance: Tensor) -> Tensor:
    """Prune the less important half of the sources, rounded up, and merge the others."""
    order = torch.argsort(importance, dim=1, stable=True)  # (B, r)
    weak = order[:, : source.shape[1] - source.shape[1] // 2]
    return target.scatter(1, weak, source.gather(1, weak))


# (sources, targets, importance of the sources), (B, r) each -> where each source goes; to itself means pruned
STRATEGIES: dict[str, Strategy] = {"prune": _prune_all, "merge": _merge_all, "hybrid": _hybrid}

_SCORE = scan_score("y", both, positive_mean)
_GROUPS = by_rank(all_others, lowest_half)


def utr(hidden: str = "hybrid", residual: str = "merge", feature: str = "y") -> Method:
    """Link the less important half to the more important one, and merge or prune the r strongest links.

    arXiv 2410.14725, importance classification and unified token reduction. Importance is the channel mean of what is
    above zero in the scan's output, here before the gate and summed over directions; similarity the cosine of that
    output. Of the r links, `hybrid` prunes a share q = 0.5; which half is not said: here the less important sources
    (the code keeps the largest values). The mean is plain and forgets sizes, as in the code. Where more than half of
    the tokens go, the less important group is as large as needed. `utr_released` is what the code does.

    Args:
        hidden: what happens to the block's last update: "hybrid" (the paper's choice), "merge" or "prune".
        residual: what happens to the rest of the stream: "merge" (the paper's choice), "hybrid" or "prune".
        feature: what similarity is measured on, one of FEATURES.
    """
    on_hidden = lookup("hidden strategy of utr", hidden, STRATEGIES)
    on_residual = lookup("residual strategy of utr", residual, STRATEGIES)
    found = lookup("feature of utr", feature, FEATURES)

    def links(signals: Signals, r: int) -> tuple[Tensor, Tensor, Tensor]:
        importance = _SCORE.pool(signals)  # (B, M)
        source, target = link(found.read(signals), importance, _GROUPS, r)
        return source, target, importance.gather(1, source)

    def one_plan(signals: Signals, r: int) -> Assignment:
        source, target, importance = links(signals, r)
        return Assignment.from_links(source, on_residual(source, target, importance), signals.ids.shape[1])

    def all_links(signals: Signals, r: int) -> Assignment:
        source, target, _ = links(signals, r)
        return Assignment.from_links(source, target, signals.ids.shape[1])

    def two_streams(x: Tensor, plan: Assignment, signals: Signals) -> Tensor:
        source = Assignment.from_prune(plan.keep, plan.length).keep  # (B, r)
        target = plan.keep.gather(1, plan.dest.gather(1, source))
        importance, weight = _SCORE.pool(signals).gather(1, source), plain(signals)

        def reduced(stream: Tensor, strategy: Strategy) -> Tensor:
            step = Assignment.from_links(source, strategy(source, target, importance), plan.length)
            return step.merge(stream, weight)

        return reduced(signals.update, on_hidden) + reduced(x - signals.update, on_residual)

    method = Method(
        "utr",
        needs=tuple(dict.fromkeys((*_SCORE.needs, *found.needs))),
        plan=one_plan,
        weight=plain,
        cost=linking_cost(_SCORE, found, _GROUPS),
        source="arXiv 2410.14725",
    )
    if hidden == residual:
        return method
    needs = tuple(dict.fromkeys((*method.needs, "update")))
    return replace(method, needs=needs, plan=all_links, merge=two_streams)


def utr_prune() -> Method:
    """UTR that prunes all of its links, in both streams."""
    return replace(utr("prune", "prune"), name="utr_prune")


def utr_merge() -> Method:
    """UTR that merges all of its links, in both streams."""
    return replace(utr("merge", "merge"), name="utr_merge")
