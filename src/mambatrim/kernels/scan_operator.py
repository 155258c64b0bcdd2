"""The operator `mambatrim::selective_scan`: its kernels, its gradient, its shapes, its FLOPs.

It takes several scan directions at once, because their sum, gate and average are then one pass over memory. What
stands for one value per direction is a list; a list that is empty was not given. Callers use `scan` and
`selective_scan` (scan.py).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, gpu, reference
from .library import register, wide

ARGUMENTS = (
    "Tensor u, Tensor[] dt, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, Tensor[] dt_bias, Tensor[] dt_weight, "
    "Tensor? z, Tensor? repeats, bool[] reverse, bool softplus, float scale"
)
_HEAD, _DIRECTION = struct.Struct(cpu.SCAN).pack, struct.Struct(cpu.SCAN_DIRECTION).pack
_NO_GRADS = (0,) * 7


@dataclass(frozen=True)
class Record:
    """The arguments of one scan in all its directions, as the operator of kernels/ops.py takes them, contiguous where
    needed."""

    u: Tensor  # (S, B, L, E)
    dt: Sequence[Tensor]  # S times (B, L, R) or (B, L, E)
    A: Sequence[Tensor]  # (E, N)
    B: Sequence[Tensor]  # (B, L, N)
    C: Sequence[Tensor]  # (B, L, N)
    D: Sequence[Tensor]  # (E), or nothing
    dt_bias: Sequence[Tensor]  # (E), or nothing
    dt_weight: Sequence[Tensor]  # (E, R), or nothing
    z: Tensor | None  # (B, L, E)
    repeats: Tensor | None  # (B, L)
    reverse: Sequence[bool]
    softplus: bool
    scale: float
    log_A: bool = False  # A holds log(-A); of the forward pass only

    def forward(self, virtual: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y (B, L, E), dt_mean (B, S, L), state (S, B, E, N); over a virtual sequence where its source (B, T) and share
        (B, L) are given."""
        directions, batch, length, channels = self.u.shape
        y = self.u.new_empty(batch, length, channels)
        dt_mean = self.u.new_empty(batch, directions, length, dtype=torch.float32)
        state = self.u.new_empty(directions, batch, channels, self.A[0].shape[1], dtype=torch.float32)
        if virtual is not None:
            virtual = (virtual[0].contiguous(), virtual[1].contiguous())
        if y.numel():
            name = "scan_forward" if virtual is None else "virtual_scan_forward"
            cpu.call(name, self._record(y=y, dt_mean=dt_mean, state=state, virtual=virtual))
        else:
            dt_mean.zero_(), state.zero_()
        return y, dt_mean, state

    def backward(self, grad_y: Tensor) -> tuple[Tensor, ...]:
        """Gradients of u (S, B, L, E), of the raw step size before its bias (S, B, L, E), of B and C (S, B, L, N), A
        (S, E, N), D and bias (S, E), and z (B, L, E; empty without a gate)."""
        directions, batch, length, channels = self.u.shape
        states = self.A[0].shape[1]
        new = partial(self.u.new_empty, dtype=torch.float32)
        grads = (
            *(torch.empty_like(self.u, memory_format=torch.contiguous_format) for _ in "ud"),
            *(new(directions, batch, length, states) for _ in "BC"),
            new(directions, channels, states),
            *(new(directions, channels) for _ in "Db"),
        )
        grad_z = self.u.new_empty((batch, length, channels) if self.z is not None else (0,))
        grad_y = cpu.dense_rows(grad_y)  # under a name: a record holds addresses, not tensors
        if self.u.numel():
            cpu.call("scan_backward", self._record(grad_y=grad_y, grad_z=grad_z, grads=grads))
        else:
            for grad in grads:
                grad.zero_()
        return (*grads, grad_z)

    def _record(
        self,
        y: Tensor | None = None,
        dt_mean: Tensor | None = None,
        state: Tensor | None = None,
        grad_y: Tensor | None = None,
        grad_z: Tensor | None = None,
        grads: Sequence[Tensor] = (),
        virtual: tuple[Tensor, Tensor] | None = None,
    ) -> bytes:
        directions, batch, length, channels = self.u.shape
        head = _HEAD(
            *(batch, length, channels, self.A[0].shape[1]),
            self.dt_weight[0].shape[1] if self.dt_weight else 0,
            *(directions, self.softplus, self.u.dtype == torch.bfloat16, torch.get_num_threads()),
            *cpu.rows(self.z),
            *(cpu.pointer(self.repeats), cpu.pointer(y)),
            *cpu.rows(grad_y),
            cpu.pointer(grad_z),
            *cpu.virtual(virtual),
            *(self.log_A, cpu.UNPACKED, self.scale),
        )
        records = [head]
        u, u_batch, u_token = cpu.rows(self.u[0])
        u_direction = self.u.stride(0) * self.u.element_size()
        for s in range(directions):
            mean = (0, 0) if dt_mean is None else (dt_mean.data_ptr() + 4 * s * length, dt_mean.stride(0))
            last = 0 if state is None else state.data_ptr() + 4 * s * state.stride(0)
            records.append(
                _DIRECTION(
                    *(u + s * u_direction, u_batch, u_token),
                    *cpu.rows(self.dt[s]),
                    *cpu.rows(self.B[s]),
                    *cpu.rows(self.C[s]),
                    *(x[s].data_ptr() if x else 0 for x in (self.A, self.D, self.dt_weight, self.dt_bias)),
                    *(self.reverse[s], *mean, last),
                    *([g[s].data_ptr() for g in grads] if grads else _NO_GRADS),
                )
            )
        return cpu.padded(b"".join(records), cpu.SCAN, cpu.SCAN_DIRECTION)


def record(u: Tensor, *rest: Any, log_A: bool = False) -> Record:
    """The arguments of the operator, made contiguous where the kernel needs it."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = rest

    def rows(items: Sequence[Tensor]) -> list[Tensor]:
        return [cpu.dense_rows(x) for x in items]

    def flat(items: Sequence[Tensor]) -> list[Tensor]:
        return [x.contiguous() for x in items]

    return Record(
        u=cpu.dense_rows(u),
        dt=rows(dt),
        A=flat(A),
        B=rows(B),
        C=rows(C),
        D=flat(D),
        dt_bias=flat(dt_bias),
        dt_weight=flat(dt_weight),
        z=None if z is None else cpu.dense_rows(z),
        repeats=None if repeats is None else repeats.contiguous(),
        reverse=reverse,
        softplus=softplus,
        scale=scale,
        log_A=log_A,
    )


def _scan_pytorch(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch, differentiable."""
    dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = rest
    exact = wide(u)
    outputs, means, states = [], [], []
    for s in range(u.shape[0]):
        inputs = u[s].to(exact)  # (B, L, E)
        bias, weight = (x[s] if x else None for x in (dt_bias, dt_weight))
        steps = reference.step_size(dt[s], bias, weight, softplus)  # (B, L, E)
        y, state = reference.selective_scan_chunked(inputs, steps, A[s], B[s], C[s], repeats, reverse[s])
        outputs.append(y + D[s] * inputs if D else y)
        means.append(steps.mean(-1))
        states.append(state)
    total = sum(outputs[1:], outputs[0]) * scale
    total = total if z is None else total * torch.nn.functional.silu(z.to(exact))
    return total.to(u.dtype), torch.stack(means, dim=1), torch.stack(states)


def _scan_cpu(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if cpu.handles(u):
        return record(u, *rest).forward()
    return _scan_pytorch(u, *rest)


def fake(u: Tensor, dt: list[Tensor], A: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    directions, batch, length, channels = u.shape
    exact = wide(u)
    return (
        u.new_empty(batch, length, channels),
        u.new_empty(batch, directions, length, dtype=exact),
        u.new_empty(directions, batch, channels, A[0].shape[1], dtype=exact),
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
        return record(u, *rest).backward(grad_y)
    return _scan_backward_pytorch(grad_y, u, *rest)


def _scan_backward_fake(grad_y: Tensor, u: Tensor, dt: Any, A: list[Tensor], B: Any, C: Any, D: Any, *rest: Any) -> Any:
    _, _, z, *_ = rest
    directions, batch, length, channels = u.shape
    states = A[0].shape[1]
    exact = wide(u)
    shapes: list[tuple[int, ...]] = [(directions, batch, length, states)] * 2
    shapes += [(directions, channels, states), *[(directions, channels)] * 2]
    grads = [u.new_empty(shape, dtype=exact) for shape in shapes]
    return (
        u.new_empty(u.shape),
        u.new_empty(u.shape),
        *grads,
        u.new_empty((batch, length, channels) if z is not None else (0,)),
    )


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    u, dt, A, B, C, D, dt_bias, dt_weight, z, repeats, reverse, softplus, scale = inputs
    lists = (dt, A, B, C, D, dt_bias, dt_weight)
    ctx.sizes = [len(items) for items in lists]
    ctx.save_for_backward(u, z, repeats, *(x for items in lists for x in items))
    ctx.options = (reverse, softplus, scale)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _scan_grad(ctx: Any, grad_y: Tensor | None, *others: None) -> tuple[Any, ...]:
    u, z, repeats, *flat = ctx.saved_tensors
    ends = list(accumulate(ctx.sizes, initial=0))
    lists = [list(flat[start:end]) for start, end in pairwise(ends)]
    dt, _, _, _, D, dt_bias, dt_weight = lists
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


register(
    "selective_scan",
    f"({ARGUMENTS}) -> (Tensor y, Tensor dt_mean, Tensor state)",
    *(_scan_cpu, gpu.form("triton_scan", "scan_forward", _scan_pytorch), fake, _scan_setup, _scan_grad),
)
register(
    "selective_scan_backward",
    f"(Tensor grad_y, {ARGUMENTS}) -> "
    "(Tensor u, Tensor dt, Tensor B, Tensor C, Tensor A, Tensor D, Tensor dt_bias, Tensor z)",
    _scan_backward_cpu,
    gpu.form("triton_scan", "scan_backward", _scan_backward_pytorch),
    _scan_backward_fake,
)


def scan_macs(length: int, channels: int, states: int, rank: int, positions: int | None = None) -> int:
    """Multiply-adds of one direction for one image in the convention of the literature: step-size projection R E L,
    recurrence 9 E N L, D skip and gate E L each.

    Args:
        positions: of a virtual sequence: the recurrence, and the mean over the positions of a row, run over these.
    """
    walked = 9 * states * length if positions is None else (9 * states + 1) * positions
    return channels * (length * (rank + 2) + walked)


@register_flop_formula(torch.ops.mambatrim.selective_scan)
def _scan_flops(
    u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, dt_weight: Any, *_: Any, **__: Any
) -> int:
    directions, batch, length, channels = u
    rank = dt_weight[0][1] if dt_weight else 0
    # the counter of torch counts two for a multiply-add
    return 2 * directions * batch * scan_macs(length, channels, A[0][1], rank)
