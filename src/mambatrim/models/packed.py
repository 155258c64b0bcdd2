"""The blocks of a model packed for inference on this processor, and the recording of what such a model does."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import cpu
from ..kernels.replay import Replay, record
from ..reduction import Layout
from .layers import AT_ONCE, Block, Captured, over, watched
from .trunk import mixers_of, plain, seen_of

MOST_REPLAYS = 4  # of one model
# PyTorch's dispatch modes leave a flag of the process behind that is wrong where two threads enter one at a time
_RECORDING = threading.Lock()


class _Known(NamedTuple):
    """A recording, if there can be one, and what its key names, which lives as long."""

    replay: Replay | None
    parts: list[nn.Module]
    weights: list[Tensor]


class PackedBlock(Block):
    """Stands for a block whose weights are packed with those of the others; knows sizes and cost."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        # no part of the module: there are no weights, and nothing that could be watched
        self.__dict__["mixer"] = copy.deepcopy(block.mixer).to("meta")

    def forward(self, *_: Any) -> Any:
        raise ValueError("packed blocks run with their model only")

    def register_forward_hook(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError."""
        raise ValueError("packed blocks take no hooks: they run as one kernel; watch the model that was packed")

    register_forward_pre_hook = register_forward_hook


class PackedTrunk(nn.ModuleList):
    """The blocks of a model packed for inference on this processor (kernels/packed.py).

    Raises:
        ValueError: a block has hooks or is none of ours, or no kernel takes it.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        if not all(map(plain, blocks)):
            raise ValueError("blocks with hooks, and blocks that were changed or replaced, cannot be packed")
        with torch.no_grad():
            packed, self.packing = kernels.pack(mixers_of(blocks))
        super().__init__(map(PackedBlock, blocks))
        self.register_buffer("packed", packed, persistent=False)
        self._replays: OrderedDict[tuple[Any, ...], _Known] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_replays": OrderedDict()}

    def through(
        self, first: int, end: int, x: Tensor, wanted: Sequence[str], layout: Layout | None
    ) -> tuple[Tensor, Captured]:
        """As `trunk.through`."""
        if torch.compiler.is_exporting():
            raise ValueError("a packed model cannot be exported: export the one that it was made from")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("a packed model has no gradients: take those of the one that it was made from")
        self.offers(wanted)
        packed = cast(Tensor, self.packed)[first:end]
        return seen_of(wanted, *kernels.mix_packed(x, packed, self.packing, over(layout)))

    @staticmethod
    def offers(signals: Sequence[str]) -> None:
        """Raises ValueError where packed blocks do not have all of these."""
        lacking = [name for name in signals if name not in AT_ONCE]
        if lacking:
            raise ValueError(f"packed blocks have no signal {lacking[0]!r}, only {' and '.join(sorted(AT_ONCE))}")

    def replay(self, run: Callable[[Tensor], Tensor], images: Tensor, model: nn.Module) -> Tensor:
        """run(images), a method of the model that these blocks are in: what was recorded the first time, where it is
        all kernels."""
        if not (cpu.direct(images) and images.is_contiguous() and images.numel()) or torch.is_autocast_enabled("cpu"):
            return run(images)
        parts = self._others(model)
        if any(map(watched, parts[1:])):
            return run(images)
        weights = [
            one for part in parts for one in (*part._parameters.values(), *part._buffers.values()) if one is not None
        ]
        key = (
            *(images.shape, images.dtype, torch.get_num_threads(), cpu.level(), torch.is_inference_mode_enabled()),
            *(*map(id, parts), *(one.data_ptr() for one in weights), *map(_version, weights)),
        )
        known = self._replays.get(key)
        if known is not None:
            return run(images) if known.replay is None else known.replay(run, images)
        if not _RECORDING.acquire(blocking=False):
            return run(images)
        try:
            result, replay = record(run, images, [*weights, cast(Tensor, self.packed)])
        finally:
            _RECORDING.release()
        while len(self._replays) >= MOST_REPLAYS:
            self._replays.popitem(last=False)
        self._replays[key] = _Known(replay, parts, [one.detach() for one in weights])
        return result

    def _others(self, model: nn.Module) -> list[nn.Module]:
        """The model and its parts, but these blocks."""
        found = [model]
        for part in found:
            found += [one for one in part._modules.values() if one is not None and one is not self]
        return found

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ValueError("a packed model has no weights to save: save the one that it was made from")

    def _load_from_state_dict(self, *_: Any) -> None:
        raise ValueError("a packed model takes no weights: load them before it is packed")


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
