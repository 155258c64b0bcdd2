"""The convolution and the scan over a virtual sequence in Triton, forward (definition: kernels/virtual.py, which also
gives the gradients, on a GPU too).

Values are tested in Triton's interpreter on a CPU (tests/test_triton.py), and the kernels are compiled for compute
capability 8.0 and 9.0 (tests/test_triton_compiles.py). They have never run on a GPU: speed is not measured, and block
sizes are not tuned.

All arithmetic is fp32, and there are no atomics: results are the same in every run.

The convolution gathers: a program is a tile of rows and of channels in one direction. Rows go through their positions
side by side, and each position reads its window through the source map. The lists of positions come from one sort.

The scan is that of kernels/triton_scan.py, walking positions instead of rows. Decay and input are made at the first
position of a run of equal sources; what the run gave is added to its row when it ends. A last walk over the rows
scales and gates.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import dense_rows
from .triton_rows import CHANNELS, mask_of
from .triton_scan import LOG2E, columns, flat, raw_step, sigmoid, sized_step, strided, tiles_of, vector

ROWS = 16  # of one tile of the convolution


@triton.jit(do_not_specialize=["rows", "positions", "reverse"])
def virtual_conv_kernel(
    x, x_batch, x_token, weight, bias, source, order, starts, share, y, batch, rows, positions, channels, reverse,
    K: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS)
    image, s = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(2)
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known, live = row < rows, e < channels
    toward = 1 - 2 * ((reverse >> s) & 1)  # the step from a position to the next of the walk
    x += image * x_batch
    weight += s * channels * K
    offset = tl.zeros((CHANNELS,), tl.float32)
    if bias is not None:
        offset += tl.load(bias + s * channels + e, mask=live, other=0.0).to(tl.float32)
    source, order, starts = source + image * positions, order + image * positions, starts + image * (rows + 1)
    first = tl.load(starts + row, mask=known, other=0)
    count = tl.load(starts + row + 1, mask=known, other=0) - first
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for i in range(tl.max(count, axis=0)):
        there = i < count
        t = tl.load(order + first + i, mask=there, other=0)
        out = tl.zeros((ROWS, CHANNELS), tl.float32) + offset[None, :]
        for k in tl.static_range(K):
            at = t - toward * (K - 1 - k)
            seen = tl.load(source + at, mask=there & (at >= 0) & (at < positions), other=rows)
            mask = (seen < rows)[:, None] & live[None, :]
            value = tl.load(x + seen[:, None] * x_token + e[None, :], mask=mask, other=0.0).to(tl.float32)
            out += value * tl.load(weight + e * K + k, mask=live, other=0.0).to(tl.float32)[None, :]
        if SILU:
            out *= sigmoid(out)
        total += tl.where(there[:, None], out, 0.0)
    total *= tl.load(share + image * rows + row, mask=known, other=0.0).to(tl.float32)[:, None]
    y += (s * batch + image) * rows * channels
    tl.store(
        y + row[:, None] * channels + e[None, :], total.to(y.dtype.element_ty), mask=known[:, None] & live[None, :]
    )


@triton.jit
def _add(total, value, mask):
    tl.debug_barrier()  # other threads may have written what this one reads
    tl.store(total, tl.load(total, mask=mask, other=0.0) + value, mask=mask)


@triton.jit(do_not_specialize=["rows", "positions"])
def virtual_scan_kernel(
    u, u_batch, u_token, dt, dt_batch, dt_token, b, b_batch, b_token, c, c_batch, c_token, z, z_batch, z_token,
    a, d, bias, weight, repeats, source, share, total, y, mean, state, rows, positions, channels, scale,
    N: tl.constexpr, N_TILE: tl.constexpr, RANK: tl.constexpr, RANK_TILE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e, n, r = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, N_TILE), tl.arange(0, RANK_TILE)
    live = e < channels
    decay_rate = columns(a, e, live, n, N) * LOG2E
    skip, offset = vector(d, e, live), vector(bias, e, live)
    taps = columns(weight, e, live, r, RANK) if RANK > 0 else offset
    u, dt, b, c = u + image * u_batch, dt + image * dt_batch, b + image * b_batch, c + image * c_batch
    mean += (image * tl.num_programs(1) + block) * rows
    source, share = source + image * positions, share + image * rows
    total, y = total + image * rows * channels, y + image * rows * channels  # contiguous (B, K, E)
    if repeats is not None:
        repeats += image * rows
    h = tl.zeros((N_TILE, BLOCK), tl.float32)
    decay, fed = h, h  # of a step of the row that the run stands on, as the next two
    ct, ahead = tl.zeros((N_TILE,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    run = tl.zeros((BLOCK,), tl.float32)
    row = rows
    for j in range(positions):
        now = tl.load(source + (positions - 1 - j if REVERSE else j)).to(tl.int32)
        if now < rows:
            if now != row:
                if row < rows:
                    _add(total + row * channels + e, run * tl.load(share + row).to(tl.float32), live)
                row = now
                run = tl.zeros((BLOCK,), tl.float32)
                raw = raw_step(dt + row * dt_token, taps, offset, e, live, r, RANK)
                step, dose = sized_step(raw, repeats, row, SOFTPLUS)
                tl.store(mean + row, tl.sum(tl.where(live, step, 0.0), axis=0))
                ut = tl.load(u + row * u_token + e, mask=live, other=0.0).to(tl.float32)
                bt = tl.load(b + row * b_token + n, mask=n < N, other=0.0).to(tl.float32)
                ct = tl.load(c + row * c_token + n, mask=n < N, other=0.0).to(tl.float32)
                decay = tl.exp2(dose[None, :] * decay_rate)
                fed = (dose * ut)[None, :] * bt[:, None]
                ahead = skip * ut
            h = decay * h + fed
            run += tl.sum(h * ct[:, None], axis=0) + ahead
    if row < rows:
        _add(total + row * channels + e, run * tl.load(share + row).to(tl.float32), live)
    where = (image * channels + e[None, :]) * N + n[:, None]
    tl.store(state + where, h, mask=live[None, :] & (n < N)[:, None])
    if LAST:
        tl.debug_barrier()
        for t in range(rows):
            out = tl.load(total + t * channels + e, mask=live, other=0.0) * scale
            if z is not None:
                zt = tl.load(z + image * z_batch + t * z_token + e, mask=live, other=0.0).to(tl.float32)
                out *= zt * sigmoid(zt)
            tl.store(y + t * channels + e, out.to(y.dtype.element_ty), mask=live)


def conv_forward(
    x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool, source: Tensor, share: Tensor
) -> Tensor:
    """x (B, K, E) -> (S, B, K, E): arguments of the operator `virtual_conv1d`."""
    x, taps, offsets = dense_rows(x), torch.stack(weight), torch.stack(bias) if bias else None
    batch, rows, channels = x.shape
    y = x.new_empty(len(weight), *x.shape)
    if not y.numel():
        return y
    gone = torch.argsort((source == rows).to(torch.int8), dim=1, stable=True)
    source = source.gather(1, gone)  # positions that are gone stand at the end
    sorted_rows, order = source.sort(dim=1, stable=True)
    places = torch.arange(rows + 1, device=x.device).repeat(batch, 1)
    starts = torch.searchsorted(sorted_rows, places)  # (B, K + 1): of each row's positions in `order`
    grid = (batch * triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS), len(weight))
    with torch.cuda.device_of(x):
        virtual_conv_kernel[grid](
            *(x, x.stride(0), x.stride(1), taps, offsets, source, order, starts, share.contiguous(), y),
            *(batch, rows, source.shape[1], channels, mask_of(reverse)),
            **{"K": taps.shape[2], "SILU": silu, "ROWS": ROWS, "CHANNELS": CHANNELS},
        )
    return y


def scan_forward(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, K, E), dt_mean (B, S, K), state (S, B, E, N): arguments of the operator `virtual_scan`."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale, source, share = rest
    directions, batch, rows, channels = u.shape
    sizes = tiles_of(A[0].shape[1], dt_weight[0].shape[1] if dt_weight else 0)
    blocks = triton.cdiv(channels, sizes["BLOCK"])
    new = partial(u.new_zeros, dtype=torch.float32)
    y, total = u.new_empty(batch, rows, channels), new(batch, rows, channels)
    mean = new(directions, batch, blocks, rows)
    state = new(directions, batch, channels, sizes["N"])
    if not y.numel():
        return y, mean.sum(2).transpose(0, 1), state
    repeats = None if repeats is None else repeats.contiguous()
    source, share = source.contiguous(), share.contiguous()
    with torch.cuda.device_of(u):
        for s in range(directions):
            virtual_scan_kernel[(batch, blocks)](
                *(field for x in (u[s], dt[s], B[s], C[s], z) for field in strided(x)),
                *(flat(x, s) for x in (A, D, dt_bias, dt_weight)),
                *(repeats, source, share, total, y, mean[s], state[s]),
                *(rows, source.shape[1], channels, scale),
                **sizes,
                **{"REVERSE": reverse[s], "SOFTPLUS": softplus, "LAST": s + 1 == directions},
            )
    return y, (mean.sum(2) / channels).transpose(0, 1).contiguous(), state
