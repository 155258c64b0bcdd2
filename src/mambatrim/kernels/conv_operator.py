"""The operator `mambatrim::causal_conv1d`: its kernels, its gradient, its shapes, its FLOPs.

Callers use `causal_conv1d` (convolution.py).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, gpu, reference
from .library import register


def record(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    reverse: Sequence[bool],
    silu: bool,
    y: Tensor | None = None,
    grad_y: Tensor | None = None,
    grad_x: Tensor | None = None,
    grads: Sequence[Tensor] = (),
    virtual: tuple[Tensor, Tensor] | None = None,
) -> bytes:
    """The record ConvArgs of csrc/abi.h; `virtual` is the source (B, T) and the share (B, L)."""
    batch, length, channels = x.shape
    head = struct.pack(
        cpu.CONV,
        *(batch, length, channels, weight[0].shape[1]),
        *(len(weight), silu, x.dtype == torch.bfloat16, torch.get_num_threads()),
        *cpu.rows(x),
        *(cpu.pointer(y), cpu.pointer(grad_y), cpu.pointer(grad_x)),
        *cpu.virtual(virtual),
        cpu.UNPACKED,
    )
    directions = [
        struct.pack(
            cpu.CONV_DIRECTION,
            *(weight[s].data_ptr(), bias[s].data_ptr() if bias else 0, reverse[s]),
            *((g[s].data_ptr() for g in grads) if grads else (0, 0)),
        )
        for s in range(len(weight))
    ]
    return cpu.padded(head + b"".join(directions), cpu.CONV, cpu.CONV_DIRECTION)


def _forward(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], reverse: Sequence[bool], silu: bool
) -> Tensor:
    """x (B, L, E), S weights (E, K) -> (S, B, L, E)."""
    y = x.new_empty(len(weight), *x.shape)
    if y.numel():
        cpu.call("conv_forward", record(x, weight, bias, reverse, silu, y=y))
    return y


def _backward(
    grad_y: Tensor, x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], reverse: Sequence[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, L, E), the weights (S, E, K) and the biases (S, E)."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = (len(weight), *weight[0].shape)
    grads = (x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape[:2], dtype=torch.float32))
    grad_y = grad_y.contiguous()  # under a name: a record holds addresses, not tensors
    if x.numel():
        cpu.call("conv_backward", record(x, weight, bias, reverse, silu, grad_y=grad_y, grad_x=grad_x, grads=grads))
    return grad_x, *grads


def _conv_pytorch(x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool) -> Tensor:
    biases: Sequence[Tensor | None] = bias or [None] * len(weight)
    return torch.stack(
        [reference.causal_conv1d(x, w, b, r, silu) for w, b, r in zip(weight, biases, reverse, strict=True)]
    )


def conv_cpu(x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool) -> Tensor:
    if cpu.handles(x):
        weight, bias = [w.contiguous() for w in weight], [b.contiguous() for b in bias]
        return _forward(cpu.dense_rows(x), weight, bias, reverse, silu)
    return _conv_pytorch(x, weight, bias, reverse, silu)


def _conv_fake(x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool) -> Tensor:
    return x.new_empty(len(weight), *x.shape)


def _conv_backward_pytorch(
    grad_y: Tensor, x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, *weight, *bias)]
        taps, offsets = leaves[1 : 1 + len(weight)], leaves[1 + len(weight) :]
        grads = torch.autograd.grad(_conv_pytorch(leaves[0], taps, offsets, reverse, silu), leaves, grad_y)
    grad_weight = torch.stack(grads[1 : 1 + len(weight)])
    return grads[0], grad_weight, torch.stack(grads[1 + len(weight) :]) if bias else grad_weight.sum(-1).zero_()


def _conv_backward_cpu(
    grad_y: Tensor, x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.handles(x):
        weight, bias = [w.contiguous() for w in weight], [b.contiguous() for b in bias]
        return _backward(grad_y, cpu.dense_rows(x), weight, bias, reverse, silu)
    return _conv_backward_pytorch(grad_y, x, weight, bias, reverse, silu)


def _conv_backward_fake(grad_y: Tensor, x: Tensor, weight: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(weight), *weight[0].shape)
    return x.new_empty(x.shape), weight[0].new_empty(shape), weight[0].new_empty(shape[:2])


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.reverse, ctx.silu = inputs
    ctx.taps = len(weight)
    ctx.save_for_backward(x, *weight, *bias)


def _conv_grad(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, *flat = ctx.saved_tensors
    weight, bias = flat[: ctx.taps], flat[ctx.taps :]
    grads = torch.ops.mambatrim.causal_conv1d_backward(grad_y, x, weight, bias, ctx.reverse, ctx.silu)
    return grads[0], list(grads[1].unbind(0)), list(grads[2].unbind(0)) if bias else [], None, None


ARGUMENTS = "Tensor x, Tensor[] weight, Tensor[] bias, bool[] reverse, bool silu"
register(
    "causal_conv1d",
    f"({ARGUMENTS}) -> Tensor",
    *(conv_cpu, gpu.form("triton_rows", "conv_forward", _conv_pytorch), _conv_fake, _conv_setup, _conv_grad),
)
register(
    "causal_conv1d_backward",
    f"(Tensor grad_y, {ARGUMENTS}) -> (Tensor x, Tensor weight, Tensor bias)",
    _conv_backward_cpu,
    gpu.form("triton_rows", "conv_backward", _conv_backward_pytorch),
    _conv_backward_fake,
)


@register_flop_formula(torch.ops.mambatrim.causal_conv1d)
def _conv_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = x
    return 2 * len(weight) * batch * length * channels * weight[0][1]
