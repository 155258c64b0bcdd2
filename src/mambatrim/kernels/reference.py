"""The selective scan, the causal convolution and the norm in plain PyTorch: the definition that every kernel is
tested with.

Letters, here and in the whole library:

    B batch            L tokens            E channels of the scan (d_inner)    D width of the model (d_model)
    N states (d_state) R rank of the step-size projection (dt_rank)            S scan directions        K taps of a
    filter

Everything is token-major: (B, L, E). A reversed direction reads from the last token to the first and writes in token
order. All arithmetic is fp32 (fp64 for fp64 inputs), whatever the dtype of the inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def step_size(
    dt: Tensor, bias: Tensor | None, weight: Tensor | None, softplus: bool
) -> Tensor:  # (B, L, R or E) -> (B, L, E)
    """The time step: softplus(W dt + bias), the softplus linear above 20 (Mamba, arXiv 2312.00752, algorithm 2)."""
    raw = _wide(dt) if weight is None else F.linear(_wide(dt), _wide(weight))
    raw = raw if bias is None else raw + _wide(bias)
    return F.softplus(raw) if softplus else raw


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    repeats: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction, token by token (same signature and result as `kernels.selective_scan`).

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t,  y_t = C_t h_t + D u_t,  times silu(z_t): zero-order hold for A, Euler
    for B.
    """
    steps = step_size(dt, dt_bias, dt_weight, softplus)  # (B, L, E)
    dt_mean = steps.mean(-1)  # (B, L)
    if repeats is not None:
        steps = steps * _wide(repeats)[..., None]
    inputs, A, B, C = _wide(u), _wide(A), _wide(B), _wide(C)
    length = u.shape[1]
    state = inputs.new_zeros(u.shape[0], u.shape[2], A.shape[1])  # (B, E, N)
    outputs: list[Tensor] = [inputs[:, 0, :]] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(steps[:, t, :, None] * A)  # (B, E, N)
        state = decay * state + (steps[:, t] * inputs[:, t])[..., None] * B[:, t, None, :]
        outputs[t] = (state * C[:, t, None, :]).sum(-1)  # (B, E)
    y = torch.stack(outputs, dim=1) if length else torch.zeros_like(inputs)  # (B, L, E)
    if D is not None:
        y = y + _wide(D) * inputs
    if z is not None:
        y = y * F.silu(_wide(z))
    return y.to(u.dtype), dt_mean, state


def selective_scan_chunked(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, repeats: Tensor | None, reverse: bool, budget: int = 1 << 19
) -> tuple[Tensor, Tensor]:
    """The recurrence alone, with few large operations: what runs where no kernel was built.

    Decays and inputs of a chunk of tokens are made at once, then one fused multiply-add a token advances the state. A
    chunk holds about `budget` state elements, so that it stays in the cache.

    Args: u (B, L, E), dt (B, L, E) the time step itself, A (E, N), B and C (B, L, N), repeats (B, L).
    Returns: y (B, L, E) without D and gate, and the last state (B, E, N), in the dtype of u.
    """
    batch, length, channels = u.shape
    if repeats is not None:
        dt = dt * repeats[..., None]
    chunk = max(1, budget // max(1, batch * channels * A.shape[1]))
    state = u.new_zeros(batch, channels, A.shape[1])  # (B, E, N)
    pieces: list[Tensor] = []
    starts = range(0, length, chunk)
    for start in reversed(starts) if reverse else starts:
        now = slice(start, min(start + chunk, length))
        decay = torch.exp(dt[:, now, :, None] * A)  # (B, T, E, N)
        inputs = (dt[:, now] * u[:, now])[..., None] * B[:, now, None, :]  # (B, T, E, N)
        states: list[Tensor] = [state] * decay.shape[1]
        for t in reversed(range(decay.shape[1])) if reverse else range(decay.shape[1]):
            state = torch.addcmul(inputs[:, t], decay[:, t], state)
            states[t] = state
        pieces.append(torch.matmul(torch.stack(states, dim=1), C[:, now, :, None]).squeeze(-1))  # (B, T, E)
    if reverse:
        pieces.reverse()
    return torch.cat(pieces, dim=1) if pieces else torch.zeros_like(u), state


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool = False, silu: bool = True) -> Tensor:
    """Depthwise causal convolution of x (B, L, E) with weight (E, K); reversed, a token sees itself and those behind
    it."""
    if 0 in x.shape[1:]:
        return x.clone()  # PyTorch convolves nothing with nothing only along the batch
    taps = _wide(weight)[:, None, :]  # (E, 1, K)
    rows = _wide(x).transpose(1, 2)  # (B, E, L)
    pad = weight.shape[1] - 1
    rows = F.pad(rows, (0, pad) if reverse else (pad, 0))
    taps = taps.flip(-1) if reverse else taps
    y = F.conv1d(rows, taps, None if bias is None else _wide(bias), groups=x.shape[2]).transpose(1, 2)
    return (F.silu(y) if silu else y).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * _wide(weight)
