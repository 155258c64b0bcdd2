"""The operators `mambatrim::selective_scan`, `::causal_conv1d` and `::rms_norm`: checks, kernels, gradients, shapes, FLOPs.

The torch dispatcher is the registry of kernels. On a CPU the compiled kernel runs where it was built and takes the dtypes
(fp32, bf16); everything else runs the chunked PyTorch form of reference.py. The dtype policy of the scan stands here: step
size, state, A, D and biases are fp32 whatever the inputs are; the output has the dtype of `u`.

Each operator takes several scan directions at once, because their sum, gate and average are then one pass over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, reference

_library = torch.library.Library("mambatrim", "DEF")
_library.define(
    "selective_scan(Tensor u, Tensor[] dt, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, Tensor[] dt_bias, "
    "Tensor[] dt_weight, Tensor? z, Tensor? repeats, bool[] reverse, bool softplus, float scale) "
    "-> (Tensor y, Tensor dt_mean, Tensor state)"
)
_library.define(
    "selective_scan_backward(Tensor grad_y, Tensor u, Tensor[] dt, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, "
    "Tensor[] dt_bias, Tensor[] dt_weight, Tensor? z, Tensor? repeats, bool[] reverse, bool softplus, float scale) "
    "-> (Tensor u, Tensor dt, Tensor B, Tensor C, Tensor A, Tensor D, Tensor dt_bias, Tensor z)"
)
_library.define("causal_conv1d(Tensor x, Tensor[] weight, Tensor[] bias, bool[] reverse, bool silu) -> Tensor")
_library.define(
    "causal_conv1d_backward(Tensor grad_y, Tensor x, Tensor[] weight, Tensor[] bias, bool[] reverse, bool silu) "
    "-> (Tensor x, Tensor weight, Tensor bias)"
)
_library.define("rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> Tensor")
_library.define("rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, float eps) -> (Tensor x, Tensor weight)")

_MAX_DIRECTIONS, _MAX_STATES, _MAX_TAPS = 4, 256, 8


class Direction(NamedTuple):
    """One direction of a scan: its parameters and its token-dependent projections."""

    dt: Tensor  # (B, L, R), or (B, L, E) without dt_weight: before bias and softplus
    A: Tensor  # (E, N), negative
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor | None = None  # (E)
    dt_bias: Tensor | None = None  # (E)
    dt_weight: Tensor | None = None  # (E, R)
    reverse: bool = False


class Scan(NamedTuple):
    """What a scan returns."""

    y: Tensor  # (B, L, E), dtype of u
    dt_mean: Tensor  # (B, S, L) fp32: the time step averaged over channels, token order; has no gradient
    state: Tensor  # (S, B, E, N) fp32: the state after the last step; has no gradient


# ---------------------------------------------------------------------------------------------------- public functions


def scan(
    u: Tensor,
    directions: Sequence[Direction],
    z: Tensor | None = None,
    repeats: Tensor | None = None,
    softplus: bool = True,
    scale: float = 1.0,
) -> Scan:
    """`scale` times the sum of the selective scans of several directions, gated with silu(z).

    Args:
        u: (S, B, L, E), the input of each direction, all in token order.
        directions: S <= 4 records.
        z: (B, L, E), the gate, common to all directions.
        repeats: (B, L), factor on the time step of each token (1 where it is not given).
        softplus: whether the time step is softplus(dt + bias), or dt + bias as it stands.
        scale: 0.5 averages two directions (Vim), 1 adds them (VideoMamba).

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the sentence names the argument.
    """
    _check_scan(u, directions, z, repeats)
    fp64 = u.dtype == torch.float64
    wide = torch.float64 if fp64 else torch.float32

    def each(name: str) -> list[Tensor]:
        values = [getattr(d, name) for d in directions]
        return [] if values[0] is None else [v.to(wide) for v in values]

    gate = None if z is None else z.to(u.dtype)
    factor = None if repeats is None else repeats.to(wide)
    names = ("dt", "A", "B", "C", "D", "dt_bias", "dt_weight")
    reverse = [d.reverse for d in directions]
    return Scan(*torch.ops.mambatrim.selective_scan(u, *map(each, names), gate, factor, reverse, softplus, scale))


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
    """One direction: the recurrence of Mamba-1 (arXiv 2312.00752), token-major.

    Args:
        u, z: (B, L, E). dt: (B, L, E), or (B, L, R) with dt_weight (E, R). A: (E, N), negative. D, dt_bias: (E).
        B, C: (B, L, N), or (B, L, G, N) for G groups of E / G channels.
        repeats: (B, L), factor on the time step. reverse: from the last token to the first.

    Returns:
        y (B, L, E), the time step's mean over channels (B, L), and the last state (B, E, N).

    Raises:
        ValueError: a shape, a dtype or a device does not fit; the sentence names the argument.
    """
    if B.dim() != 4:
        one = Direction(dt, A, B, C, D, dt_bias, dt_weight, reverse)
        y, dt_mean, state = scan(u[None], [one], z, repeats, softplus)
        return y, dt_mean[:, 0], state[0]
    groups, channels = B.shape[2], u.shape[2]
    if groups == 0 or channels % groups or C.shape != B.shape:
        raise ValueError(f"B and C must agree and have a number of groups that divides {channels} channels, got {groups}")

    def part(x: Tensor | None, g: int, axis: int) -> Tensor | None:
        return None if x is None else x.narrow(axis, g * channels // groups, channels // groups)

    pieces = [
        selective_scan(
            *(u.narrow(2, g * channels // groups, channels // groups),),
            dt if dt_weight is not None else dt.narrow(2, g * channels // groups, channels // groups),
            A.narrow(0, g * channels // groups, channels // groups),
            *(B[:, :, g], C[:, :, g]),
            *(part(D, g, 0), part(z, g, 2), part(dt_bias, g, 0), part(dt_weight, g, 0)),
            *(repeats, softplus, reverse),
        )
        for g in range(groups)
    ]
    y, dt_mean, state = zip(*pieces, strict=True)
    return torch.cat(y, dim=2), torch.stack(dt_mean).mean(0), torch.cat(state, dim=1)


def causal_conv1d(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    reverse: Sequence[bool] = (False,),
    silu: bool = True,
) -> Tensor:
    """Depthwise causal convolutions of the same x in S directions, then SiLU: x (B, L, E), S weights (E, K) -> (S, B, L, E).

    A reversed direction sees each token and the K - 1 tokens behind it. K is at most 8.

    Raises:
        ValueError: a shape does not fit; the sentence names the argument.
    """
    if x.dim() != 3 or any(w.dim() != 2 or w.shape[0] != x.shape[2] for w in weight):
        shapes = [tuple(w.shape) for w in weight]
        raise ValueError(f"x must be (B, L, E) and every weight (E, K), got {tuple(x.shape)} and {shapes}")
    if not 1 <= len(weight) <= _MAX_DIRECTIONS or len(reverse) != len(weight) or len(bias) not in (0, len(weight)):
        raise ValueError(f"give 1 to {_MAX_DIRECTIONS} weights and as many biases (or none) and directions as weights")
    if not 1 <= weight[0].shape[1] <= _MAX_TAPS or any(w.shape != weight[0].shape for w in weight):
        raise ValueError(f"all weights must have the same 1 to {_MAX_TAPS} taps, got {[w.shape[1] for w in weight]}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps, offsets = [w.to(wide) for w in weight], [b.to(wide) for b in bias]
    return torch.ops.mambatrim.causal_conv1d(x, taps, offsets, list(reverse), silu)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in `dtype` (default: of x)."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have the length of the last dimension of x, {x.shape[-1]}, got {tuple(weight.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.ops.mambatrim.rms_norm(x.to(wide), weight.to(wide), eps, dtype or x.dtype)


def _check_scan(u: Tensor, directions: Sequence[Direction], z: Tensor | None, repeats: Tensor | None) -> None:
    if u.dim() != 4 or u.shape[0] != len(directions) or not 1 <= len(directions) <= _MAX_DIRECTIONS:
        raise ValueError(
            f"u must be (S, B, L, E) with one entry for each of 1 to {_MAX_DIRECTIONS} directions, "
            f"got shape {tuple(u.shape)} and {len(directions)} directions"
        )
    if not u.is_floating_point():
        raise ValueError(f"u must be of a floating-point dtype, got {u.dtype}")
    batch, length, channels = u.shape[1:]
    for d in directions:
        states = d.A.shape[-1]
        width = channels if d.dt_weight is None else d.dt_weight.shape[-1]
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "A": (d.A, (channels, states)),
            "B": (d.B, (batch, length, states)),
            "C": (d.C, (batch, length, states)),
            "dt": (d.dt, (batch, length, width)),
            "D": (d.D, (channels,)),
            "dt_bias": (d.dt_bias, (channels,)),
            "dt_weight": (d.dt_weight, (channels, width)),
            "z": (z, (batch, length, channels)),
            "repeats": (repeats, (batch, length)),
        }
        for name, (value, shape) in expected.items():
            if value is None:
                if name != "z" and name != "repeats" and getattr(directions[0], name) is not None:
                    raise ValueError(f"{name} must be given for all directions or for none")
                continue
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape} to fit u {tuple(u.shape)}, got {tuple(value.shape)}")
            if value.device != u.device:
                raise ValueError(f"{name} must be on the device of u, {u.device}, got {value.device}")
            if not value.is_floating_point():
                raise ValueError(f"{name} must be of a floating-point dtype, got {value.dtype}")
        if not 1 <= states <= _MAX_STATES or states != directions[0].A.shape[-1]:
            raise ValueError(f"A must have the same 1 to {_MAX_STATES} states in every direction, got {states}")


# ------------------------------------------------------------------------------------------------------ selective scan


def _record(u: Tensor, *rest: Any) -> cpu.Scan:
    """The arguments of the operator, made contiguous where the kernel needs it."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = rest
    rows = [[cpu.dense_rows(x) for x in items] for items in (dt, B, C)]
    flat = [[x.contiguous() for x in items] for items in (A, D, dt_bias, dt_weight)]
    gate = None if z is None else cpu.dense_rows(z)
    factor = None if repeats is None else repeats.contiguous()
    u = cpu.dense_rows(u)
    return cpu.Scan(u, rows[0], flat[0], rows[1], rows[2], *flat[1:], gate, factor, reverse, softplus, scale)


def _scan_pytorch(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch, differentiable."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = rest
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    total: Tensor | None = None
    means, states = [], []
    for s in range(u.shape[0]):
        inputs = u[s].to(wide)  # (B, L, E)
        bias, weight = (x[s] if x else None for x in (dt_bias, dt_weight))
        steps = reference.step_size(dt[s], bias, weight, softplus)  # (B, L, E)
        y, state = reference.selective_scan_chunked(inputs, steps, A[s], B[s], C[s], repeats, reverse[s])
        y = y + D[s] * inputs if D else y
        total = y if total is None else total + y
        means.append(steps.mean(-1))
        states.append(state)
    assert total is not None  # S >= 1 was checked
    total = total * scale
    total = total if z is None else total * torch.nn.functional.silu(z.to(wide))
    return total.to(u.dtype), torch.stack(means, dim=1), torch.stack(states)


def _scan_cpu(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.handles(u):
        return _record(u, *rest).forward()
    return _scan_pytorch(u, *rest)


def _scan_fake(u: Tensor, dt: list[Tensor], A: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    directions, batch, length, channels = u.shape
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    return (
        u.new_empty(batch, length, channels),
        u.new_empty(batch, directions, length, dtype=wide),
        u.new_empty(directions, batch, channels, A[0].shape[1], dtype=wide),
    )


def _scan_backward_pytorch(grad_y: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Autograd through the PyTorch form; the time step enters raw, so that all kernels return the same gradients."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = rest
    raw = [torch.nn.functional.linear(x, w) for x, w in zip(dt, dt_weight, strict=True)] if dt_weight else list(dt)
    with torch.enable_grad():

        def leaf(x: Tensor) -> Tensor:
            return x.detach().requires_grad_()

        inputs, gate = leaf(u), None if z is None else leaf(z)
        leaves = [list(map(leaf, items)) for items in (raw, B, C, A, D, dt_bias)]
        raws, bs, cs, As, Ds, biases = leaves
        y, _, _ = _scan_pytorch(inputs, raws, As, bs, cs, Ds, biases, [], gate, repeats, reverse, softplus, scale)
        flat = [inputs, *(x for items in leaves for x in items), *([] if gate is None else [gate])]
        grads = list(torch.autograd.grad(y, flat, grad_y, allow_unused=True))
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, flat, strict=True)]
    directions = u.shape[0]
    result, at = [found[0]], 1
    for items in leaves:
        missing = torch.zeros_like(raw[0][0, 0]).expand(directions, -1).clone()  # D or bias that was not given
        result.append(torch.stack(found[at : at + directions]) if items else missing)
        at += len(items)
    return (*result, found[-1] if z is not None else u.new_empty(0))


def _scan_backward_cpu(grad_y: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if cpu.handles(u):
        return _record(u, *rest).backward(grad_y)
    return _scan_backward_pytorch(grad_y, u, *rest)


def _scan_backward_fake(grad_y: Tensor, u: Tensor, dt: Any, A: list[Tensor], B: Any, C: Any, D: Any, *rest: Any) -> Any:
    _, _, z, *_ = rest
    directions, batch, length, channels = u.shape
    states = A[0].shape[1]
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    shapes = [(directions, batch, length, states)] * 2
    shapes += [(directions, channels, states), *[(directions, channels)] * 2]
    grads = [u.new_empty(shape, dtype=wide) for shape in shapes]
    return (u.new_empty(u.shape), u.new_empty(u.shape), *grads, u.new_empty((batch, length, channels) if z is not None else (0,)))


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    u, dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = inputs
    lists = (dt, A, B, C, D, dt_bias, dt_weight)
    ctx.sizes = [len(items) for items in lists]
    ctx.save_for_backward(u, z, repeats, *(x for items in lists for x in items))
    ctx.options = (reverse, softplus, scale)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _scan_grad(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    u, z, repeats, *flat = ctx.saved_tensors
    lists, at = [], 0
    for size in ctx.sizes:
        lists.append(list(flat[at : at + size]))
        at += size
    dt, A, B, C, D, dt_bias, dt_weight = lists
    if grad_y is None:
        return (None, *([None] * len(items) for items in lists), None, None, None, None, None)
    grads = torch.ops.mambatrim.selective_scan_backward(grad_y, u, *lists, z, repeats, *ctx.options)
    grad_u, raw, grad_b, grad_c, grad_a, grad_d, grad_bias, grad_z = grads
    grad_dt, grad_weight = list(raw.unbind(0)), []
    if dt_weight:
        # in the dtype of u, as everything that is a matrix product
        grad_weight = [g.flatten(0, 1).T @ x.flatten(0, 1).to(g.dtype) for g, x in zip(grad_dt, dt, strict=True)]
        grad_dt = [g @ w.to(g.dtype) for g, w in zip(grad_dt, dt_weight, strict=True)]
    return (
        *(grad_u, grad_dt, list(grad_a.unbind(0)), list(grad_b.unbind(0)), list(grad_c.unbind(0))),
        *(list(grad_d.unbind(0)) if D else [], list(grad_bias.unbind(0)) if dt_bias else [], grad_weight),
        *(None if z is None else grad_z, None, None, None, None),
    )


# -------------------------------------------------------------------------------------------------- causal convolution


def _conv_pytorch(x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool) -> Tensor:
    biases: Sequence[Tensor | None] = bias or [None] * len(weight)
    return torch.stack(
        [reference.causal_conv1d(x, w, b, r, silu) for w, b, r in zip(weight, biases, reverse, strict=True)]
    )


def _conv_cpu(x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool) -> Tensor:
    if cpu.handles(x):
        weight, bias = [w.contiguous() for w in weight], [b.contiguous() for b in bias]
        return cpu.conv_forward(cpu.dense_rows(x), weight, bias, reverse, silu)
    return _conv_pytorch(x, weight, bias, reverse, silu)


def _conv_fake(x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool) -> Tensor:
    return x.new_empty(len(weight), *x.shape)


def _conv_backward_pytorch(
    grad_y: Tensor, x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, *weight, *bias)]
        taps, offsets = leaves[1 : 1 + len(weight)], leaves[1 + len(weight) :]
        grads = torch.autograd.grad(_conv_pytorch(leaves[0], taps, offsets, reverse, silu), leaves, grad_y)
    grad_weight = torch.stack(grads[1 : 1 + len(weight)])
    return grads[0], grad_weight, torch.stack(grads[1 + len(weight) :]) if bias else grad_weight.sum(-1).zero_()


def _conv_backward_cpu(
    grad_y: Tensor, x: Tensor, weight: list[Tensor], bias: list[Tensor], reverse: list[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.handles(x):
        weight, bias = [w.contiguous() for w in weight], [b.contiguous() for b in bias]
        return cpu.conv_backward(grad_y, cpu.dense_rows(x), weight, bias, reverse, silu)
    return _conv_backward_pytorch(grad_y, x, weight, bias, reverse, silu)


def _conv_backward_fake(grad_y: Tensor, x: Tensor, weight: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(weight), *weight[0].shape)
    return x.new_empty(x.shape), weight[0].new_empty(shape), weight[0].new_empty(shape[:2])


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.reverse, ctx.silu = inputs
    ctx.taps = len(weight)
    ctx.save_for_backward(x, *weight, *bias)


def _conv_grad(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, *flat = ctx.saved_tensors
    weight, bias = flat[: ctx.taps], flat[ctx.taps :]
    grads = torch.ops.mambatrim.causal_conv1d_backward(grad_y, x, weight, bias, ctx.reverse, ctx.silu)
    return grads[0], list(grads[1].unbind(0)), list(grads[2].unbind(0)) if bias else [], None, None


# ---------------------------------------------------------------------------------------------------------------- norm


def _norm_pytorch(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return reference.rms_norm(x, weight, eps).to(dtype)


def _norm_cpu(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if cpu.handles(x) and dtype in (torch.float32, torch.bfloat16):
        return cpu.norm_forward(x.contiguous(), weight.contiguous(), eps, dtype)
    return _norm_pytorch(x, weight, eps, dtype)


def _norm_fake(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _norm_backward_pytorch(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        grad_x, grad_weight = torch.autograd.grad(_norm_pytorch(*leaves, eps, grad_y.dtype), leaves, grad_y)
    return grad_x, grad_weight


def _norm_backward_cpu(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if cpu.handles(x, grad_y):
        return cpu.norm_backward(grad_y.contiguous(), x.contiguous(), weight.contiguous(), eps)
    return _norm_backward_pytorch(grad_y, x, weight, eps)


def _norm_backward_fake(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _norm_grad(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.mambatrim.rms_norm_backward(grad_y, *ctx.saved_tensors, ctx.eps), None, None)


# -------------------------------------------------------------------------------------------------------- registration

for _name, _cpu, _anywhere, _fake in (
    ("selective_scan", _scan_cpu, _scan_pytorch, _scan_fake),
    ("selective_scan_backward", _scan_backward_cpu, _scan_backward_pytorch, _scan_backward_fake),
    ("causal_conv1d", _conv_cpu, _conv_pytorch, _conv_fake),
    ("causal_conv1d_backward", _conv_backward_cpu, _conv_backward_pytorch, _conv_backward_fake),
    ("rms_norm", _norm_cpu, _norm_pytorch, _norm_fake),
    ("rms_norm_backward", _norm_backward_cpu, _norm_backward_pytorch, _norm_backward_fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _anywhere, "CUDA")
    torch.library.register_fake(f"mambatrim::{_name}", _fake, lib=_library)
torch.library.register_autograd("mambatrim::selective_scan", _scan_grad, setup_context=_scan_setup, lib=_library)
torch.library.register_autograd("mambatrim::causal_conv1d", _conv_grad, setup_context=_conv_setup, lib=_library)
torch.library.register_autograd("mambatrim::rms_norm", _norm_grad, setup_context=_norm_setup, lib=_library)


def scan_macs(length: int, channels: int, states: int, rank: int) -> int:
    """Multiply-adds of one direction for one image in the convention of the literature: step-size projection R E L, recurrence
    9 E N L, D skip and gate E L each."""
    return length * channels * (rank + 9 * states + 2)


@register_flop_formula(torch.ops.mambatrim.selective_scan)
def _scan_flops(u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_weight: Any, *_: Any, **__: Any) -> int:
    directions, batch, length, channels = u
    rank = dt_weight[0][1] if dt_weight else 0
    # the counter of torch counts two for a multiply-add
    return 2 * directions * batch * scan_macs(length, channels, A[0][1], rank)


@register_flop_formula(torch.ops.mambatrim.causal_conv1d)
def _conv_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    batch, length, channels = x
    return 2 * len(weight) * batch * length * channels * weight[0][1]
