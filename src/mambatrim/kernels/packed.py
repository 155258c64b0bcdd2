"""Mixers packed for inference on this processor: `mambatrim::packed_mixers`.

`mix` finds and packs every weight in every call, because weights may change between two calls; at one image of a narrow
model that is an eighth of the time. Packed mixers have no other weights than those that are packed, so that nothing can
be out of date: one piece of memory, in the order in which the kernel reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, mixer
from .library import MAX_DIRECTIONS, register

ALIGNMENT = 64  # bytes


class Packing(NamedTuple):
    """What one has to know to read packed mixers."""

    columns: int
    sizes: mixer.Sizes
    reverse: tuple[bool, ...]
    eps: float
    scale: float
    level: str  # the instruction set


def pack(mixers: Sequence[mixer.Mixer]) -> tuple[Tensor, Packing]:
    """(mixers, bytes) uint8, and how they are packed.

    Raises:
        ValueError: the compiled kernel does not take them.
    """
    weights, first = mixer.weights_of(mixers), mixers[0]
    columns = first.in_proj.shape[1]
    if not cpu.compiled():
        raise ValueError(f"nothing can be packed: {cpu.missing()}")
    if not all(one.device.type == "cpu" for one in weights):
        raise ValueError(f"only models on a CPU can be packed, and this one is on {first.in_proj.device}")
    if not mixer.alike(mixers) or not mixer.takes_weights(mixers, weights, columns):
        raise ValueError(
            "only blocks of one shape can be packed, in fp32, or in bf16 where the processor multiplies it and has no "
            f"AMX; got {first.in_proj.dtype}"
        )
    packing = Packing(columns, mixer.sizes_of(first), tuple(first.reverse), first.eps, first.scale, cpu.level())
    step = len(weights) // len(mixers)
    pointers = [one.data_ptr() for one in weights]
    nothing = torch.empty(0, 0, columns)
    parts = [
        _record(packing, nothing, mixer.NOWHERE[:3], mixer.NOWHERE, pointers[k : k + step])
        for k in range(0, len(pointers), step)
    ]
    size = ALIGNMENT * cpu.ask("packed_size", mixer.COUNT(1, cpu.UNPACKED, 0) + parts[0])
    packed = torch.zeros(len(mixers), size, dtype=torch.uint8)
    cpu.call("pack_mixers", mixer.COUNT(len(mixers), packed.data_ptr(), 0) + b"".join(parts))
    return packed, packing


def mix_packed(
    x: Tensor, packed: Tensor, packing: Packing, over: mixer.Over = mixer.AS_IT_STANDS
) -> tuple[Tensor, Tensor]:
    """The same as `mix`, of mixers that are packed. No gradients.

    Raises:
        ValueError: x is not (B, L, D) fp32 on a CPU, or they were packed for another instruction set.
    """
    if cpu.direct(x, packed, *mixer.tensors_of(over)):
        return _compiled(x, packed, packing, over)
    columns, sizes, *options = packing
    return torch.ops.mambatrim.packed_mixers(x, packed, columns, list(sizes), *options, *mixer.parts_of(over))


def _compiled(x: Tensor, packed: Tensor, packing: Packing, over: mixer.Over) -> tuple[Tensor, Tensor]:
    sizes = packing.sizes
    if not mixer.takes_stream(x, over) or x.shape[2] != packing.columns:
        raise ValueError(f"packed blocks take x (B, L, {packing.columns}) in fp32, got {tuple(x.shape)} in {x.dtype}")
    if packing.level != cpu.level():
        raise ValueError(
            f"the blocks were packed for {packing.level}, and {cpu.level()} is in use; pack the model anew"
        )
    if packed.data_ptr() % ALIGNMENT:
        packed = packed.clone()
    x, count = x.contiguous(), len(packed)
    y, spare, dt_mean = mixer.outputs(x, count, sizes)
    over, place = mixer.placed(over, x)
    if y.numel():
        streams = (x.data_ptr(), y.data_ptr(), dt_mean.data_ptr())
        head = mixer.COUNT(count, packed.data_ptr(), spare.data_ptr())
        cpu.call("mixers", head + _record(packing, x, streams, place))
    return y, dt_mean


def _record(
    packing: Packing, x: Tensor, streams: Sequence[int], place: Sequence[int], addresses: Sequence[int] = ()
) -> bytes:
    unused, lacking = MAX_DIRECTIONS - packing.sizes.directions, 3 + mixer.FIELDS * MAX_DIRECTIONS - len(addresses)
    options = (*packing.reverse, *(0,) * unused, packing.eps, packing.scale)
    return mixer.RECORD(
        *mixer.head_of(x, packing.sizes), *streams, *place, *options, *addresses, *(0,) * lacking, cpu.UNPACKED
    )


def _operator(
    x: Tensor,
    packed: Tensor,
    columns: int,
    sizes: list[int],
    reverse: list[bool],
    eps: float,
    scale: float,
    level: str,
    *parts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    packing = Packing(columns, mixer.Sizes(*sizes), tuple(reverse), eps, scale, level)
    return _compiled(x, packed, packing, mixer.over_of(*parts))


def _fake(x: Tensor, packed: Tensor, columns: int, sizes: Any, reverse: list[bool], *_: Any) -> tuple[Tensor, Tensor]:
    return mixer.fake_mixed(x, len(reverse))


register(
    "packed_mixers",
    "(Tensor x, Tensor packed, int columns, int[] sizes, bool[] reverse, float eps, float scale, str level, "
    "Tensor? repeats, Tensor? convolved, Tensor? scanned, Tensor? share) -> (Tensor y, Tensor dt_mean)",
    *(_operator, None, _fake),
)


@register_flop_formula(torch.ops.mambatrim.packed_mixers)
def _flops(x: Any, packed: Any, columns: int, sizes: list[int], *rest: Any, out_shape: Any = None) -> int:
    """Two for a multiply-add, as the counter of torch has it."""
    return 2 * packed[0] * mixer.mixer_macs(x, mixer.Sizes(*sizes), *rest[-4:])
