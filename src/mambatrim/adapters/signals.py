"""Signals of somebody else's mixer, recomputed from its input by its own weights: what a method asks for and no more.

Letters as in kernels/reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..kernels.library import wide

# attributes by which a Mamba-1 mixer is known: mamba_ssm and its forks, transformers, mambapy
MAMBA1 = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D")
MAMBAVISION_MIXER = ("in_proj", "conv1d_x", "conv1d_z", "x_proj", "dt_proj", "A_log", "D")
Projections = tuple[Tensor, Tensor, Tensor]  # dt (B, L, R), B (B, L, N), C (B, L, N)


def as_they_are(mixer: Any, projections: Projections) -> Projections:
    """No norms between the projections and the scan."""
    return projections


def mamba1_signals(
    mixer: Any,
    x: Tensor,
    wanted: Collection[str],
    norms: Callable[[Any, Projections], Projections] = as_they_are,
) -> dict[str, Tensor]:
    """dt, dt_mean, B, C, y and y_gated of a Mamba-1 mixer in one direction or, as in Vim's fork, in two.

    Two directions are known by `A_b_log`; where there is no `conv1d_b`, they share all but A ("bimamba v1").

    Args:
        x: (B, L, D), the input of the mixer.
        norms: what the mixer does with (dt, B, C) before the scan.
    """
    hidden, z = mixer.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
    endings = ("", "_b") if hasattr(mixer, "conv1d_b") else ("",)
    convolutions = [getattr(mixer, f"conv1d{end}") for end in endings]
    biases = [conv.bias for conv in convolutions if conv.bias is not None]
    weights = [conv.weight.squeeze(1) for conv in convolutions]
    u = kernels.causal_conv1d(hidden, weights, biases, (False, True)[: len(endings)])  # (S, B, L, E)
    directions = []
    for s, end in enumerate(endings):
        x_proj, dt_proj = getattr(mixer, f"x_proj{end}"), getattr(mixer, f"dt_proj{end}")
        A_log, D = (mixer.A_b_log, mixer.D_b) if end else (mixer.A_log, mixer.D)
        dt, B, C = norms(mixer, _split(x_proj(u[s]), dt_proj, A_log))
        directions.append(kernels.Direction(dt, _decay(A_log), B, C, D, dt_proj.bias, dt_proj.weight, end == "_b"))
    if len(endings) == 1 and hasattr(mixer, "A_b_log"):
        u = u.expand(2, -1, -1, -1)
        directions.append(directions[0]._replace(A=_decay(mixer.A_b_log), reverse=True))
    return _collect(wanted, u, directions, z)


def mambapy_signals(mixer: Any, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """The same of mambapy's block, which can have norms of dt, B and C (`inner_layernorms`)."""
    return mamba1_signals(mixer, x, wanted, _inner_norms)


def _inner_norms(mixer: Any, projections: Projections) -> Projections:
    norms = (mixer.dt_layernorm, mixer.B_layernorm, mixer.C_layernorm)
    dt, B, C = (part if norm is None else norm(part) for part, norm in zip(projections, norms, strict=True))
    return dt, B, C


def mambavision_signals(mixer: Any, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """The same of MambaVision's mixer: one direction, a centred convolution of half the channels, no gate.

    As released, the bias of the step size counts twice: in `dt_proj` and again in the scan. There is no gate, so
    y_gated is y.
    """
    hidden = mixer.in_proj(x).transpose(1, 2).chunk(2, dim=1)[0]  # (B, E, L)
    conv = mixer.conv1d_x
    u = F.silu(F.conv1d(hidden, conv.weight, conv.bias, padding="same", groups=conv.groups)).transpose(1, 2)
    dt, B, C = _split(mixer.x_proj(u), mixer.dt_proj, mixer.A_log)
    bias = mixer.dt_proj.bias
    one = kernels.Direction(dt, _decay(mixer.A_log), B, C, mixer.D, bias + bias, mixer.dt_proj.weight)
    return _collect(wanted, u[None], [one], None)


def _split(projected: Tensor, dt_proj: nn.Linear, A_log: Tensor) -> Projections:
    """(B, L, R + 2 N) -> dt, B, C."""
    states = A_log.shape[-1]
    dt, B, C = projected.split([dt_proj.weight.shape[1], states, states], dim=-1)
    return dt, B, C


def _decay(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.to(wide(A_log)))


def _collect(
    wanted: Collection[str], u: Tensor, directions: Sequence[kernels.Direction], z: Tensor | None
) -> dict[str, Tensor]:
    """u (S, B, L, E), S directions, the gate z (B, L, E) -> what is wanted, in token order."""
    found: dict[str, Tensor] = {}
    if "dt" in wanted or "dt_mean" in wanted:
        steps = [reference.step_size(d.dt, d.dt_bias, d.dt_weight, softplus=True) for d in directions]
        found["dt"] = torch.stack(steps, dim=1)  # (B, S, L, E)
        found["dt_mean"] = found["dt"].mean(dim=-1)
    if "B" in wanted or "C" in wanted:
        found["B"] = torch.stack([d.B for d in directions], dim=1)  # (B, S, L, N)
        found["C"] = torch.stack([d.C for d in directions], dim=1)
    if "y" in wanted or "y_gated" in wanted:
        found["y"] = torch.stack([kernels.scan(u[s : s + 1], [d]).y for s, d in enumerate(directions)], dim=1)
        found["y_gated"] = found["y"] if z is None else found["y"] * F.silu(z)[:, None]  # (B, S, L, E)
    return {name: found[name] for name in wanted if name in found}
