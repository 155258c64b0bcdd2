"""The kernels of the virtual sequence lowered to machine code for compute capability 8.0 and 9.0: nothing runs, no GPU
is needed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton is not installed, or interprets", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from test_virtual import groups, scan_arguments

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
CAPABILITIES = (80, 90)


def kind(value: Any) -> str:
    """The type of an argument in Triton's words."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return {int: "i32", float: "fp32"}.get(type(value), "constexpr")


class Compiled:
    """Stands in for a kernel: a launch compiles for every capability, and runs nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.sizes = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *given: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps",) if name in named}
        values = {**dict(zip(self.kernel.arg_names, given, strict=False)), **named}
        fixed = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        signature = {name: "constexpr" if name in fixed else kind(value) for name, value in values.items()}
        constants = {name: values[name] for name, word in signature.items() if word == "constexpr"}
        for capability in CAPABILITIES:
            source = ASTSource(self.kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert f".target sm_{capability}" in made.asm["ptx"]
            self.sizes.append(len(made.asm["cubin"]))


def compiled(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> Compiled:
    """The kernel `name` of kernels/`module`.py, from now on only compiled."""
    room = importlib.import_module(f"mambatrim.kernels.{module}")
    stand_in = Compiled(getattr(room, name))
    monkeypatch.setattr(room, name, stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def assembler(monkeypatch, tmp_path):
    """Skips where Triton brings no assembler; what it makes is kept nowhere."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    try:
        triton.knobs.nvidia.ptxas.path  # noqa: B018
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no ptxas: {error}")


def test_the_scan_compiles(monkeypatch):
    from mambatrim.kernels import triton_virtual

    kernel = compiled(monkeypatch, "triton_virtual", "virtual_scan_kernel")
    u, *rest = scan_arguments(2, 7, 40, 16, 3, torch.bfloat16)
    lists, (z, repeats, _, softplus, scale) = [items[1:] for items in rest[:7]], rest[7:]
    triton_virtual.scan_forward(u[1:], *lists, z, repeats, [True], softplus, scale, *groups(2, 13, 7))
    assert len(kernel.sizes) == len(CAPABILITIES) and min(kernel.sizes) > 0


def test_the_convolution_compiles(monkeypatch):
    from mambatrim.kernels import triton_virtual

    kernel = compiled(monkeypatch, "triton_virtual", "virtual_conv_kernel")
    x, weight, bias = torch.randn(2, 7, 70).half(), [torch.randn(70, 4)] * 2, [torch.randn(70)] * 2
    triton_virtual.conv_forward(x, weight, bias, [False, True], True, *groups(2, 13, 7))
    assert len(kernel.sizes) == len(CAPABILITIES) and min(kernel.sizes) > 0
