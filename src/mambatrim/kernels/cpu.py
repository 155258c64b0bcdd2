"""Finds and loads the compiled CPU kernels and calls them through their plain C interface (csrc/abi.h)."""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from .library import MAX_DIRECTIONS

_PLAIN = (Tensor, nn.Parameter)
Call = tuple[str, bytes]  # an exported function and its record
_LOCAL = threading.local()
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
# the records of csrc/abi.h, in 8-byte fields: head, one direction
SCAN, SCAN_DIRECTION = "<23qd", "<27q"
CONV, CONV_DIRECTION = "<18q", "<5q"
NORM, PRODUCT, EMBED = "<10qd", "<16q", "<19q"
MIXER, MIXERS = f"<23q2d{4 + 7 * MAX_DIRECTIONS}q", "<3q"
# of the step between two blocks
ROWS, INVERSE, NEAREST, LINKS, LIFT, MERGE = "<11q", "<3q", "<13q", "<9q", "<12q", "<17q"
# of whole steps
RANKED, CLUSTERED = "<18q", "<16q3d"
CLUSTER = "<13qd"
# where a record has no packed parameters
UNPACKED = 0


def _abi() -> int:
    scan = struct.calcsize(SCAN) + MAX_DIRECTIONS * struct.calcsize(SCAN_DIRECTION)
    conv = struct.calcsize(CONV) + MAX_DIRECTIONS * struct.calcsize(CONV_DIRECTION)
    of_a_block = (NORM, PRODUCT, EMBED, MIXER, MIXERS)
    of_a_step = (CLUSTER, ROWS, INVERSE, NEAREST, LINKS, LIFT, MERGE, RANKED, CLUSTERED)
    return 1000000 + scan + conv + sum(map(struct.calcsize, of_a_block + of_a_step))


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason in words."""
    folder = Path(__file__).parent
    for path in sorted(folder.glob("_kernels*.so")) + sorted(folder.glob("_kernels*.dylib")):
        try:
            library = ctypes.CDLL(str(path))
            for number in (library.mambatrim_abi, library.mambatrim_level, library.mambatrim_multiplies_bf16):
                number.restype = ctypes.c_int64
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


@torch.compiler.assume_constant_result
def compiled() -> bool:
    """Whether the compiled kernels are there."""
    return _load()[0] is not None


@torch.compiler.assume_constant_result
def multiplies_bf16() -> bool:
    """Whether products of bf16 are best made by the compiled kernels, and not by a matrix library."""
    library, _ = _load()
    return library is not None and bool(library.mambatrim_multiplies_bf16())


def handles(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take these tensors: built, and fp32 or bf16 throughout."""
    types = (torch.float32, torch.bfloat16)
    return compiled() and all(x is None or x.dtype in types for x in tensors)


def direct(*tensors: Tensor) -> bool:
    """Whether the compiled kernels may be called on these tensors past the dispatcher, which costs more than a small
    kernel: compiled, on a CPU, nothing recorded or transformed, no gradient wanted."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    # of this thread: `is_in_torch_dispatch_mode` tells of all of them
    recorded = recorded or (torch._C._len_torch_dispatch_stack() > 0 and _calls() is None)
    if recorded or forward_ad._current_level >= 0 or peek_interpreter_stack() is not None or not compiled():
        return False
    grad = torch.is_grad_enabled()
    # subclasses are the tensors of tracers and of other people: they have no memory of their own to point to
    return all(type(x) in _PLAIN and x.is_cpu and not (grad and x.requires_grad) for x in tensors)


def compiling(*tensors: Tensor) -> bool:
    """Whether a compiler, and no exporter, is to call an operator on these: on a CPU, no gradient wanted."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or tensors[0].device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def watch(calls: list[Call] | None) -> None:
    """From now on append this thread's calls to a list, and let a dispatch mode see what PyTorch does between them;
    None: no longer."""
    _LOCAL.calls = calls


def _calls() -> list[Call] | None:
    return getattr(_LOCAL, "calls", None)


def call(name: str, record: bytes) -> None:
    """Run an exported function on a record of csrc/abi.h.

    A record holds addresses and no tensors: the caller keeps every tensor under a name of its own until this returns.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    code = getattr(library, f"mambatrim_{name}")(record)
    if code == 1:
        raise MemoryError(f"not enough memory for the temporaries of {name}")
    if code:
        raise IndexError(f"{name}: a position lies outside the sequence, or is named twice")
    calls = _calls()
    if calls is not None:
        calls.append((name, record))


def ask(name: str, record: bytes) -> int:
    """A number from an exported function."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    return int(getattr(library, f"mambatrim_{name}")(record))


def rows(x: Tensor | None) -> tuple[int, int, int]:
    """Pointer, batch stride and token stride of (B, L, ·) with contiguous rows."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def virtual(pair: tuple[Tensor, Tensor] | None) -> tuple[int, int, int]:
    """Length and pointers of a virtual sequence: source (B, T), share (B, L)."""
    return (0, 0, 0) if pair is None else (pair[0].shape[1], pair[0].data_ptr(), pair[1].data_ptr())


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def dense_rows(x: Tensor) -> Tensor:
    """x itself if the elements of each row lie side by side, else a copy."""
    return x if x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()


def padded(record: bytes, head: str, direction: str) -> bytes:
    """A record with zeros in the places of the directions that are not there."""
    return record.ljust(struct.calcsize(head) + MAX_DIRECTIONS * struct.calcsize(direction), b"\0")
