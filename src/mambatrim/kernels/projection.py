"""Narrow projections into fp32: x_proj of all directions, which makes dt, B and C of a scan, and the classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .library import cast, wide
from .linear import linear, products


def project(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> list[Tensor]:
    """x (S, ..., E) times S weights (O, E) transposed, plus a bias (O) -> S times (..., O), in fp32 (fp64), which the
    scan works in.

    For inference on a CPU one compiled kernel makes all of them, in fp32, and in bf16 where it is the one to multiply
    that; else each is a product of its own, in the dtype of x.
    """
    # the first question decides alone where a graph is recorded
    given = weights if bias is None else (*weights, bias)
    if cpu.direct(x, *given) and _takes(x, given):
        return list(products(x, weights, None if bias is None else cast(bias, torch.float32)).unbind(0))
    exact = wide(x)
    return [cast(linear(one, weight, bias), exact) for one, weight in zip(x.unbind(0), weights, strict=True)]


def _takes(x: Tensor, weights: Sequence[Tensor]) -> bool:
    if any(weight.dtype != x.dtype for weight in weights) or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and x.shape[-1] % 2 == 0 and cpu.multiplies_bf16())
