"""The convolution and the scan over a virtual sequence: K rows stand for T positions, and nothing but these two sees
the positions.

`mambatrim::virtual_scan` and `mambatrim::virtual_conv1d` give, for every row, the mean over its positions of what the
ordinary operators give for the sequence of T positions in which each holds a copy of its row. That composition is the
definition, and what runs where the kernels do not and where gradients are wanted; the kernels, compiled for a CPU and
in Triton for a GPU, make everything that depends on the row alone only once a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import conv_operator, cpu, gpu, scan_operator
from .library import register


class Virtual(NamedTuple):
    """A sequence of T positions that exists as K rows."""

    source: Tensor  # (B, T) int64: the row that stands at each position; K where the position is gone
    share: Tensor  # (B, K) fp32: 1 / number of positions of each row


def check(virtual: Virtual, batch: int, rows: int) -> None:
    """Raise ValueError where the shapes or dtypes of a virtual sequence do not fit K rows."""
    source, share = virtual
    if source.dim() != 2 or source.shape[0] != batch or source.dtype != torch.int64:
        raise ValueError(f"source must be ({batch}, T) of int64, got {tuple(source.shape)} of {source.dtype}")
    if tuple(share.shape) != (batch, rows) or not share.is_floating_point():
        raise ValueError(f"share must be ({batch}, {rows}) of a floating-point dtype, got {tuple(share.shape)}")


def conv1d(
    x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool, virtual: Virtual
) -> Tensor:
    """As `causal_conv1d`, over a virtual sequence: x (B, K, E) -> (S, B, K, E)."""
    if _differentiated(x, *weight, *bias):
        return _conv_pytorch(x, weight, bias, reverse, silu, *virtual)
    run = _conv_cpu if cpu.direct(x, *weight, *bias, *virtual) else torch.ops.mambatrim.virtual_conv1d
    return run(x, weight, bias, reverse, silu, *virtual)


def scan(virtual: Virtual, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator `selective_scan`, over a virtual sequence: K rows in, K rows out."""
    lists = [x for argument in rest if isinstance(argument, list) for x in argument if isinstance(x, Tensor)]
    single = [x for x in rest if isinstance(x, Tensor)]
    if _differentiated(u, *lists, *single):
        return _scan_pytorch(u, *rest, *virtual)
    return torch.ops.mambatrim.virtual_scan(u, *rest, *virtual)


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# ------------------------------------------------------------------------------------------------------- the definition


def _compact(source: Tensor, rows: int) -> Tensor:
    """The same positions in the same order, those that are gone at the end."""
    return source.gather(1, torch.argsort((source == rows).to(torch.int8), dim=1, stable=True))


def _spread(x: Tensor, source: Tensor) -> Tensor:
    """A copy of its row at every position, zeros at the end: x (B, K, F) -> (B, T, F)."""
    rows = x.shape[1]
    there = (source < rows).unsqueeze(2)
    index = source.clamp(max=rows - 1).unsqueeze(2).expand(-1, -1, x.shape[2])
    return x.gather(1, index).where(there, 0)


def _mean(y: Tensor, source: Tensor, share: Tensor) -> Tensor:
    """Sum over the positions of each row, times its share: y (B, T, E) -> (B, K, E)."""
    spare = y.new_zeros(y.shape[0], share.shape[1] + 1, y.shape[2])  # the last row collects what is gone
    index = source.unsqueeze(2).expand_as(y)
    return spare.scatter_add(1, index, y)[:, :-1] * share.unsqueeze(2).to(y.dtype)


def _conv_pytorch(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    reverse: list[bool],
    silu: bool,
    source: Tensor,
    share: Tensor,
) -> Tensor:
    source = _compact(source, x.shape[1])
    wide = x.float() if x.dtype == torch.bfloat16 else x  # a mean of many positions is not taken in bf16
    full = torch.ops.mambatrim.causal_conv1d(_spread(wide, source), weight, bias, reverse, silu)
    return torch.stack([_mean(y, source, share) for y in full]).to(x.dtype)


def _scan_pytorch(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale, source, share = rest
    rows = u.shape[2]
    source = _compact(source, rows)

    def spread(x: Tensor) -> Tensor:
        return _spread(x, source)

    factor = torch.ones_like(share) if repeats is None else repeats
    # a step of no length leaves the state as it is
    steps = spread(factor.unsqueeze(2)).squeeze(2)
    full = [list(map(spread, items)) for items in (dt, B, C)]
    wide = u.float() if u.dtype == torch.bfloat16 else u
    y, dt_mean, state = torch.ops.mambatrim.selective_scan(
        torch.stack([spread(x) for x in wide]),
        *(full[0], A, full[1], full[2], D, dt_bias, dt_weight, None, steps, reverse, softplus, scale),
    )
    means = [_mean(d.unsqueeze(2), source, share).squeeze(2) for d in dt_mean.unbind(1)]
    y = _mean(y, source, share)
    y = y if z is None else y * torch.nn.functional.silu(z.to(y.dtype))
    return y.to(u.dtype), torch.stack(means, dim=1), state


# ------------------------------------------------------------------------------------------------- the compiled kernels


def _conv_cpu(x: Tensor, weight: list[Tensor], bias: list[Tensor], *rest: Any) -> Tensor:
    if not cpu.handles(x):
        return _conv_pytorch(x, weight, bias, *rest)
    reverse, silu, source, share = rest
    weight, bias, x = [w.contiguous() for w in weight], [b.contiguous() for b in bias], cpu.dense_rows(x)
    source, share = source.contiguous(), share.contiguous()
    y = x.new_empty(len(weight), *x.shape)
    if y.numel():
        record = conv_operator.record(x, weight, bias, reverse, silu, y=y, virtual=(source, share))
        cpu.call("virtual_conv_forward", record)
    return y


def _scan_cpu(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, source, share = rest
    if not cpu.handles(u):
        return _scan_pytorch(u, *rest)
    return scan_operator.record(u, *arguments).forward((source, share))


def _conv_fake(x: Tensor, weight: Sequence[Tensor], *_: Any) -> Tensor:
    return x.new_empty(len(weight), *x.shape)


def _scan_fake(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return scan_operator.fake(u, *rest[:-2])


register(
    "virtual_conv1d",
    f"({conv_operator.ARGUMENTS}, Tensor source, Tensor share) -> Tensor",
    *(_conv_cpu, gpu.form("triton_virtual", "conv_forward", _conv_pytorch), _conv_fake),
)
register(
    "virtual_scan",
    f"({scan_operator.ARGUMENTS}, Tensor source, Tensor share) -> (Tensor y, Tensor dt_mean, Tensor state)",
    *(_scan_cpu, gpu.form("triton_virtual", "scan_forward", _scan_pytorch), _scan_fake),
)


@register_flop_formula(torch.ops.mambatrim.virtual_conv1d)
def _conv_flops(x: Any, weight: Any, bias: Any, reverse: Any, silu: Any, source: Any, *_: Any, **__: Any) -> int:
    batch, _rows, channels = x
    return 2 * len(weight) * batch * conv_macs(source[1], channels, weight[0][1])


@register_flop_formula(torch.ops.mambatrim.virtual_scan)
def _scan_flops(
    u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_weight: Any, *rest: Any, **_: Any
) -> int:
    directions, batch, rows, channels = u
    source = rest[-2]
    rank = dt_weight[0][1] if dt_weight else 0
    return 2 * directions * batch * scan_operator.scan_macs(rows, channels, A[0][1], rank, source[1])


def conv_macs(positions: int, channels: int, taps: int) -> int:
    """Multiply-adds of one direction for one image: the filter at every position, and the mean."""
    return positions * channels * (taps + 1)
