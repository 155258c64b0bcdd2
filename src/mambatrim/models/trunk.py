"""Blocks one after another: as one kernel, as the modules that they are, or as one operator of a compiled model.

A compiled model that hands its weights to an operator checks every one of them before every call, 416 in a Vim, which
at one image costs more than there is to gain. So the operator `mambatrim::blocks` takes the list of blocks itself,
which PyTorch calls an opaque object and does not look into, and reads the weights when it runs, as the model does that
is not compiled. That is right where a graph is made of a model alone: code around it that is part of the same graph may
give it other weights, as `torch.func.functional_call` does, of which only the compiler would know.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import cpu
from ..kernels.library import register
from ..reduction import Layout
from .layers import AT_ONCE, DIRECTIONS, BiMambaMixer, Block, Captured, RMSNorm, over, untouched

try:
    from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
    from torch._opaque_base import OpaqueBase
except ImportError:  # an older PyTorch: its compiled models call `mambatrim::mixers`, and check their weights
    OpaqueBase, OPAQUE = object, False  # type: ignore[misc, assignment]
else:
    OPAQUE = True


F = TypeVar("F", bound=Callable[..., Any])


class Handle(OpaqueBase):
    """What the operator takes: leads to a trunk, and does not keep it."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = weakref.ref(trunk)

    def blocks(self, first: int, end: int) -> list[Block]:
        """Blocks first to end - 1, as they are now."""
        trunk = self._trunk()
        if trunk is None:
            raise RuntimeError("the model that was compiled is gone")
        return _between(trunk, first, end)


class Trunk(nn.ModuleList):
    """The blocks of a model. The handle of a copy leads to the copy."""

    def __init__(self, blocks: Iterable[nn.Module] | None = None) -> None:
        super().__init__(blocks)
        self.handle = Handle(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = Handle(self)


def through(
    layers: nn.ModuleList, first: int, end: int, x: Tensor, wanted: Sequence[str] = (), layout: Layout | None = None
) -> tuple[Tensor, Captured]:
    """x (B, L, D) fp32 through the blocks first to end - 1, and the `wanted` signals of the last one.

    Blocks that nobody watches or changed can run as one kernel: otherwise each is called as the module that it is.
    """
    if isinstance(layers, Trunk) and _opaque(x) and AT_ONCE.issuperset(wanted):
        means = "dt_mean" in wanted
        return seen_of(wanted, *torch.ops.mambatrim.blocks(x, layers.handle, first, end, means, *_flat(layout)))
    return _run(_between(layers, first, end), x, wanted, layout, kernels.mix)


def _run(
    blocks: list[Block], x: Tensor, wanted: Sequence[str], layout: Layout | None, mix: Callable[..., Any]
) -> tuple[Tensor, Captured]:
    if AT_ONCE.issuperset(wanted) and all(map(plain, blocks)):
        return seen_of(wanted, *mix(x, mixers_of(blocks), over(layout)))
    captured: Captured = {}
    for block in blocks:
        x, captured = block(x, wanted if block is blocks[-1] else (), layout)
    return x, captured


def _between(layers: nn.ModuleList, first: int, end: int) -> list[Block]:
    return cast(list[Block], list(layers)[first:end])


def mixers_of(blocks: Sequence[Block]) -> list[kernels.Mixer]:
    parts: Iterable[dict[str, Any]] = (block._modules for block in blocks)
    return [part["mixer"].parameters_with(part["norm"]) for part in parts]


def seen_of(wanted: Sequence[str], x: Tensor, dt_mean: Tensor) -> tuple[Tensor, Captured]:
    return x, {name: value for name, value in (("dt_mean", dt_mean), ("hidden", x)) if name in wanted}


def plain(block: Block) -> bool:
    """Whether a block and its parts are what they were made as, with no hooks of anybody."""
    parts: dict[str, Any] = block._modules
    return untouched(block, Block) and untouched(parts["mixer"], BiMambaMixer) and untouched(parts["norm"], RMSNorm)


# ------------------------------------------------------------------------------------------------------- the operator

_WHOLE: set[CodeType] = set()


def whole(method: F) -> F:
    """Marks a method of a model that changes no weights, and where a graph may begin."""
    _WHOLE.add(method.__code__)
    return method


def _opaque(x: Tensor) -> bool:
    """Whether a compiler is to call the operator on these: no gradient of any weight can be wanted."""
    if not OPAQUE or not cpu.compiling(x) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return _alone()


@torch.compiler.assume_constant_result
def _alone() -> bool:
    """Whether the graph that is being made is of a model and of nothing around it, by a compiler that knows objects."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._inductor import config

        output = InstructionTranslator.current_tx().output
        options = getattr(output.compiler_fn, "config", {})
        in_cpp = options.get("cpp_wrapper", config.cpp_wrapper)  # its code takes tensors and numbers alone
        return output.root_tx.f_code in _WHOLE and not in_cpp
    except (ImportError, AttributeError):  # another PyTorch
        return False


def _flat(layout: Layout | None) -> tuple[Tensor | None, ...]:
    """The last arguments of the operator."""
    return (None,) * 4 if layout is None else (layout.share, layout.repeats, layout.convolved, layout.scanned)


def _layout(share: Tensor | None, *others: Tensor | None) -> Layout | None:
    return None if share is None else Layout(share, *others)


def _operator(
    x: Tensor, handle: Handle, first: int, end: int, means: bool, *flat: Tensor | None
) -> tuple[Tensor, Tensor]:
    wanted = ("dt_mean",) if means else ()
    y, seen = _run(handle.blocks(first, end), x, wanted, _layout(*flat), kernels.mix_within)
    if means and "dt_mean" not in seen:
        raise ValueError(f"'dt_mean' is needed, but block {end - 1} returned no such signal")
    return y.clone() if y is x else y, seen["dt_mean"] if means else x.new_empty(0)


def _fake(x: Tensor, handle: Any, first: int, end: int, means: bool, *_: Any) -> tuple[Tensor, Tensor]:
    y, dt_mean = kernels.fake_mixed(x, len(DIRECTIONS))
    return y, dt_mean if means else x.new_empty(0)


if OPAQUE:
    register_opaque_type(Handle, typ="reference")
    register(
        "blocks",
        f"(Tensor x, {get_opaque_type_name(Handle)} handle, int first, int end, bool means, "
        "Tensor? share, Tensor? repeats, Tensor? convolved, Tensor? scanned) -> (Tensor y, Tensor dt_mean)",
        *(_operator, None, _fake),
    )
