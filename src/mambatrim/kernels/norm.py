"""RMSNorm: `mambatrim::rms_norm`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu, gpu, reference
from .library import cast, register, wide


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in `dtype` (default: of
    x)."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must have the length of the last dimension of x, {x.shape[-1]}, got {tuple(weight.shape)}"
        )
    exact = wide(x)
    run = _norm_cpu if cpu.direct(x, weight) else torch.ops.mambatrim.rms_norm
    return run(cast(x, exact), cast(weight, exact), eps, dtype or x.dtype)


def _record(x: Tensor, eps: float, dtype: torch.dtype, pointers: Sequence[int]) -> bytes:
    columns = x.shape[-1]
    head = (x.numel() // max(columns, 1), columns, dtype == torch.bfloat16, torch.get_num_threads())
    return struct.pack(cpu.NORM, *head, *pointers, eps)


def _forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., D) fp32, contiguous -> (..., D) of `dtype`."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr(), 0, 0, 0)
        cpu.call("norm_forward", _record(x, eps, dtype, pointers))
    return y


def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of the weight (D)."""
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    if x.numel():
        pointers = (x.data_ptr(), weight.data_ptr(), 0, grad_y.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr())
        cpu.call("norm_backward", _record(x, eps, grad_y.dtype, pointers))
    return grad_x, grad_weight


def _norm_pytorch(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return reference.rms_norm(x, weight, eps).to(dtype)


def _norm_cpu(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if cpu.handles(x) and dtype in (torch.float32, torch.bfloat16):
        return _forward(x.contiguous(), weight.contiguous(), eps, dtype)
    return _norm_pytorch(x, weight, eps, dtype)


def _norm_fake(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _norm_backward_pytorch(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        grad_x, grad_weight = torch.autograd.grad(_norm_pytorch(x, weight, eps, grad_y.dtype), (x, weight), grad_y)
    return grad_x, grad_weight


def _norm_backward_cpu(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if cpu.handles(x, grad_y):
        return _backward(grad_y.contiguous(), x.contiguous(), weight.contiguous(), eps)
    return _norm_backward_pytorch(grad_y, x, weight, eps)


def _norm_backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _norm_grad(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.mambatrim.rms_norm_backward(grad_y, *ctx.saved_tensors, ctx.eps), None, None)


register(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor",
    *(_norm_cpu, gpu.form("triton_rows", "norm_forward", _norm_pytorch), _norm_fake, _norm_setup, _norm_grad),
)
register(
    "rms_norm_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, float eps) -> (Tensor x, Tensor weight)",
    _norm_backward_cpu,
    gpu.form("triton_rows", "norm_backward", _norm_backward_pytorch),
    _norm_backward_fake,
)
