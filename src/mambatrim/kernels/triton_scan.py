"""The selective scan over S directions in Triton, forward and backward (definition: kernels/reference.py).

Values and gradients are tested in Triton's interpreter on a CPU (tests/test_triton.py). They compile for
compute capability 8.0 and 9.0 (Triton 3.7); none has run on a GPU, their speed is not measured, and block sizes are not
tuned.

A program is one image and a block of channels. Its tiles are (N, E): channels lie along the lanes of a warp and all
states of a channel in one thread, so that the sum over states crosses no thread. It walks the tokens one by one with
the fp32 state in registers; a reversed direction counts down. There is one launch a direction: all but the last leave
their output in an fp32 buffer, the last adds, scales and gates.

The backward pass keeps no state of the forward pass. A first walk stores the state at the start of every chunk of
tokens; then the chunks are taken from the last to the first, the states of one made again, and the gradients carried
against the walk. What sums over blocks of channels (B, C, the mean of dt) or over images (A, D, bias) is written as
partial sums and added in PyTorch, without atomics: results are the same in every run.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import dense_rows

CHUNK = 16  # tokens whose states are made again at once in the backward pass
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), linear above 20; log1p by the quotient that cancels the rounding of 1 + exp(x)."""
    small = tl.exp(tl.where(x > 20.0, 0.0, x))
    one = 1.0 + small
    gap = one - 1.0
    exact = tl.where(gap == 0.0, small, tl.log(one) * (small / tl.where(gap == 0.0, 1.0, gap)))
    return tl.where(x > 20.0, x, exact)


@triton.jit
def vector(x, index, mask):
    """Elements of a vector, zero where it was not given."""
    if x is None:
        return tl.zeros_like(index).to(tl.float32)
    else:
        return tl.load(x + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def columns(x, index, mask, rows, SIZE: tl.constexpr):
    """The transpose (SIZE padded, block) of rows `index` of x (E, SIZE)."""
    where = index[None, :] * SIZE + rows[:, None]
    return tl.load(x + where, mask=mask[None, :] & (rows < SIZE)[:, None], other=0.0).to(tl.float32)


@triton.jit
def raw_step(row, weight, bias, e, live, r, RANK: tl.constexpr):
    """The step size of a token before softplus: projected from a row of R values, or a row of E values."""
    if RANK > 0:
        values = tl.load(row + r, mask=r < RANK, other=0.0).to(tl.float32)
        return tl.sum(weight * values[:, None], axis=0) + bias
    else:
        return tl.load(row + e, mask=live, other=0.0).to(tl.float32) + bias


@triton.jit
def sized_step(raw, repeats, t, SOFTPLUS: tl.constexpr):
    """The step size of a token without and with its number of repeats."""
    step = _softplus(raw) if SOFTPLUS else raw
    if repeats is None:
        return step, step
    else:
        return step, step * tl.load(repeats + t).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def scan_forward_kernel(
    u, u_batch, u_token, dt, dt_batch, dt_token, b, b_batch, b_token, c, c_batch, c_token, z, z_batch, z_token,
    a, d, bias, weight, repeats, total, y, mean, state, length, channels, scale,
    N: tl.constexpr, N_TILE: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e, n, r = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N_TILE), tl.arange(0, RANK_TILE)
    live = e < channels
    decay_rate = columns(a, e, live, n, N) * LOG2E
    skip, offset = vector(d, e, live), vector(bias, e, live)
    taps = columns(weight, e, live, r, RANK) if RANK > 0 else offset
    u, dt, b, c = u + image * u_batch, dt + image * dt_batch, b + image * b_batch, c + image * c_batch
    mean += (image * tl.num_programs(1) + block) * length
    plain = image * length * channels  # where the image starts in a contiguous (B, L, E)
    if repeats is not None:
        repeats += image * length
    h = tl.zeros((N_TILE, BLOCK), tl.float32)
    for j in range(length):
        t = length - 1 - j if REVERSE else j
        raw = raw_step(dt + t * dt_token, taps, offset, e, live, r, RANK)
        step, dose = sized_step(raw, repeats, t, SOFTPLUS)
        tl.store(mean + t, tl.sum(tl.where(live, step, 0.0), axis=0))
        ut = tl.load(u + t * u_token + e, mask=live, other=0.0).to(tl.float32)
        bt = tl.load(b + t * b_token + n, mask=n < N, other=0.0).to(tl.float32)
        ct = tl.load(c + t * c_token + n, mask=n < N, other=0.0).to(tl.float32)
        h = tl.exp2(dose[None, :] * decay_rate) * h + (dose * ut)[None, :] * bt[:, None]
        out = tl.sum(h * ct[:, None], axis=0) + skip * ut
        here = plain + t * channels + e
        if not FIRST:
            out += tl.load(total + here, mask=live, other=0.0)
        if LAST:
            out *= scale
            if z is not None:
                zt = tl.load(z + image * z_batch + t * z_token + e, mask=live, other=0.0).to(tl.float32)
                out *= zt * sigmoid(zt)
            tl.store(y + here, out.to(y.dtype.element_ty), mask=live)
        else:
            tl.store(total + here, out, mask=live)
    where = (image * channels + e[None, :]) * N + n[:, None]
    tl.store(state + where, h, mask=live[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["length", "chunk"])
def scan_backward_kernel(
    u, u_batch, u_token, dt, dt_batch, dt_token, b, b_batch, b_token, c, c_batch, c_token, z, z_batch, z_token,
    grad_y, grad_y_batch, grad_y_token, a, d, bias, weight, repeats, total, starts, before, grad_u, grad_dt, grad_b,
    grad_c, grad_a, grad_d, grad_bias, grad_z, length, channels, scale, chunk,
    N: tl.constexpr, N_TILE: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane, n, r = tl.arange(0, BLOCK), tl.arange(0, N_TILE), tl.arange(0, RANK_TILE)
    e = block * BLOCK + lane
    live, known = e < channels, n < N
    rate = columns(a, e, live, n, N)
    skip, offset = vector(d, e, live), vector(bias, e, live)
    taps = columns(weight, e, live, r, RANK) if RANK > 0 else offset
    u, dt, b, c = u + image * u_batch, dt + image * dt_batch, b + image * b_batch, c + image * c_batch
    grad_y += image * grad_y_batch
    if z is not None:
        z += image * z_batch
    if repeats is not None:
        repeats += image * length
    plain = image * length * channels
    program = image * tl.num_programs(1) + block
    chunks = (length + chunk - 1) // chunk
    tile = n[:, None] * BLOCK + lane[None, :]
    SIZE: tl.constexpr = N_TILE * BLOCK
    starts += program * chunks * SIZE
    before += program * chunk * SIZE
    rows = (block * tl.num_programs(0) + image) * length * N  # partial sums of B and C: (blocks, B, L, N)

    h = tl.zeros((N_TILE, BLOCK), tl.float32)
    for j in range(length):
        if j % chunk == 0:
            tl.store(starts + (j // chunk) * SIZE + tile, h)
        t = length - 1 - j if REVERSE else j
        raw = raw_step(dt + t * dt_token, taps, offset, e, live, r, RANK)
        _, dose = sized_step(raw, repeats, t, SOFTPLUS)
        ut = tl.load(u + t * u_token + e, mask=live, other=0.0).to(tl.float32)
        bt = tl.load(b + t * b_token + n, mask=known, other=0.0).to(tl.float32)
        h = tl.exp2(dose[None, :] * (rate * LOG2E)) * h + (dose * ut)[None, :] * bt[:, None]

    carry, sum_a = tl.zeros((N_TILE, BLOCK), tl.float32), tl.zeros((N_TILE, BLOCK), tl.float32)
    sum_d, sum_bias = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for k in range(chunks):
        first = (chunks - 1 - k) * chunk
        end = tl.minimum(first + chunk, length)
        tl.debug_barrier()  # other threads may have written what this one reads, here and below
        h = tl.load(starts + (chunks - 1 - k) * SIZE + tile)
        for j in range(first, end):
            t = length - 1 - j if REVERSE else j
            tl.store(before + (j - first) * SIZE + tile, h)
            raw = raw_step(dt + t * dt_token, taps, offset, e, live, r, RANK)
            _, dose = sized_step(raw, repeats, t, SOFTPLUS)
            ut = tl.load(u + t * u_token + e, mask=live, other=0.0).to(tl.float32)
            bt = tl.load(b + t * b_token + n, mask=known, other=0.0).to(tl.float32)
            h = tl.exp2(dose[None, :] * (rate * LOG2E)) * h + (dose * ut)[None, :] * bt[:, None]
            if z is not None:  # the gate's gradient needs the un-gated output of all directions
                ct = tl.load(c + t * c_token + n, mask=known, other=0.0).to(tl.float32)
                out = tl.sum(h * ct[:, None], axis=0) + skip * ut
                here = plain + t * channels + e
                if not FIRST:
                    out += tl.load(total + here, mask=live, other=0.0)
                if LAST:
                    zt = tl.load(z + t * z_token + e, mask=live, other=0.0).to(tl.float32)
                    g = tl.load(grad_y + t * grad_y_token + e, mask=live, other=0.0).to(tl.float32) * scale
                    gate = sigmoid(zt)
                    g *= out * (gate * (1.0 + zt * (1.0 - gate)))
                    tl.store(grad_z + here, g.to(grad_z.dtype.element_ty), mask=live)
                else:
                    tl.store(total + here, out, mask=live)
        tl.debug_barrier()
        for i in range(end - first):
            j = end - 1 - i
            t = length - 1 - j if REVERSE else j
            g = tl.load(grad_y + t * grad_y_token + e, mask=live, other=0.0).to(tl.float32) * scale
            if z is not None:
                zt = tl.load(z + t * z_token + e, mask=live, other=0.0).to(tl.float32)
                g *= zt * sigmoid(zt)
            raw = raw_step(dt + t * dt_token, taps, offset, e, live, r, RANK)
            _, dose = sized_step(raw, repeats, t, SOFTPLUS)
            ut = tl.load(u + t * u_token + e, mask=live, other=0.0).to(tl.float32)
            bt = tl.load(b + t * b_token + n, mask=known, other=0.0).to(tl.float32)
            ct = tl.load(c + t * c_token + n, mask=known, other=0.0).to(tl.float32)
            decay = tl.exp2(dose[None, :] * (rate * LOG2E))
            kept = decay * tl.load(before + (j - first) * SIZE + tile)
            dtu = dose * ut
            after = kept + dtu[None, :] * bt[:, None]
            adjoint = carry + g[None, :] * ct[:, None]  # the gradient of the state after this token
            tl.store(grad_c + rows + t * N + n, tl.sum(g[None, :] * after, axis=1), mask=known)
            tl.store(grad_b + rows + t * N + n, tl.sum(adjoint * dtu[None, :], axis=1), mask=known)
            carry = adjoint * decay
            through = adjoint * kept  # of the exponent dt A
            sum_a += through * dose[None, :]
            by_b = tl.sum(adjoint * bt[:, None], axis=0)
            grad_step = tl.sum(through * rate, axis=0) + by_b * ut
            if repeats is not None:
                grad_step *= tl.load(repeats + t).to(tl.float32)
            if SOFTPLUS:
                grad_step *= sigmoid(raw)
            sum_d += g * ut
            sum_bias += grad_step
            here = plain + t * channels + e
            tl.store(grad_u + here, (skip * g + dose * by_b).to(grad_u.dtype.element_ty), mask=live)
            tl.store(grad_dt + here, grad_step.to(grad_dt.dtype.element_ty), mask=live)
    own = image * channels + e
    tl.store(grad_a + own[None, :] * N + n[:, None], sum_a, mask=live[None, :] & known[:, None])
    tl.store(grad_d + own, sum_d, mask=live)
    tl.store(grad_bias + own, sum_bias, mask=live)


def strided(x: Tensor | None) -> tuple[Any, int, int]:
    """A tensor (B, L, ·) with contiguous rows, its batch stride and its token stride, as the kernels take them."""
    if x is None:
        return None, 0, 0
    x = dense_rows(x)
    return x, x.stride(0), x.stride(1)


def tiles_of(states: int, rank: int) -> dict[str, int]:
    """Sizes of the tiles: a function of the shape alone."""
    tile = triton.next_power_of_2(states)
    block = 64 if tile <= 16 else 32
    return {
        "N": states,
        "N_TILE": tile,
        "RANK": rank,
        "RANK_TILE": triton.next_power_of_2(max(rank, 1)),
        "BLOCK": block,
        # one warp for 32 channels, more where the states of a channel would not fit into one thread's registers
        "num_warps": min(8, block // 32 * max(1, tile // 32)),
    }


def flat(items: Sequence[Tensor], s: int) -> Tensor | None:
    return items[s].contiguous() if items else None


def scan_forward(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), dt_mean (B, S, L), state (S, B, E, N): arguments of the operator `selective_scan`."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = rest
    directions, batch, length, channels = u.shape
    states, rank = A[0].shape[1], dt_weight[0].shape[1] if dt_weight else 0
    tiles = tiles_of(states, rank)
    blocks = triton.cdiv(channels, tiles["BLOCK"])
    new = partial(u.new_empty, dtype=torch.float32)
    y, mean = u.new_empty(batch, length, channels), new(directions, batch, blocks, length)
    state = new(directions, batch, channels, states)
    if not y.numel():
        return y, mean.new_zeros(batch, directions, length), state.zero_()
    total = new(y.shape) if directions > 1 else None
    repeats = None if repeats is None else repeats.contiguous()
    with torch.cuda.device_of(u):
        for s in range(directions):
            scan_forward_kernel[(batch, blocks)](
                *(field for x in (u[s], dt[s], B[s], C[s], z) for field in strided(x)),
                *(flat(x, s) for x in (A, D, dt_bias, dt_weight)),
                *(repeats, total, y, mean[s], state[s], length, channels, scale),
                **tiles,
                **{"REVERSE": reverse[s], "SOFTPLUS": softplus, "FIRST": s == 0, "LAST": s + 1 == directions},
            )
    return y, (mean.sum(2) / channels).transpose(0, 1).contiguous(), state


def scan_backward(grad_y: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of u, the raw step size, B, C, A, D, bias and z: arguments and results of the operator
    `selective_scan_backward`."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = rest
    directions, batch, length, channels = u.shape
    states, rank = A[0].shape[1], dt_weight[0].shape[1] if dt_weight else 0
    tiles = tiles_of(states, rank)
    blocks = triton.cdiv(channels, tiles["BLOCK"])
    new = partial(u.new_empty, dtype=torch.float32)
    grad_u, grad_dt = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in "ud")
    sums = [new(directions, batch, length, states), new(directions, batch, length, states)]
    sums += [new(directions, channels, states), new(directions, channels), new(directions, channels)]
    grad_z = u.new_empty((batch, length, channels) if z is not None else (0,))
    if not u.numel():
        return (grad_u, grad_dt, *(x.zero_() for x in sums), grad_z)
    # of one direction: each launch writes them anew
    parts = [new(blocks, batch, length, states), new(blocks, batch, length, states)]
    parts += [new(batch, channels, states), new(batch, channels), new(batch, channels)]
    size = tiles["N_TILE"] * tiles["BLOCK"]
    starts, before = new(batch, blocks, triton.cdiv(length, CHUNK), size), new(batch, blocks, CHUNK, size)
    total = new(batch, length, channels) if z is not None and directions > 1 else None
    repeats = None if repeats is None else repeats.contiguous()
    with torch.cuda.device_of(u):
        for s in range(directions):
            scan_backward_kernel[(batch, blocks)](
                *(field for x in (u[s], dt[s], B[s], C[s], z, grad_y) for field in strided(x)),
                *(flat(x, s) for x in (A, D, dt_bias, dt_weight)),
                *(repeats, total, starts, before, grad_u[s], grad_dt[s], *parts, grad_z),
                *(length, channels, scale, CHUNK),
                **tiles,
                **{"REVERSE": reverse[s], "SOFTPLUS": softplus, "FIRST": s == 0, "LAST": s + 1 == directions},
            )
            for whole, part in zip(sums, parts, strict=True):
                torch.sum(part, dim=0, out=whole[s])
    return (grad_u, grad_dt, *sums, grad_z)
