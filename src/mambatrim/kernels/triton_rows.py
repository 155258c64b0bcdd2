"""The causal convolution over S directions and RMSNorm in Triton, forward and backward (definition:
kernels/reference.py).

Values and gradients are tested in Triton's interpreter on a CPU (tests/test_triton.py). They compile for
compute capability 8.0 and 9.0 (Triton 3.7); none has run on a GPU, their speed is not measured, and block sizes are not
tuned.

All arithmetic is fp32. Gradients of the parameters are written as partial sums and added in PyTorch, without atomics:
results are the same in every run.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import dense_rows

TOKENS, CHANNELS = 32, 64  # of one tile of the convolution
PROGRAMS = 1024  # at most, that share the rows of the norm's backward pass


@triton.jit
def _before_silu(x, x_token, weight, bias, t, e, length, channels, toward, K: tl.constexpr):
    """The sum over taps at tokens t, for channels e: (T, E)."""
    live = e < channels
    out = tl.zeros((t.shape[0], e.shape[0]), tl.float32)
    if bias is not None:
        out += tl.load(bias + e, mask=live, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        at = t - toward * (K - 1 - k)
        mask = ((at >= 0) & (at < length))[:, None] & live[None, :]
        value = tl.load(x + at[:, None] * x_token + e[None, :], mask=mask, other=0.0).to(tl.float32)
        out += value * tl.load(weight + e * K + k, mask=live, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit(do_not_specialize=["length", "reverse"])
def conv_forward_kernel(
    x, x_batch, x_token, weight, bias, y, batch, length, channels, reverse,
    K: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, TOKENS)
    image, s = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(2)
    t = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    toward = 1 - 2 * ((reverse >> s) & 1)  # the step from a token to the next of the walk
    weight += s * channels * K
    if bias is not None:
        bias += s * channels
    out = _before_silu(x + image * x_batch, x_token, weight, bias, t, e, length, channels, toward, K)
    if SILU:
        out *= 1.0 / (1.0 + tl.exp(-out))
    y += (s * batch + image) * length * channels
    mask = (t < length)[:, None] & (e < channels)[None, :]
    tl.store(y + t[:, None] * channels + e[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _grad_before_silu(
    grad_y, x, x_token, weight, bias, t, e, length, channels, toward, K: tl.constexpr, SILU: tl.constexpr
):
    """The gradient of the sum over taps at tokens t: (T, E); 0 outside the sequence."""
    mask = ((t >= 0) & (t < length))[:, None] & (e < channels)[None, :]
    g = tl.load(grad_y + t[:, None] * channels + e[None, :], mask=mask, other=0.0).to(tl.float32)
    if SILU:
        out = _before_silu(x, x_token, weight, bias, t, e, length, channels, toward, K)
        gate = 1.0 / (1.0 + tl.exp(-out))
        g *= gate * (1.0 + out * (1.0 - gate))
    return g


@triton.jit(do_not_specialize=["length", "reverse"])
def conv_backward_kernel(
    grad_y, x, x_batch, x_token, weight, bias, grad_x, grads, batch, length, channels, reverse,
    S: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(length, TOKENS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = e < channels
    x += image * x_batch
    sum_x = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for s in range(S):
        toward = 1 - 2 * ((reverse >> s) & 1)
        own, incoming = weight + s * channels * K, grad_y + (s * batch + image) * length * channels
        offset = bias
        if bias is not None:
            offset = bias + s * channels
        part = grads + (tl.program_id(0).to(tl.int64) * S + s) * (K + 1) * channels + e  # (programs, S, K + 1, E)
        g = _grad_before_silu(incoming, x, x_token, own, offset, t, e, length, channels, toward, K, SILU)
        tl.store(part + K * channels, tl.sum(g, axis=0), mask=live)
        for k in tl.static_range(K):
            # token t is tap k of the output K - 1 - k steps on, and its own tap k reads the token as many steps back
            ahead, back = t + toward * (K - 1 - k), t - toward * (K - 1 - k)
            mask = ((back >= 0) & (back < length))[:, None] & live[None, :]
            value = tl.load(x + back[:, None] * x_token + e[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(part + k * channels, tl.sum(g * value, axis=0), mask=live)
            on = _grad_before_silu(incoming, x, x_token, own, offset, ahead, e, length, channels, toward, K, SILU)
            sum_x += on * tl.load(own + e * K + k, mask=live, other=0.0).to(tl.float32)[None, :]
    where = image * length * channels + t[:, None] * channels + e[None, :]
    tl.store(grad_x + where, sum_x.to(grad_x.dtype.element_ty), mask=(t < length)[:, None] & live[None, :])


@triton.jit
def norm_forward_kernel(x, weight, y, columns, eps, WIDTH: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    value = tl.load(x + row * columns + i, mask=i < columns, other=0.0).to(tl.float32)
    factor = tl.load(weight + i, mask=i < columns, other=0.0).to(tl.float32)
    out = value * (1.0 / tl.sqrt(tl.sum(value * value, axis=0) / columns + eps)) * factor
    tl.store(y + row * columns + i, out.to(y.dtype.element_ty), mask=i < columns)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(grad_y, x, weight, grad_x, grads, rows, columns, eps, WIDTH: tl.constexpr):
    i = tl.arange(0, WIDTH)
    factor = tl.load(weight + i, mask=i < columns, other=0.0).to(tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        start = row * columns
        value = tl.load(x + start + i, mask=i < columns, other=0.0).to(tl.float32)
        g = tl.load(grad_y + start + i, mask=i < columns, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / columns + eps)
        normal = value * inverse
        total += g * normal
        g *= factor
        out = inverse * (g - normal * (tl.sum(g * normal, axis=0) / columns))
        tl.store(grad_x + start + i, out.to(grad_x.dtype.element_ty), mask=i < columns)
    tl.store(grads + tl.program_id(0).to(tl.int64) * columns + i, total, mask=i < columns)


def mask_of(reverse: list[bool]) -> int:
    """Bit s is set where direction s is reversed."""
    return sum(1 << s for s, turned in enumerate(reverse) if turned)


def conv_forward(x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool) -> Tensor:
    """x (B, L, E) -> (S, B, L, E): arguments of the operator `causal_conv1d`."""
    x, taps, offsets = dense_rows(x), torch.stack(weight), torch.stack(bias) if bias else None
    batch, length, channels = x.shape
    y = x.new_empty(len(weight), batch, length, channels)
    if y.numel():
        grid = (batch * triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS), len(weight))
        with torch.cuda.device_of(x):
            conv_forward_kernel[grid](
                *(x, x.stride(0), x.stride(1), taps, offsets, y, batch, length, channels, mask_of(reverse)),
                **{"K": taps.shape[2], "SILU": silu, "TOKENS": TOKENS, "CHANNELS": CHANNELS},
            )
    return y


def conv_backward(
    grad_y: Tensor, x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, L, E), the weights (S, E, K) and the biases (S, E)."""
    x, taps, offsets = dense_rows(x), torch.stack(weight), torch.stack(bias) if bias else None
    batch, length, channels = x.shape
    directions, _, width = taps.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = (batch * triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS))
    grads = x.new_empty(grid[0], directions, width + 1, channels, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            conv_backward_kernel[grid](
                *(grad_y.contiguous(), x, x.stride(0), x.stride(1), taps, offsets, grad_x, grads),
                *(batch, length, channels, mask_of(reverse)),
                **{"S": directions, "K": width, "SILU": silu, "TOKENS": TOKENS, "CHANNELS": CHANNELS},
            )
    total = grads.sum(0)  # (S, K + 1, E)
    return grad_x, total[:, :width].transpose(1, 2).contiguous(), total[:, width].contiguous()


def _warps(width: int) -> int:
    return min(8, max(1, width // 256))


def norm_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., D) -> (..., D) of `dtype`: arguments of the operator `rms_norm`."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        columns = x.shape[-1]
        width = triton.next_power_of_2(columns)
        with torch.cuda.device_of(x):
            norm_forward_kernel[(x.numel() // columns,)](
                x, weight.contiguous(), y, columns, eps, WIDTH=width, num_warps=_warps(width)
            )
    return y


def norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of the weight (D)."""
    x, weight = x.contiguous(), weight.contiguous()
    grad_x, columns = torch.empty_like(x), x.shape[-1]
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    rows, width = x.numel() // columns, triton.next_power_of_2(columns)
    grads = x.new_empty(min(rows, PROGRAMS), columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        norm_backward_kernel[(grads.shape[0],)](
            *(grad_y.contiguous(), x, weight, grad_x, grads, rows, columns, eps),
            **{"WIDTH": width, "num_warps": _warps(width)},
        )
    return grad_x, grads.sum(0).to(weight.dtype)
