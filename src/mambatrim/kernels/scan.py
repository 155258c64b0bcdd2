"""The selective scan, in one direction or several: what callers use.

The dtype policy of the scan stands here: step size, state, A, D and biases are fp32 whatever the inputs are (fp64 for
fp64 inputs); the output has the dtype of `u`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, scan_operator
from . import virtual as virtual_sequence
from .library import MAX_DIRECTIONS, cast, wide
from .virtual import Virtual

MAX_STATES = 256


class Direction(NamedTuple):
    """One direction of a scan: its parameters and its token-dependent projections."""

    dt: Tensor  # (B, L, R), or (B, L, E) without dt_weight: before bias and softplus
    A: Tensor  # (E, N), negative; log(-A) where the scan is told so
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor | None = None  # (E)
    dt_bias: Tensor | None = None  # (E)
    dt_weight: Tensor | None = None  # (E, R)
    reverse: bool = False


TENSORS = Direction._fields[:-1]


class Scan(NamedTuple):
    """What a scan returns."""

    y: Tensor  # (B, L, E), dtype of u
    dt_mean: Tensor  # (B, S, L) fp32: the time step averaged over channels, token order; has no gradient
    state: Tensor  # (S, B, E, N) fp32: the state after the last step; has no gradient


def scan(
    u: Tensor,
    directions: Sequence[Direction],
    z: Tensor | None = None,
    repeats: Tensor | None = None,
    softplus: bool = True,
    scale: float = 1.0,
    virtual: Virtual | None = None,
    log_A: bool = False,
) -> Scan:
    """`scale` times the sum of the selective scans of several directions, gated with silu(z).

    Args:
        u: (S, B, L, E), the input of each direction, all in token order.
        directions: S <= 4 records.
        z: (B, L, E), the gate, common to all directions.
        repeats: (B, L), factor on the time step of each token (1 where it is not given).
        softplus: whether the time step is softplus(dt + bias), or dt + bias as it stands.
        scale: 0.5 averages two directions (Vim), 1 adds them (VideoMamba).
        virtual: positions that the L rows stand for; every row gets the mean of what its positions would.
        log_A: the directions have log(-A) in the place of A, as checkpoints do.

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the sentence names the argument.
    """
    _check_scan(u, directions, z, repeats)
    exact = wide(u)
    *tensors, reverse = zip(*directions, strict=True)  # of each field the values of all directions
    lists = [[] if values[0] is None else [cast(x, exact) for x in values] for values in tensors]
    gate = None if z is None else cast(z, u.dtype)
    factor = None if repeats is None else cast(repeats, exact)
    arguments = (*lists, gate, factor, list(reverse), softplus, scale)
    if virtual is not None:
        virtual_sequence.check(virtual, *u.shape[1:3])
    given = [x for x in (u, gate, factor, *(virtual or ()), *(x for items in lists for x in items)) if x is not None]
    if cpu.direct(*given) and cpu.handles(u):
        return Scan(*scan_operator.record(u, *arguments, log_A=log_A).forward(virtual))
    if log_A:
        lists[1][:] = [-torch.exp(a) for a in lists[1]]
    if virtual is None:
        return Scan(*torch.ops.mambatrim.selective_scan(u, *arguments))
    return Scan(*virtual_sequence.scan(virtual, u, *arguments))


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    repeats: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction: the recurrence of Mamba-1 (arXiv 2312.00752), token-major.

    Args:
        u, z: (B, L, E). dt: (B, L, E), or (B, L, R) with dt_weight (E, R). A: (E, N), negative. D, dt_bias: (E).
        B, C: (B, L, N), or (B, L, G, N) for G groups of E / G channels.
        repeats: (B, L), factor on the time step. reverse: from the last token to the first.

    Returns:
        y (B, L, E), the time step's mean over channels (B, L), and the last state (B, E, N).

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the sentence names the argument.
    """
    if B.dim() != 4:
        one = Direction(dt, A, B, C, D, dt_bias, dt_weight, reverse)
        y, dt_mean, state = scan(u[None], [one], z, repeats, softplus)
        return y, dt_mean[:, 0], state[0]
    groups, channels = B.shape[2], u.shape[2]
    if groups == 0 or channels % groups or C.shape != B.shape:
        raise ValueError(
            f"B and C must agree and have a number of groups that divides {channels} channels, got {groups}"
        )

    width = channels // groups

    def part(x: Tensor, g: int, axis: int) -> Tensor:
        return x.narrow(axis, g * width, width)

    pieces = []
    for g in range(groups):
        one = Direction(
            dt=dt if dt_weight is not None else part(dt, g, 2),
            A=part(A, g, 0),
            B=B[:, :, g],
            C=C[:, :, g],
            D=None if D is None else part(D, g, 0),
            dt_bias=None if dt_bias is None else part(dt_bias, g, 0),
            dt_weight=None if dt_weight is None else part(dt_weight, g, 0),
            reverse=reverse,
        )
        pieces.append(scan(part(u, g, 2)[None], [one], None if z is None else part(z, g, 2), repeats, softplus))
    return (
        torch.cat([p.y for p in pieces], dim=2),
        torch.stack([p.dt_mean[:, 0] for p in pieces]).mean(0),
        torch.cat([p.state[0] for p in pieces], dim=1),
    )


def _check_scan(u: Tensor, directions: Sequence[Direction], z: Tensor | None, repeats: Tensor | None) -> None:
    if u.dim() != 4 or u.shape[0] != len(directions) or not 1 <= len(directions) <= MAX_DIRECTIONS:
        raise ValueError(
            f"u must be (S, B, L, E) with one entry for each of 1 to {MAX_DIRECTIONS} directions, "
            f"got shape {tuple(u.shape)} and {len(directions)} directions"
        )
    if not u.is_floating_point():
        raise ValueError(f"u must be of a floating-point dtype, got {u.dtype}")
    _, batch, length, channels = u.shape
    first, device = directions[0], u.device
    states = first.A.shape[-1]
    if not 1 <= states <= MAX_STATES:
        raise ValueError(f"A must have 1 to {MAX_STATES} states, got {states}")
    width = channels if first.dt_weight is None else first.dt_weight.shape[-1]
    row = (batch, length, states)
    # in the order of Direction's fields
    shapes = ((batch, length, width), (channels, states), row, row, (channels,), (channels,), (channels, width))
    for direction in directions:
        for name, value, shape, like in zip(TENSORS, direction[:-1], shapes, first[:-1], strict=True):
            if (value is None) != (like is None):
                raise ValueError(f"{name} must be given for all directions or for none")
            _check_tensor(name, value, shape, u, device)
    _check_tensor("z", z, (batch, length, channels), u, device)
    _check_tensor("repeats", repeats, (batch, length), u, device)


def _check_tensor(name: str, x: Tensor | None, shape: tuple[int, ...], u: Tensor, device: torch.device) -> None:
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape} to fit u {tuple(u.shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of u, {device}, got {x.device}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point dtype, got {x.dtype}")
