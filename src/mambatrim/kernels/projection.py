"""Narrow projections of several directions at once: x_proj, which makes dt, B and C of a scan."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .library import MAX_DIRECTIONS, cast, wide
from .linear import linear

_RECORD = struct.Struct(cpu.PRODUCT).pack


def project(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x (S, B, L, E) times S weights (O, E) transposed -> S times (B, L, O), in fp32 (fp64), which the scan works in.

    For inference on a CPU one compiled kernel makes all of them, in fp32, and in bf16 where it is the one to multiply
    that; else each is a product of its own, in the dtype of x.
    """
    # the first question decides alone where a graph is recorded
    if cpu.direct(x, *weights) and _takes(x, weights):
        return _compiled(x.contiguous(), [weight.contiguous() for weight in weights])
    exact = wide(x)
    return [cast(linear(one, weight), exact) for one, weight in zip(x.unbind(0), weights, strict=True)]


def _takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    if any(weight.dtype != x.dtype for weight in weights) or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and x.shape[3] % 2 == 0 and cpu.multiplies_bf16())


def _compiled(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    directions, batch, length, inputs = x.shape
    rows, outputs = batch * length, weights[0].shape[0]
    y = x.new_empty(directions, batch, length, outputs, dtype=torch.float32)
    if y.numel():
        head = (directions, rows, inputs, outputs, x.dtype == torch.bfloat16, torch.get_num_threads())
        pointers = [weight.data_ptr() for weight in weights] + [0] * (MAX_DIRECTIONS - directions)
        cpu.call("product", _RECORD(*head, x.data_ptr(), rows * inputs, y.data_ptr(), 0, 0, *pointers))
    return list(y.unbind(0))
