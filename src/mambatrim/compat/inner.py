"""The whole inside of a Mamba mixer in one call, as `mamba_ssm.ops.selective_scan_interface` and its forks offer it.

Signatures are those of mamba_ssm 1.0 to 2.2 and of the forks of Vim and VideoMamba. `xz` is channel-first, (B, 2E, L),
x first; a tensor that is token-major in memory (a transposed view of what a linear layer returns) is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..kernels import reference
from .scan import Scanner, by_definition, projection, token_major


class Form(NamedTuple):
    """Which convolution (B, L, E), (E, K), (E) -> (B, L, E) and which scan run."""

    conv: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    scanner: Scanner


class Projections(NamedTuple):
    """What makes step size, B and C out of the convolved x, under the names of the public functions."""

    x_proj_weight: Tensor  # (R + 2N, E), less N for each of B and C that is given
    delta_proj_weight: Tensor  # (E, R)
    B: Tensor | None
    C: Tensor | None
    B_proj_bias: Tensor | None  # (N)
    C_proj_bias: Tensor | None  # (N)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return kernels.causal_conv1d(x, [weight], [] if bias is None else [bias])[0]


KERNELS = Form(_convolved, kernels.selective_scan)
DEFINITION = Form(reference.causal_conv1d, by_definition)


def _mixed(
    form: Form,
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    projections: Projections,
    decays: Sequence[Tensor],
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """xz (B, 2E, L) -> (B, L, E): convolution, scan with every A of `decays` (a second one from the last token to the
    first), gate."""
    if xz.dim() != 3 or xz.shape[1] != 2 * conv1d_weight.shape[0]:
        raise ValueError(f"xz must be (B, {2 * conv1d_weight.shape[0]}, L), got {tuple(xz.shape)}")
    x, z = (token_major(half) for half in xz.chunk(2, dim=1))  # (B, L, E) each
    u = form.conv(x, conv1d_weight.flatten(1), conv1d_bias)
    rank, states = projections.delta_proj_weight.shape[1], decays[0].shape[1]
    mixed = F.linear(u, projections.x_proj_weight)  # (B, L, R + 2N)
    B, C = mixed[..., rank : rank + states], mixed[..., -states:]
    if projections.B is not None:
        B = projection(projections.B, "B")
    elif projections.B_proj_bias is not None:
        B = B + projections.B_proj_bias
    if projections.C is not None:
        C = projection(projections.C, "C")
    elif projections.C_proj_bias is not None:
        C = C + projections.C_proj_bias
    parts = [
        form.scanner(
            *(u, mixed[..., :rank], A, B, C, D, z, delta_bias, projections.delta_proj_weight),
            softplus=delta_softplus,
            reverse=reverse,
        )[0]
        for A, reverse in zip(decays, (False, True), strict=False)
    ]
    return sum(parts[1:], parts[0])


def _refuse_norms(**weights: Tensor | None) -> None:
    for name, weight in weights.items():
        if weight is not None:
            raise NotImplementedError(f"mamba_inner_fn of mambatrim does not normalise dt, B and C: leave out {name}")


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Convolution, projections, scan, gate and output projection of one direction.

    Args:
        xz: (B, 2E, L). conv1d_weight: (E, 1, K). x_proj_weight: (R + 2N, E), rows in the order dt, B, C.
        delta_proj_weight: (E, R). out_proj_weight: (D, E). A: (E, N). D, delta_bias: (E).
        B, C: (B, N, L) or (B, G, N, L), instead of those that x_proj makes.
        checkpoint_lvl: has no effect; the scan keeps its inputs only, and makes everything else again.

    Returns:
        (B, L, D).

    Raises:
        NotImplementedError: a norm of dt, B or C (`b_rms_weight`, ...) is asked for.
    """
    _refuse_norms(b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight)
    projections = Projections(x_proj_weight, delta_proj_weight, B, C, B_proj_bias, C_proj_bias)
    y = _mixed(KERNELS, xz, conv1d_weight, conv1d_bias, projections, [A], D, delta_bias, delta_softplus)
    return F.linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` without its output projection: (B, E, L)."""
    projections = Projections(x_proj_weight, delta_proj_weight, B, C, B_proj_bias, C_proj_bias)
    y = _mixed(KERNELS, xz, conv1d_weight, conv1d_bias, projections, [A], D, delta_bias, delta_softplus)
    return y.transpose(1, 2).contiguous()


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Two directions that share all but A ("bimamba v1" of Vim): the backward one scans the same convolved tokens from
    the last to the first with A_b, and the two are added. (B, L, D)."""
    projections = Projections(x_proj_weight, delta_proj_weight, B, C, B_proj_bias, C_proj_bias)
    y = _mixed(KERNELS, xz, conv1d_weight, conv1d_bias, projections, [A, A_b], D, delta_bias, delta_softplus)
    return F.linear(y, out_proj_weight, out_proj_bias)


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` token by token in plain PyTorch."""
    projections = Projections(x_proj_weight, delta_proj_weight, B, C, B_proj_bias, C_proj_bias)
    y = _mixed(DEFINITION, xz, conv1d_weight, conv1d_bias, projections, [A], D, delta_bias, delta_softplus)
    return F.linear(y, out_proj_weight, out_proj_bias)


def bimamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`bimamba_inner_fn` token by token in plain PyTorch."""
    projections = Projections(x_proj_weight, delta_proj_weight, B, C, B_proj_bias, C_proj_bias)
    y = _mixed(DEFINITION, xz, conv1d_weight, conv1d_bias, projections, [A, A_b], D, delta_bias, delta_softplus)
    return F.linear(y, out_proj_weight, out_proj_bias)
