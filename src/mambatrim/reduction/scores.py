"""Scores: one number per token, from the timescale, the scan output or the stream; and the split by rank."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .tokens import Signals


@dataclass(frozen=True)
class Score:
    """How important each token is, higher is more.

    name: what tables and errors call it.
    needs: the signals that `pool` reads.
    pool: Signals -> (B, M).
    cost: (d_model, d_inner) -> multiply-adds per token.
    """

    name: str
    needs: tuple[str, ...]
    pool: Callable[[Signals], Tensor]
    cost: Callable[[int, int], int]


def over_directions(x: Tensor) -> Tensor:
    """Mean over channels, then the sum over scan directions: x (B, S, M, E) in token order -> (B, M)."""
    return x.mean(dim=-1).sum(dim=1)


def inverse(score: Score) -> Score:
    """The same score with its order turned round, as a control."""
    return Score(f"inverse {score.name}", score.needs, lambda signals: -score.pool(signals), score.cost)


def rank(score: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Cut tokens into groups by rank, least important first; equal scores keep sequence order.

    Args:
        score: (B, M).
        sizes: how many tokens the first, second, ... group gets; what is left over is in none.

    Returns:
        One (B, n) tensor of positions per group, in the order of rank.
    """
    if sum(sizes) > score.shape[1] or min(sizes, default=0) < 0:
        raise ValueError(f"groups of {sizes} tokens do not fit into {score.shape[1]} tokens")
    order = torch.argsort(score, dim=1, stable=True)[:, : sum(sizes)]
    return order.split(list(sizes), dim=1)


# the score of MTR: mean over channels of the timescale, summed over directions; the mean is the scan's by-product
DELTA = Score("delta", ("dt_mean",), lambda signals: signals.dt_mean.sum(dim=1), lambda d_model, d_inner: 2 * d_inner)
NORM = Score("norm", ("hidden",), lambda signals: signals.hidden.norm(dim=-1), lambda d_model, d_inner: d_model)
