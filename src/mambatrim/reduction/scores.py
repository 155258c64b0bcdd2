"""Scores: one number per token. Features: one vector per token. Both say which signals they read, and their cost."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .matching import unit
from .tokens import SIGNALS, Signals

# channels of B and C in every published model: the FLOPs of scores and features on them are counted with it
D_STATE = 16


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


@dataclass(frozen=True)
class Feature:
    """What similarity is measured on.

    needs: the signals that `read` reads.
    read: Signals -> (B, M, F).
    width: (d_model, d_inner) -> F.
    """

    needs: tuple[str, ...]
    read: Callable[[Signals], Tensor]
    width: Callable[[int, int], int]


# ----------------------------------------------------------- directions: (B, S, M) in token order -> (B, M)


def both(x: Tensor) -> Tensor:
    """The sum over all scan directions."""
    return x.sum(dim=1)


def forward(x: Tensor) -> Tensor:
    """The direction that reads from the first token on."""
    return x[:, 0]


def backward(x: Tensor) -> Tensor:
    """The direction that reads from the last token on."""
    if x.shape[1] < 2:
        raise ValueError("the backward direction was asked for, but the blocks scan in one direction only")
    return x[:, 1]


# ------------------------------------------------------------------------------- channels: (B, S, M, E) -> (B, S, M)


def mean(x: Tensor) -> Tensor:
    """Mean over channels."""
    return x.mean(dim=-1)


def positive_mean(x: Tensor) -> Tensor:
    """Mean over channels of what is above zero (UTR, HSA)."""
    return x.clamp(min=0).mean(dim=-1)


# --------------------------------------------------------------------------------------------------------------- scores


def delta(directions: Callable[[Tensor], Tensor] = both) -> Score:
    """The score of MTR: mean over channels of the timescale, pooled over directions; the mean is the scan's own."""
    name = "delta" if directions is both else f"{_name(directions)} delta"
    return Score(name, ("dt_mean",), lambda signals: directions(signals.dt_mean), _both_inner)


def scan_score(
    signal: str, directions: Callable[[Tensor], Tensor] = both, channels: Callable[[Tensor], Tensor] = mean
) -> Score:
    """One of the scan's own quantities, pooled over channels and then over directions.

    Args:
        signal: "dt", "B", "C", "y" (before the gate) or "y_gated".
        directions: `both`, `forward` or `backward`.
        channels: `mean` or `positive_mean`.
    """
    if SIGNALS.get(signal) != 2 or signal == "dt_mean":
        raise ValueError(f"signal of a scan score must be dt, B, C, y or y_gated, got {signal!r}")
    return Score(
        signal if directions is both else f"{_name(directions)} {signal}",
        (signal,),
        lambda signals: directions(channels(getattr(signals, signal))),
        _WIDTHS[signal],
    )


def _name(function: Callable[[Tensor], Tensor]) -> str:
    return getattr(function, "__name__", "own")


def _both_inner(d_model: int, d_inner: int) -> int:
    return 2 * d_inner


def _class_similarity(signals: Signals) -> Tensor:
    """Mean cosine similarity of each patch (B, M) with the class and register tokens."""
    if signals.special.shape[1] == 0:
        raise ValueError("the class-token score needs a model with a class token, but this one has none")
    return (unit(signals.hidden) @ unit(signals.special).transpose(1, 2)).mean(dim=2)


def _centrality(signals: Signals) -> Tensor:
    """(B, M): minus the Euclidean distance of each patch from the middle of its frame, in patches."""
    width = signals.grid[-1]
    height = signals.grid[-2] if len(signals.grid) > 1 else 1
    row, column = signals.ids // width % height, signals.ids % width
    return -torch.hypot(row - (height - 1) / 2, column - (width - 1) / 2)


_WIDTHS: dict[str, Callable[[int, int], int]] = {
    "hidden": lambda d_model, d_inner: d_model,
    "update": lambda d_model, d_inner: d_model,
    "dt": _both_inner,
    "B": lambda d_model, d_inner: 2 * D_STATE,
    "C": lambda d_model, d_inner: 2 * D_STATE,
    "y": _both_inner,
    "y_gated": _both_inner,
}

DELTA = delta()
NORM = Score("norm", ("hidden",), lambda signals: signals.hidden.norm(dim=-1), _WIDTHS["hidden"])
# what the Mamba adaptations of EViT and PuMer put in the place of attention: the clipped output of the block's mixer
OUTPUT = Score("output", ("update",), lambda signals: signals.update.clamp(min=0).sum(dim=-1), _WIDTHS["update"])
CLASS_TOKEN = Score("class token", ("hidden", "special"), _class_similarity, lambda d_model, d_inner: 2 * d_model)
CENTRALITY = Score("centrality", (), _centrality, lambda d_model, d_inner: 2)


def inverse(score: Score) -> Score:
    """The same score with its order turned round, as a control."""
    return Score(f"inverse {score.name}", score.needs, lambda signals: -score.pool(signals), score.cost)


# ------------------------------------------------------------------------------------------------------------- features


def joined(signal: str) -> Feature:
    """A signal as it is; the channels of several directions side by side."""
    return Feature((signal,), lambda signals: signals.feature(signal), _WIDTHS[signal])


def averaged(signal: str) -> Feature:
    """The mean of a signal over its scan directions, both in token order."""
    width = _WIDTHS[signal]
    return Feature((signal,), lambda signals: getattr(signals, signal).mean(dim=1), partial(_half, width))


def clipped(signal: str) -> Feature:
    """What is above zero in a signal of the stream."""
    return Feature((signal,), lambda signals: signals.feature(signal).clamp(min=0), _WIDTHS[signal])


def _half(width: Callable[[int, int], int], d_model: int, d_inner: int) -> int:
    return width(d_model, d_inner) // 2


# features by name, for methods that leave the choice open
FEATURES: dict[str, Feature] = {signal: joined(signal) for signal in _WIDTHS}


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
