"""The scan extensions that forks call directly: `selective_scan_cuda` of mamba_ssm, and VMamba's
`selective_scan_cuda_core` and `selective_scan_cuda_oflex`.

Each has `fwd` and `bwd`, called from inside an autograd function of the caller. `bwd` has nothing but its arguments to
go by, so it runs the forward pass once more.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.library import wide
from .scan import selective_scan

Gradients = list[Tensor | None]


@torch.no_grad()
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The scan without a gate, not yet rounded to the dtype of u, (B, E, L); and its intermediates (B, E, 1, 2N).

    Callers read the last state in the odd columns of the last chunk; the even ones, products of decays, are zero here,
    because only the CUDA kernel reads them.
    """
    arguments = (delta, A, B, C, D, None, delta_bias, delta_softplus)
    y, state = selective_scan(kernels.selective_scan, u.to(wide(u)), *arguments)
    states = torch.stack([torch.zeros_like(state), state], dim=-1).flatten(2)  # (B, E, 2N)
    return y.transpose(1, 2).contiguous(), states[:, :, None]


def _backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    delta_softplus: bool,
) -> Gradients:
    """Gradients of u, delta, A, B, C, D, delta_bias, z, each in the shape and dtype of its argument; None where there
    is none."""
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias, "z": z}
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    with torch.enable_grad():
        at = SimpleNamespace(**{**dict.fromkeys(given), **leaves})
        # in the precision of the sums: dout may be fp32 where u is not
        arguments = (at.delta, at.A, at.B, at.C, at.D, at.z, at.delta_bias, delta_softplus)
        y, _ = selective_scan(kernels.selective_scan, at.u.to(wide(u)), *arguments)
        found = torch.autograd.grad(y, list(leaves.values()), dout.transpose(1, 2).to(y.dtype))
    grads = dict(zip(leaves, found, strict=True))
    return [grads.get(name) for name in given]


# --------------------------------------------------------------------------------------------- selective_scan_cuda


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """[out, intermediates] or, with a gate, [out, intermediates, out times silu(z)]; out is (B, E, L)."""
    y, states = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    gated = [] if z is None else [(y * F.silu(z.to(y.dtype))).to(u.dtype)]
    return [y.to(u.dtype), states, *gated]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
) -> Gradients:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias], with a gate also dz and, if wanted, out times silu(z).

    `x` and `out` are what `fwd` returned. A dz that is given is written, as callers hand in a part of a larger tensor.
    """
    *grads, grad_z = _backward(u, delta, A, B, C, D, z, delta_bias, dout, delta_softplus)
    if z is None:
        return grads
    if dz is not None and grad_z is not None:
        grad_z = dz.copy_(grad_z)
    if not recompute_out_z:
        return [*grads, grad_z]
    if out is None:
        raise ValueError("recompute_out_z needs the out that fwd returned, got None")
    exact = wide(out)
    return [*grads, grad_z, (out.to(exact) * F.silu(z.to(exact))).to(out.dtype)]


# ------------------------------------------------------- selective_scan_cuda_core, selective_scan_cuda_oflex (VMamba)


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> list[Tensor]:
    """[out (B, E, L) in the dtype of u, intermediates]; nrows is a setting of the CUDA kernel and has no effect."""
    y, states = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [y.to(u.dtype), states]


def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """`core_fwd` with an out that stays fp32 where out_float says so."""
    y, states = _forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return [y if out_float else y.to(u.dtype), states]


def core_bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int = 1,
) -> Gradients:
    """[du, ddelta, dA, dB, dC, dD, ddelta_bias]; dout (B, E, L) may be of another dtype than u."""
    return _backward(u, delta, A, B, C, D, None, delta_bias, dout, delta_softplus)[:-1]
