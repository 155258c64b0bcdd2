"""The operator library `mambatrim`: the torch dispatcher is the registry of kernels.

Each operator has a schema, a form for the CPU, one for everywhere else, and a fake form that gives shapes and dtypes.
On a CPU the compiled kernel runs where it was built and takes the dtypes; all else runs the PyTorch form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("mambatrim", "DEF")
MAX_DIRECTIONS = 4  # of one call; the records of csrc/abi.h have as many places


def register(
    name: str,
    schema: str,
    cpu: Callable[..., Any],
    anywhere: Callable[..., Any] | None,
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define `mambatrim::name` with its forms, and its gradient where there is one."""
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, cpu, "CPU")
    if anywhere is not None:
        LIBRARY.impl(name, anywhere, "CUDA")
    torch.library.register_fake(f"mambatrim::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"mambatrim::{name}", backward, setup_context=setup, lib=LIBRARY)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`. A call of `to` that changes nothing costs a microsecond, and a block would make twenty."""
    return x if x.dtype == dtype else x.to(dtype)


def wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in: fp64 stays, everything else becomes fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
