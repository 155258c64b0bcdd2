"""STM: merging along the sequence (arXiv 2509.22691). Its code is not released: our reading of the abstract."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..names import lookup
from ..reduction import FEATURES, Assignment, Feature, Method, Signals, by_size, exact
from ..reduction.matching import unit


def stm(
    protect: int = 1,
    feature: str = "hidden",
    weight: Callable[[Signals], Tensor] = by_size,
    place: Callable[[Assignment, Tensor], Assignment] = exact,
) -> Method:
    """Merge the r pairs of neighbours in the sequence that are most alike; tokens beside the class token come last.

    arXiv 2509.22691 says: merge with the nearest neighbours in the sequence, on both sides alike; protect the hidden
    states around the class token; a layer-wise schedule (here the schedule's). Guessed: similarity is the cosine of the
    residual stream; neighbours of neighbours may join, and a run of merged tokens stands at its middle; protected links
    are used only where no others are left, so that r tokens always go.

    Args:
        protect: patches protected on either side of every class or register token; 0 protects none.
        feature: what similarity is measured on, one of FEATURES.
        weight: `by_size` or `plain`.
        place: `exact`, `centre` or `proportional`.
    """
    if not isinstance(protect, int) or isinstance(protect, bool) or protect < 0:
        raise ValueError(f"protect of stm must be a number of patches from 0 up, got {protect!r}")
    found = lookup("feature of stm", feature, FEATURES)

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        return (2 * patches - 1) * found.width(d_model, d_inner) + r * d_model

    return Method(
        "stm",
        needs=(*found.needs, "special_at") if protect else found.needs,
        plan=partial(_plan, feature=found, protect=protect),
        weight=weight,
        place=place,
        cost=cost,
        source="our reading of arXiv 2509.22691",
    )


def _plan(signals: Signals, r: int, feature: Feature, protect: int) -> Assignment:
    """M -> M - r."""
    rows = unit(feature.read(signals))  # (B, M, F)
    alike = (rows[:, :-1] * rows[:, 1:]).sum(dim=2)  # (B, M - 1): token i with token i + 1
    if protect:
        near = _near(signals, protect)
        alike = alike - 4.0 * (near[:, :-1] | near[:, 1:])  # cosines differ by 2 at most: behind all others
    links = torch.argsort(alike, dim=1, descending=True, stable=True)[:, :r]  # (B, r)
    return runs(links + 1, rows.shape[1])


def _near(signals: Signals, protect: int) -> Tensor:
    """(B, M) bool: fewer than `protect` patches stand between a patch and a special token."""
    position = torch.arange(signals.ids.shape[1], device=signals.ids.device)[:, None]  # (M, 1)
    first_after = signals.special_at.unsqueeze(1)  # (B, 1, n)
    between = torch.where(position >= first_after, position - first_after, first_after - 1 - position)  # (B, M, n)
    return (between < protect).any(dim=2)


def runs(joined: Tensor, length: int) -> Assignment:
    """Tokens at `joined` (B, r), never the first, are one with the token before; a run stands at its middle."""
    starts = Assignment.from_prune(joined, length).keep  # (B, K)
    last = starts.new_full((starts.shape[0], 1), length - 1)
    ends = torch.cat([starts[:, 1:] - 1, last], dim=1)
    first = torch.ones(starts.shape[0], length, dtype=torch.int64, device=joined.device).scatter(1, joined, 0)
    return Assignment((starts + ends) // 2, first.cumsum(dim=1) - 1)
