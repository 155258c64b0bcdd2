"""Narrow projections of several directions at once: x_proj, which makes dt, B and C of a scan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .library import cast, wide
from .linear import linear, products


def project(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x (S, B, L, E) times S weights (O, E) transposed -> S times (B, L, O), in fp32 (fp64), which the scan works in.

    For inference on a CPU one compiled kernel makes all of them, in fp32, and in bf16 where it is the one to multiply
    that; else each is a product of its own, in the dtype of x.
    """
    # the first question decides alone where a graph is recorded
    if cpu.direct(x, *weights) and _takes(x, weights):
        return list(products(x, weights).unbind(0))
    exact = wide(x)
    return [cast(linear(one, weight), exact) for one, weight in zip(x.unbind(0), weights, strict=True)]


def _takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    if any(weight.dtype != x.dtype for weight in weights) or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and x.shape[3] % 2 == 0 and cpu.multiplies_bf16())
