"""The selective scan as `mamba_ssm.ops.selective_scan_interface` offers it: channel-first, on our kernels.

Signatures are those of mamba_ssm 1.0 to 2.2. What comes in as (B, E, L) is turned once to the token-major form of the
kernels, which is also what autograd keeps; what already is token-major in memory is not copied. Results are contiguous
(B, E, L), as those of the CUDA extension are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import reference
from ..kernels.cpu import dense_rows

# signature and results of kernels.selective_scan and of reference.selective_scan
Scanner = Callable[..., tuple[Tensor, Tensor, Tensor]]


def token_major(x: Tensor) -> Tensor:
    """(B, E, L) -> (B, L, E) with contiguous rows."""
    return dense_rows(x.transpose(1, 2))


def projection(x: Tensor, name: str) -> Tensor:
    """B or C as callers give it, (B, N, L) or (B, G, N, L) -> (B, L, N), or (B, L, G, N) for G > 1.

    Raises:
        NotImplementedError: complex, or constant over the tokens (E, N).
    """
    if x.is_complex():
        raise NotImplementedError(f"the scan of mambatrim takes real numbers, got a complex {name}")
    if x.dim() == 2:
        raise NotImplementedError(
            f"the scan of mambatrim takes a {name} for every token, (B, N, L) or (B, G, N, L), "
            f"got one that is constant over the tokens, {tuple(x.shape)}"
        )
    if x.dim() not in (3, 4):
        raise ValueError(f"{name} must be (B, N, L) or (B, G, N, L), got {tuple(x.shape)}")
    if x.dim() == 4 and x.shape[1] > 1:
        return dense_rows(x.permute(0, 3, 1, 2))
    return token_major(x if x.dim() == 3 else x[:, 0])


class Inputs(NamedTuple):
    """What a scan is given, channel-first, under the names of the public functions; also the gradients of these."""

    u: Tensor  # (B, E, L)
    delta: Tensor  # (B, E, L)
    A: Tensor  # (E, N)
    B: Tensor  # (B, N, L) or (B, G, N, L)
    C: Tensor  # as B
    D: Tensor | None = None  # (E)
    z: Tensor | None = None  # (B, E, L)
    delta_bias: Tensor | None = None  # (E)


def selective_scan(scanner: Scanner, x: Inputs, softplus: bool) -> tuple[Tensor, Tensor]:
    """Channel-first inputs, token-major result (B, L, E), and the last state (B, E, N)."""
    if x.A.is_complex():
        raise NotImplementedError("the scan of mambatrim takes real numbers, got a complex A")
    if x.u.dim() != 3:
        raise ValueError(f"u must be (B, E, L), got {tuple(x.u.shape)}")
    y, _, state = scanner(
        token_major(x.u),
        token_major(x.delta),
        x.A,
        projection(x.B, "B"),
        projection(x.C, "C"),
        x.D,
        None if x.z is None else token_major(x.z),
        x.delta_bias,
        softplus=softplus,
    )
    return y, state


def by_definition(
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
    """`reference.selective_scan`, which knows one group of B and C, for G of them."""
    groups = B.shape[2] if B.dim() == 4 else 1
    if B.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]
    if B.shape != C.shape or u.shape[2] % groups:
        raise ValueError(f"B and C must have one number of groups that divides {u.shape[2]} channels, got {groups}")
    steps = dt if dt_weight is None else torch.nn.functional.linear(dt, dt_weight)  # (B, L, E)

    def part(x: Tensor, g: int, axis: int) -> Tensor:
        return x.chunk(groups, axis)[g]

    pieces = [
        reference.selective_scan(
            *(part(u, g, 2), part(steps, g, 2), part(A, g, 0), B[:, :, g], C[:, :, g]),
            D=None if D is None else part(D, g, 0),
            z=None if z is None else part(z, g, 2),
            dt_bias=None if dt_bias is None else part(dt_bias, g, 0),
            repeats=repeats,
            softplus=softplus,
            reverse=reverse,
        )
        for g in range(groups)
    ]
    y, means, states = zip(*pieces, strict=True)
    return torch.cat(y, dim=2), torch.stack(means).mean(0), torch.cat(states, dim=1)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = C_t h_t + D u_t, times silu(z_t), with h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t.

    Args:
        u, delta, z: (B, E, L). A: (E, N), real. B, C: (B, N, L) or (B, G, N, L). D, delta_bias: (E).
        delta_softplus: whether the step is softplus(delta + delta_bias), or delta + delta_bias as it stands.

    Returns:
        (B, E, L) in the dtype of u; with return_last_state also the state after the last token (B, E, N), fp32, which
        has no gradient (nor has it in mamba_ssm).

    Raises:
        NotImplementedError: complex A, B or C, or B or C that are constant over the tokens.
        ValueError: a shape, a dtype or a device does not fit.
    """
    y, state = selective_scan(kernels.selective_scan, Inputs(u, delta, A, B, C, D, z, delta_bias), delta_softplus)
    out = y.transpose(1, 2).contiguous()
    return (out, state) if return_last_state else out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` token by token in plain PyTorch: slow, and what the kernels are tested with."""
    y, state = selective_scan(by_definition, Inputs(u, delta, A, B, C, D, z, delta_bias), delta_softplus)
    out = y.transpose(1, 2).contiguous()
    return (out, state) if return_last_state else out
