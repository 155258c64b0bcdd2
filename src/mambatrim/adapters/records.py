"""Adapter: how somebody else's model is read; and the records of those that are known here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .signals import MAMBA1, MAMBAVISION_MIXER, mamba1_signals, mambapy_signals, mambavision_signals

Parts = tuple[Tensor, ...]


def square(patches: int) -> tuple[int, int]:
    """(h, w) of so many patches: a square where the number is one, else a line."""
    side = round(patches**0.5)
    return (side, side) if side * side == patches else (1, patches)


def own_mixer(block: Any) -> nn.Module:
    """The mixer of a block that calls it `mixer`."""
    mixer: nn.Module = block.mixer
    return mixer


@dataclass(frozen=True)
class Adapter:
    """How to read a kind of model; change a field with `dataclasses.replace`.

    name: for error messages.
    scopes: model -> runs of blocks, in the order in which they are called; all of a run see one sequence of tokens.
        Where a model reads the stream between two blocks, a run has to end: there it finds all its tokens.
    read: what a block returns -> tensors (B, L, D) whose sum is the residual stream.
    write: (what a block returned, new tensors) -> what it returns instead.
    special: (model, L0) -> positions of class and register tokens, which always stay.
    signals: (mixer, its input (B, L, D), names) -> the signals of these names, of every token, in token order.
    mixer: block -> its mixer.
    parts: attributes by which a mixer is known to be one that `signals` can read.
    grid: number of patches -> (h, w), for methods that look at places.
    """

    name: str
    scopes: Callable[[nn.Module], Sequence[Sequence[nn.Module]]]
    read: Callable[[Any], Parts]
    write: Callable[[Any, Parts], Any]
    special: Callable[[nn.Module, int], tuple[int, ...]]
    signals: Callable[[nn.Module, Tensor, Collection[str]], dict[str, Tensor]] = mamba1_signals
    mixer: Callable[[Any], nn.Module] = own_mixer
    parts: tuple[str, ...] = MAMBA1
    grid: Callable[[int], tuple[int, ...]] = square

    def scans(self, block: nn.Module) -> bool:
        """Whether a block has a mixer that `signals` can read."""
        try:
            mixer = self.mixer(block)
        except AttributeError:
            return False
        return _has(mixer, self.parts)


# ---------------------------------------------------------------------------------------------------------- class token


def none(model: nn.Module, tokens: int) -> tuple[int, ...]:
    """No class token."""
    return ()


def first(model: nn.Module, tokens: int) -> tuple[int, ...]:
    """A class token at index 0."""
    return (0,)


def middle(model: nn.Module, tokens: int) -> tuple[int, ...]:
    """A class token in the middle of the patches; of an odd number the smaller half stands before it."""
    return ((tokens - 1) // 2,)


def vim_special(model: nn.Module, tokens: int) -> tuple[int, ...]:
    """Where the options of the official Vim class put the class token."""
    vim = _owner(model, "if_cls_token")
    if vim is None:
        raise ValueError(
            f"{type(model).__name__} has no if_cls_token, by which a Vim says where its class token stands; "
            "use dataclasses.replace(adapter, special=...) with adapters.middle, first or none"
        )
    if not vim.if_cls_token:
        return ()
    if getattr(vim, "use_double_cls_token", False):
        return (0, tokens - 1)
    return middle(model, tokens) if getattr(vim, "use_middle_cls_token", False) else first(model, tokens)


def registers(model: nn.Module, tokens: int) -> tuple[int, ...]:
    """The positions that the official Mamba-Reg class keeps."""
    reg = _owner(model, "cls_positions")
    if reg is None:
        raise ValueError(f"{type(model).__name__} has no cls_positions, by which a Mamba-Reg says where registers are")
    return tuple(int(position) for position in reg.cls_positions)


def _owner(model: nn.Module, attribute: str) -> Any:
    """The module inside a model that has an attribute: models come wrapped."""
    return next((module for module in model.modules() if hasattr(module, attribute)), None)


# --------------------------------------------------------------------------------------------------------------- blocks


def block_lists(parts: tuple[str, ...]) -> Callable[[nn.Module], list[list[nn.Module]]]:
    """Every `ModuleList` with a block whose `mixer` has these attributes is a run of blocks."""

    def find(model: nn.Module) -> list[list[nn.Module]]:
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        return [blocks for blocks in lists if any(_has(getattr(block, "mixer", None), parts) for block in blocks)]

    return find


def one_list(model: nn.Module) -> list[list[nn.Module]]:
    """The only list of Mamba-1 blocks in a model; ValueError where there are several."""
    found = block_lists(MAMBA1)(model)
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} lists of Mamba blocks: attach to one at a time")
    return found


def vim_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """Vim's layers; ValueError where an option is on that changes the whole sequence between them."""
    for option in ("if_rope", "if_bidirectional"):
        if getattr(_owner(model, option), option, False):
            raise ValueError(f"a Vim with {option} changes the sequence between its blocks, and attach cannot follow")
    return one_list(model)


def _has(mixer: object, parts: tuple[str, ...]) -> bool:
    return isinstance(mixer, nn.Module) and all(hasattr(mixer, part) for part in parts)


# --------------------------------------------------------------------------------------------------------------- stream


def stream(output: Any) -> Parts:
    """A block that returns the residual stream."""
    if not isinstance(output, Tensor) or output.dim() != 3:
        raise ValueError(f"a block was to return the residual stream (B, L, D), got {_kind(output)}")
    return (output,)


def to_stream(output: Any, parts: Parts) -> Any:
    """The inverse of `stream`."""
    return parts[0]


def two_streams(output: Any) -> Parts:
    """A block that returns (hidden, residual): what its mixer made, and the stream before that was added."""
    pair = tuple(output) if isinstance(output, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) and part.dim() == 3 for part in pair):
        raise ValueError(f"a block was to return (hidden, residual), both (B, L, D), got {_kind(output)}")
    return pair


def to_two_streams(output: Any, parts: Parts) -> Any:
    """The inverse of `two_streams`."""
    return parts


def _kind(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


# Vim and its forks: Block(hidden, residual) -> (hidden, residual)
OFFICIAL_VIM = Adapter("OFFICIAL_VIM", vim_blocks, two_streams, to_two_streams, vim_special)
OFFICIAL_VIDEOMAMBA = Adapter("OFFICIAL_VIDEOMAMBA", one_list, two_streams, to_two_streams, first)
OFFICIAL_MAMBA_REG = Adapter("OFFICIAL_MAMBA_REG", one_list, two_streams, to_two_streams, registers)
# transformers.MambaModel and mambapy.mamba.Mamba, wherever they are inside a model
TRANSFORMERS = Adapter("TRANSFORMERS", one_list, stream, to_stream, none)
MAMBAPY = Adapter("MAMBAPY", one_list, stream, to_stream, none, mambapy_signals)
# stages 3 and 4, whose blocks see one sequence per window; the schedule counts their attention blocks too
MAMBAVISION = Adapter(
    *("MAMBAVISION", block_lists(MAMBAVISION_MIXER), stream, to_stream, none, mambavision_signals),
    parts=MAMBAVISION_MIXER,
)
