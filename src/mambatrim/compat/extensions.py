"""The scan extensions that forks call directly: `selective_scan_cuda` of mamba_ssm, and VMamba's
`selective_scan_cuda_core`, `selective_scan_cuda_oflex` and `selective_scan_cuda_ndstate`.

Each has `fwd` and `bwd`, called from inside an autograd function of the caller. `bwd` has nothing but its arguments to
go by, so it runs the forward pass once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels.library import wide
from .scan import Inputs, selective_scan

Gradients = list[Tensor | None]


def _scan(x: Inputs, softplus: bool) -> tuple[Tensor, Tensor]:
    """y (B, L, E), not yet rounded to the dtype of u, and the last state; in VMamba a row of delta and its bias may
    stand for several channels."""
    channels, steps = x.u.shape[1], x.delta.shape[1]
    if steps < channels and channels % steps == 0:
        bias = None if x.delta_bias is None else x.delta_bias.repeat_interleave(channels // steps)
        x = x._replace(delta=x.delta.repeat_interleave(channels // steps, dim=1), delta_bias=bias)
    return selective_scan(kernels.selective_scan, x._replace(u=x.u.to(wide(x.u))), softplus)


@torch.no_grad()
def _forward(x: Inputs, softplus: bool) -> tuple[Tensor, Tensor]:
    """The scan without its gate, not yet rounded to the dtype of u, (B, E, L); and its intermediates (B, E, 1, 2N).

    Callers read the last state in the odd columns of the last chunk; the even ones, products of decays, are zero here,
    because only the CUDA kernel reads them.
    """
    y, state = _scan(x._replace(z=None), softplus)
    states = torch.stack([torch.zeros_like(state), state], dim=-1).flatten(2)  # (B, E, 2N)
    return y.transpose(1, 2).contiguous(), states[:, :, None]


def _backward(x: Inputs, dout: Tensor, softplus: bool) -> tuple[Gradients, Tensor | None]:
    """Gradients of u, delta, A, B, C, D, delta_bias, and of z; each in the shape and dtype of its argument, None where
    there is none."""
    leaves = Inputs._make(None if t is None else t.detach().requires_grad_() for t in x)
    with torch.enable_grad():
        y, _ = _scan(leaves, softplus)
        # in the precision of the sums: dout may be fp32 where u is not
        given = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, given, dout.transpose(1, 2).to(y.dtype)))
    grads = Inputs._make(None if t is None else next(found) for t in leaves)
    return [*grads[:6], grads.delta_bias], grads.z


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
    y, states = _forward(Inputs(u, delta, A, B, C, D, z, delta_bias), delta_softplus)
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
    grads, grad_z = _backward(Inputs(u, delta, A, B, C, D, z, delta_bias), dout, delta_softplus)
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


# ------------------------------------ selective_scan_cuda_core, selective_scan_cuda_oflex, selective_scan_cuda_ndstate


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
    return oflex_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, out_float=False)


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
    """`core_fwd` with an out that stays fp32 where out_float says so; delta may be (B, E / k, L), each row for k
    channels, with delta_bias (E / k)."""
    y, states = _forward(Inputs(u, delta, A, B, C, D, None, delta_bias), delta_softplus)
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
    return _backward(Inputs(u, delta, A, B, C, D, None, delta_bias), dout, delta_softplus)[0]


def ndstate_fwd(
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
    """`core_fwd` of one state, which has no axis: A (E), B and C (B, G, L)."""
    return core_fwd(u, delta, A[:, None], B[:, :, None], C[:, :, None], D, delta_bias, delta_softplus, nrows)


def ndstate_bwd(
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
    """`core_bwd` of one state: dA (E), dB and dC (B, G, L)."""
    one = Inputs(u, delta, A[:, None], B[:, :, None], C[:, :, None], D, None, delta_bias)
    du, ddelta, dA, dB, dC, *rest = _backward(one, dout, delta_softplus)[0]
    without = [None if t is None else t.squeeze(axis) for t, axis in ((dA, 1), (dB, 2), (dC, 2))]
    return [du, ddelta, *without, *rest]
