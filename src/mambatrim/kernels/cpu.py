"""Finds and loads the compiled CPU kernels and calls them through their plain C interface (csrc/abi.h)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

LEVELS = ("generic", "avx2", "avx512")
_MAX_DIRECTIONS = 4
# the records of csrc/abi.h, in 8-byte fields: head, one direction
_SCAN, _SCAN_DIRECTION = "<18qd", "<27q"
_CONV, _CONV_DIRECTION = "<14q", "<5q"
_NORM = "<10qd"


def _abi() -> int:
    scan = struct.calcsize(_SCAN) + _MAX_DIRECTIONS * struct.calcsize(_SCAN_DIRECTION)
    conv = struct.calcsize(_CONV) + _MAX_DIRECTIONS * struct.calcsize(_CONV_DIRECTION)
    return 1000000 + scan + conv + struct.calcsize(_NORM)


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason in words."""
    folder = Path(__file__).parent
    for path in sorted(folder.glob("_kernels*.so")) + sorted(folder.glob("_kernels*.dylib")):
        try:
            library = ctypes.CDLL(str(path))
            library.mambatrim_abi.restype = library.mambatrim_level.restype = ctypes.c_int64
            library.mambatrim_level.argtypes = [ctypes.c_int64]
            if library.mambatrim_abi() == _abi():
                return library, ""
        except (OSError, AttributeError) as error:
            return None, f"the compiled kernels do not load ({error})"
        return None, "the compiled kernels belong to another version"
    return None, "the kernels were not compiled when mambatrim was installed"


def missing() -> str:
    """Why the compiled kernels do not run, in one sentence with the remedy; empty where they do."""
    library, reason = _load()
    if library is not None:
        return ""
    return (
        f"{reason[0].upper()}{reason[1:]}, so a slower PyTorch form of the scan runs; "
        "to mend this, install a C++ compiler (g++ or clang++) and reinstall mambatrim."
    )


def level(wanted: str | None = None) -> str:
    """The instruction set in use; `wanted` asks for a lower one (for tests and benchmarks)."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    if wanted is not None and wanted not in LEVELS:
        raise ValueError(f"unknown instruction set {wanted!r}; known: {', '.join(LEVELS)}")
    return LEVELS[library.mambatrim_level(-1 if wanted is None else LEVELS.index(wanted))]


def handles(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take these tensors: built, and fp32 or bf16 throughout."""
    types = (torch.float32, torch.bfloat16)
    return _load()[0] is not None and all(x is None or x.dtype in types for x in tensors)


def _call(name: str, record: bytes) -> None:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    if getattr(library, name)(record):
        raise MemoryError(f"not enough memory for the temporaries of {name}")


def _rows(x: Tensor | None) -> tuple[int, int, int]:
    """Pointer, batch stride and token stride of (B, L, ·) with contiguous rows."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def dense_rows(x: Tensor) -> Tensor:
    """x itself if the elements of each row lie side by side, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 and x.is_contiguous() else x.contiguous()


@dataclass(frozen=True)
class Scan:
    """The arguments of one scan in all its directions, as the operator of kernels/ops.py takes them, contiguous where needed."""

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

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """y (B, L, E), dt_mean (B, S, L), state (S, B, E, N)."""
        directions, batch, length, channels = self.u.shape
        y = self.u.new_empty(batch, length, channels)
        dt_mean = self.u.new_empty(batch, directions, length, dtype=torch.float32)
        state = self.u.new_empty(directions, batch, channels, self.A[0].shape[1], dtype=torch.float32)
        if y.numel():
            _call("mambatrim_scan_forward", self._record(y=y, dt_mean=dt_mean, state=state))
        else:
            dt_mean.zero_(), state.zero_()
        return y, dt_mean, state

    def backward(self, grad_y: Tensor) -> tuple[Tensor, ...]:
        """Gradients of u (S, B, L, E), of the raw step size before its bias (S, B, L, E), of B and C (S, B, L, N), A (S, E, N),
        D and bias (S, E), and z (B, L, E; empty without a gate)."""
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
        grad_y = dense_rows(grad_y)  # under a name: a record holds addresses, not tensors
        if self.u.numel():
            _call("mambatrim_scan_backward", self._record(grad_y=grad_y, grad_z=grad_z, grads=grads))
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
    ) -> bytes:
        directions, batch, length, channels = self.u.shape
        head = struct.pack(
            _SCAN,
            *(batch, length, channels, self.A[0].shape[1]),
            self.dt_weight[0].shape[1] if self.dt_weight else 0,
            *(directions, self.softplus, self.u.dtype == torch.bfloat16, torch.get_num_threads()),
            *_rows(self.z),
            *(_pointer(self.repeats), _pointer(y)),
            *_rows(grad_y),
            _pointer(grad_z),
            self.scale,
        )
        records = [head]
        for s in range(directions):
            mean = None if dt_mean is None else dt_mean[:, s]
            records.append(
                struct.pack(
                    _SCAN_DIRECTION,
                    *(field for x in (self.u, self.dt, self.B, self.C) for field in _rows(x[s])),
                    *(x[s].data_ptr() if len(x) else 0 for x in (self.A, self.D, self.dt_weight, self.dt_bias)),
                    self.reverse[s],
                    *(_pointer(mean), 0 if mean is None else mean.stride(0)),
                    0 if state is None else state[s].data_ptr(),
                    *((g[s].data_ptr() for g in grads) if grads else (0,) * 7),
                )
            )
        return b"".join(records).ljust(struct.calcsize(_SCAN) + _MAX_DIRECTIONS * struct.calcsize(_SCAN_DIRECTION), b"\0")


def _conv(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    reverse: Sequence[bool],
    silu: bool,
    y: Tensor | None = None,
    grad_y: Tensor | None = None,
    grad_x: Tensor | None = None,
    grads: Sequence[Tensor] = (),
) -> bytes:
    batch, length, channels = x.shape
    head = struct.pack(
        _CONV,
        *(batch, length, channels, weight[0].shape[1]),
        *(len(weight), silu, x.dtype == torch.bfloat16, torch.get_num_threads()),
        *_rows(x),
        *(_pointer(y), _pointer(grad_y), _pointer(grad_x)),
    )
    directions = [
        struct.pack(
            _CONV_DIRECTION,
            *(weight[s].data_ptr(), bias[s].data_ptr() if bias else 0, reverse[s]),
            *((g[s].data_ptr() for g in grads) if grads else (0, 0)),
        )
        for s in range(len(weight))
    ]
    record = head + b"".join(directions)
    return record.ljust(struct.calcsize(_CONV) + _MAX_DIRECTIONS * struct.calcsize(_CONV_DIRECTION), b"\0")


def conv_forward(
    x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], reverse: Sequence[bool], silu: bool
) -> Tensor:
    """x (B, L, E), S weights (E, K) -> (S, B, L, E)."""
    y = x.new_empty(len(weight), *x.shape)
    if y.numel():
        _call("mambatrim_conv_forward", _conv(x, weight, bias, reverse, silu, y=y))
    return y


def conv_backward(
    grad_y: Tensor, x: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor], reverse: Sequence[bool], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, L, E), the weights (S, E, K) and the biases (S, E)."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    shape = (len(weight), *weight[0].shape)
    grads = (x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape[:2], dtype=torch.float32))
    grad_y = grad_y.contiguous()  # under a name: a record holds addresses, not tensors
    if x.numel():
        record = _conv(x, weight, bias, reverse, silu, grad_y=grad_y, grad_x=grad_x, grads=grads)
        _call("mambatrim_conv_backward", record)
    return grad_x, *grads


def _norm(x: Tensor, eps: float, dtype: torch.dtype, pointers: Sequence[int]) -> bytes:
    columns = x.shape[-1]
    head = (x.numel() // max(columns, 1), columns, dtype == torch.bfloat16, torch.get_num_threads())
    return struct.pack(_NORM, *head, *pointers, eps)


def norm_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., D) fp32, contiguous -> (..., D) of `dtype`."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr(), 0, 0, 0)
        _call("mambatrim_norm_forward", _norm(x, eps, dtype, pointers))
    return y


def norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of the weight (D)."""
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    if x.numel():
        pointers = (x.data_ptr(), weight.data_ptr(), 0, grad_y.data_ptr(), grad_x.data_ptr(), grad_weight.data_ptr())
        _call("mambatrim_norm_backward", _norm(x, eps, grad_y.dtype, pointers))
    return grad_x, grad_weight
