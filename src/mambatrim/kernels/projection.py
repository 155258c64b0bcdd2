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

    For inference in fp32 on a CPU one compiled kernel makes all of them; else each is a product of its own, in the
    dtype of x.
    """
    # the first question decides alone where a graph is recorded
    if cpu.direct(x, *weights) and all(each.dtype == torch.float32 for each in (x, *weights)):
        return _compiled(x.contiguous(), [weight.contiguous() for weight in weights])
    exact = wide(x)
    return [cast(linear(one, weight), exact) for one, weight in zip(x.unbind(0), weights, strict=True)]


def _compiled(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    directions, batch, length, inputs = x.shape
    rows, outputs = batch * length, weights[0].shape[0]
    y = x.new_empty(directions, batch, length, outputs)
    if y.numel():
        head = (directions, rows, inputs, outputs, False, torch.get_num_threads())
        pointers = [weight.data_ptr() for weight in weights] + [0] * (MAX_DIRECTIONS - directions)
        cpu.call("product", _RECORD(*head, x.data_ptr(), rows * inputs, y.data_ptr(), 0, *pointers))
    return list(y.unbind(0))
