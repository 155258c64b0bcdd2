"""Chooses between the Triton kernels and the PyTorch form for tensors on a GPU; needs torch only.

Triton is imported by the first call that runs one of its kernels, never before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


@cache
def _available() -> bool:
    return find_spec("triton") is not None


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def handles(*arguments: Any) -> bool:
    """Whether the Triton kernels take these arguments: Triton is there, all tensors are on a GPU and of fp32, bf16 or
    fp16, or maps of int64."""
    return _available() and all(x.is_cuda and x.dtype in TYPES for x in _tensors(arguments))


def form(module: str, name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The form of an operator for CUDA: function `name` of kernels/`module`.py where it takes the arguments, else
    `otherwise`, with the same arguments."""

    @wraps(otherwise)
    def run(*arguments: Any) -> Any:
        if not handles(*arguments):
            return otherwise(*arguments)
        # imported here, because Triton is optional and slow to import
        return getattr(import_module(f"{__package__}.{module}"), name)(*arguments)

    return run
