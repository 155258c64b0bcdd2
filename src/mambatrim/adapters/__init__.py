"""Token reduction inside other people's models: `attach`, and the adapters that say how a model is read.

Between the first and the last block of a run tokens are removed; what leaves its last block has all L0 of them again,
in their places, so that whatever comes after it stays right: a class token at a fixed index, registers, a mean, a
reshape to the grid. A merged token gives its row to every place that it stands for; a pruned one returns with the row
that it had when it left. So a mean over all tokens is one over original tokens after merging, and counts stale rows
after pruning.

A model that `mambatrim.convert` takes is better converted: it then compiles and exports, and has no hooks.
"""

from .hooks import Handle, attach
from .records import (
    MAMBAPY,
    MAMBAVISION,
    OFFICIAL_MAMBA_REG,
    OFFICIAL_VIDEOMAMBA,
    OFFICIAL_VIM,
    TRANSFORMERS,
    Adapter,
    block_lists,
    first,
    middle,
    none,
    one_list,
    square,
    stream,
    to_stream,
    to_two_streams,
    two_streams,
)
from .signals import mamba1_signals

__all__ = [
    "MAMBAPY",
    "MAMBAVISION",
    "OFFICIAL_MAMBA_REG",
    "OFFICIAL_VIDEOMAMBA",
    "OFFICIAL_VIM",
    "TRANSFORMERS",
    "Adapter",
    "Handle",
    "attach",
    "block_lists",
    "first",
    "mamba1_signals",
    "middle",
    "none",
    "one_list",
    "square",
    "stream",
    "to_stream",
    "to_two_streams",
    "two_streams",
]
