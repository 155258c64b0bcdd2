"""Matrix products with a weight: `torch.nn.functional.linear`, by the faster of the two libraries that PyTorch ships.

In fp32 on a CPU, PyTorch calls MKL, which on processors of other makers than Intel may reach less than half of what
oneDNN reaches (benchmarks/cpu.py prints both). So oneDNN is called where PyTorch has it, and on few rows our own
kernel, which needs no set-up.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .library import MAX_DIRECTIONS, register

# of a product that our own kernel makes; beyond, the library's set-up does not matter
MOST_ROWS = 2048
_RECORD = struct.Struct(cpu.PRODUCT).pack


def _has_onednn() -> bool:
    # the operator is private to PyTorch: other versions may lack it
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I) times weight (O, I) transposed, plus bias (O) -> (..., O).

    An exported graph gets PyTorch's own operator, which every back end knows.
    """
    plain = (
        not (_ONEDNN or cpu.compiled())
        or torch.compiler.is_exporting()
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.device.type != "cpu"
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
    )
    if plain:
        return F.linear(x, weight, bias)
    given = (x, weight) if bias is None else (x, weight, bias)
    return _cpu(x, weight, bias) if cpu.direct(*given) else torch.ops.mambatrim.linear(x, weight, bias)


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if any(each is not None and each.dtype != torch.float32 for each in (x, weight, bias)):
        return F.linear(x, weight, bias)
    if x.numel() <= MOST_ROWS * weight.shape[1] and cpu.compiled():
        return _compiled(x, weight, bias)
    return _onednn(x, weight, bias) if _ONEDNN else F.linear(x, weight, bias)


def _compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"x must be (..., I), weight (O, I) and bias (O), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    return products(x[None], [weight], bias)[0]


def products(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """By the compiled kernel: x (S, ..., I) times S weights (O, I) transposed, all fp32 or bf16 (of even I), plus bias
    (O) fp32 -> (S, ..., O) fp32."""
    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    bias = bias if bias is None else bias.contiguous()
    directions, (outputs, inputs) = len(weights), weights[0].shape
    y = x.new_empty((*x.shape[:-1], outputs), dtype=torch.float32)
    if y.numel():
        rows = y.numel() // (directions * outputs)
        head = (directions, rows, inputs, outputs, x.dtype == torch.bfloat16, torch.get_num_threads())
        pointers = [weight.data_ptr() for weight in weights] + [0] * (MAX_DIRECTIONS - directions)
        ends = (x.data_ptr(), rows * inputs, y.data_ptr(), cpu.pointer(bias), 0, cpu.UNPACKED)
        cpu.call("product", _RECORD(*head, *ends, *pointers))
    return y


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    of_weight = linear(rows.T.contiguous(), inputs.T.contiguous())
    return linear(grad, weight.T.contiguous()), of_weight, rows.sum(0) if ctx.biased else None


register("linear", "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", *(_cpu, F.linear, _fake, _setup, _grad))


@register_flop_formula(torch.ops.mambatrim.linear)
def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]
