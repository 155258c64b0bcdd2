"""`causal_conv1d` and its extension `causal_conv1d_cuda`: the depthwise causal convolution, channel-first.

The package changed its arguments twice: 1.0 has no `seq_idx`, 1.1 has it, 1.2 to 1.4 have initial and final states too.
Forks of all ages are in use, some of which call two generations in one file, so every generation is taken. From 1.5 on
the extension is called through `causal_conv1d.cpp_functions`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .scan import token_major

ACTIVATIONS: dict[str | None, bool] = {None: False, "silu": True, "swish": True}


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """x (B, E, L), weight (E, K) -> (B, E, L), laid out in memory as x is."""
    if x.dim() != 3:
        raise ValueError(f"x must be (B, E, L), got {tuple(x.shape)}")
    biases = [] if bias is None else [bias]
    y = kernels.causal_conv1d(token_major(x), [weight], biases, silu=silu)[0].transpose(1, 2)
    return y if x.stride(1) == 1 and x.stride(2) != 1 else y.contiguous()


def _silu(activation: str | None) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    return ACTIVATIONS[activation]


def _refuse(function: str, **given: Tensor | bool | None) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{function} of mambatrim does not take {name}; it must be None")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | str | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Each token and the K - 1 before it, weighted per channel, then SiLU: (B, E, L) -> (B, E, L).

    Args:
        x: (B, E, L). weight: (E, K), K at most 8. bias: (E).
        activation: None, "silu" or "swish"; by position it may also stand where causal_conv1d 1.0 and 1.1 have it, in
            the place of seq_idx or of initial_states.

    Raises:
        NotImplementedError: seq_idx, initial or final states are given.
        ValueError: another activation, or a shape that does not fit.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    _refuse(
        "causal_conv1d_fn",
        seq_idx=seq_idx,
        initial_states=initial_states,
        return_final_states=return_final_states,
        final_states_out=final_states_out,
    )
    return _convolve(x, weight, bias, _silu(activation))


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next tokens of a sequence whose last ones are in conv_state, which moves on in place; without gradients.

    Args:
        x: (B, E) or (B, E, L). conv_state: (B, E, S), S at least K - 1. weight: (E, K). bias: (E).

    Returns:
        As x.

    Raises:
        NotImplementedError: cache_seqlens (a circular buffer) or conv_state_indices are given.
        ValueError: another activation, or a shape that does not fit.
    """
    _refuse("causal_conv1d_update", cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    silu, tokens = _silu(activation), x[:, :, None] if x.dim() == 2 else x  # (B, E, L)
    if tokens.dim() != 3 or conv_state.shape[:2] != x.shape[:2] or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"x must be (B, E) or (B, E, L) and conv_state (B, E, {weight.shape[1] - 1} or more), "
            f"got {tuple(x.shape)} and {tuple(conv_state.shape)}"
        )
    window = torch.cat([conv_state.to(x.dtype), tokens], dim=2)
    conv_state.copy_(window[:, :, tokens.shape[2] :])
    y = _convolve(window, weight, bias, silu)[:, :, conv_state.shape[2] :]
    return y.reshape(x.shape)


# --------------------------------------------------------------------------------------------- causal_conv1d_cuda


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """The forward pass: (x, weight, bias, silu), (x, weight, bias, seq_idx, silu) or (x, weight, bias, seq_idx,
    initial_states, final_states_out, silu) -> (B, E, L)."""
    names = {
        1: (),
        2: ("seq_idx",),
        4: ("seq_idx", "initial_states", "final_states_out"),
    }
    if len(rest) not in names:
        raise NotImplementedError(f"causal_conv1d_fwd of mambatrim takes 4, 5 or 7 arguments, got {3 + len(rest)}")
    *states, silu = rest
    _refuse("causal_conv1d_fwd", **dict(zip(names[len(rest)], states, strict=True)))
    with torch.no_grad():
        return _convolve(x, weight, bias, bool(silu))


def causal_conv1d_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, dout: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """The backward pass: gradients of x, weight and bias; in the last generation also None for the initial states.

    The arguments after dout (B, E, L) are (dx, silu), (seq_idx, dx, silu) or (seq_idx, initial_states, dfinal_states,
    dx, return_dinitial_states, silu); a dx that is given is written, as callers hand in a part of a larger tensor.
    """
    names = {
        2: ("dx",),
        3: ("seq_idx", "dx"),
        6: ("seq_idx", "initial_states", "dfinal_states", "dx", "return_dinitial_states"),
    }
    if len(rest) not in names:
        raise NotImplementedError(f"causal_conv1d_bwd of mambatrim takes 6, 7 or 10 arguments, got {4 + len(rest)}")
    *others, silu = rest
    given = dict(zip(names[len(rest)], others, strict=True))
    dx = given.pop("dx")
    _refuse("causal_conv1d_bwd", **given)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    with torch.enable_grad():
        y = _convolve(leaves[0], leaves[1], leaves[2] if bias is not None else None, bool(silu))
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(y, leaves, dout)
    if dx is not None:
        grads = (dx.copy_(grads[0]), *grads[1:])
    grads = grads if bias is not None else (*grads, None)
    return (*grads, None) if len(rest) == 6 else grads


def causal_conv1d_cuda_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` as the extension has it: 5 arguments up to 1.3, 6 in 1.4, 7 at its end."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


# ------------------------------------------------------------------------------------ causal_conv1d.cpp_functions


def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """`causal_conv1d_fwd` with 7 arguments, under the name that causal_conv1d 1.5 gives it."""
    return causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation)


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, ...]:
    """`causal_conv1d_bwd` with 10 arguments, under the name that causal_conv1d 1.5 gives it."""
    rest = (seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation)
    return causal_conv1d_bwd(x, weight, bias, dout, *rest)


def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` under the name that causal_conv1d 1.5 gives it."""
    return causal_conv1d_cuda_update(x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices)
