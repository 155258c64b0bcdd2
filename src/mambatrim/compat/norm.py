"""`mamba_ssm.ops.triton.layernorm` (releases 1.x) and `layer_norm` (2.x and the fork of Vim): add, then norm.

Both modules hold the same functions with their arguments in another order, so each name is there once for each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.library import wide

Normed = Tensor | tuple[Tensor, Tensor]


def _add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    prenorm: bool,
    residual_in_fp32: bool,
    rms: bool,
) -> Normed:
    """norm(x + residual) in the dtype of x, all (..., D); with prenorm also the sum.

    Sum and norm are computed in fp32 (fp64 for fp64). The sum is kept in the dtype of the residual; where there is
    none, in fp32 if residual_in_fp32 says so, else in the dtype of x.
    """
    exact = wide(x) if residual is None else torch.promote_types(wide(x), wide(residual))
    stream = x.to(exact) if residual is None else x.to(exact) + residual.to(exact)
    shift = None if bias is None else bias.to(exact)
    if not rms:
        y = F.layer_norm(stream, weight.shape, weight.to(exact), shift, eps).to(x.dtype)
    elif shift is None:
        y = kernels.rms_norm(stream, weight, eps, x.dtype)
    else:
        y = (kernels.rms_norm(stream, weight, eps) + shift).to(x.dtype)
    if not prenorm:
        return y
    if residual is not None:
        return y, stream.to(residual.dtype)
    return y, stream if residual_in_fp32 else x


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Normed:
    """LayerNorm, or RMSNorm, of x + residual, (..., D); with prenorm also the sum."""
    return _add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Normed:
    """RMSNorm of x + residual, (..., D); with prenorm also the sum."""
    return _add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, rms=True)


class RMSNorm(nn.Module):
    """(x + residual) / sqrt(mean((x + residual)^2) + eps) * weight; its only entry in a state dict is `weight` (D)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Normed:
        return rms_norm_fn(x, self.weight, None, residual, prenorm, residual_in_fp32, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


# --------------------------------------------------------------------------------------------------- layer_norm (2.x)


def _refuse(dropout_p: float, return_dropout_mask: bool, **given: Tensor | None) -> None:
    if dropout_p or return_dropout_mask:
        raise NotImplementedError("the norms of mambatrim do not drop anything out: dropout_p must be 0")
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(f"the norms of mambatrim do not take {name}; it must be None")


def layer_norm_fn_2(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Normed:
    """`layer_norm_fn` with the arguments of mamba_ssm 2.x.

    Raises:
        NotImplementedError: x1, weight1, bias1, rowscale or a dropout is asked for.
    """
    _refuse(dropout_p, return_dropout_mask, x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale)
    return _add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


def rms_norm_fn_2(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Normed:
    """`rms_norm_fn` with the arguments of mamba_ssm 2.x; refuses what `layer_norm_fn_2` refuses."""
    _refuse(dropout_p, return_dropout_mask, x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale)
    return _add_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, rms=True)


class RMSNorm2(RMSNorm):
    """`RMSNorm` with the arguments of mamba_ssm 2.x; dropout_p must be 0."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _refuse(dropout_p, return_dropout_mask=False)
        super().__init__(hidden_size, eps, device, dtype)
