"""Mamba mixers, each with the norm before it and the residual around it, one after another: `mambatrim::mixers`.

    x + out_proj(scale (sum of the scans) silu(z)),   (h, z) = in_proj(norm(x)),   each scan over conv(h) of its own

`compose` is the definition, of the operators in the other files. For inference on a CPU one compiled kernel makes all
of it, for all blocks up to the next reduction: at one image PyTorch's own part in a dozen calls is a third of a narrow
block, and what one step makes is still in the cache when the next one reads it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from . import virtual as virtual_sequence
from .convolution import MAX_TAPS, causal_conv1d
from .library import MAX_DIRECTIONS, cast, register
from .linear import linear
from .norm import rms_norm
from .projection import project
from .scan import MAX_STATES, Direction, scan
from .scan_operator import scan_macs
from .virtual import Virtual

# of csrc/abi.h: one mixer, and what stands before them
RECORD, COUNT = struct.Struct(cpu.MIXER).pack, struct.Struct(cpu.MIXERS).pack


class MixerDirection(NamedTuple):
    """Parameters of one direction, as checkpoints have them."""

    conv: Tensor  # (E, 1, K)
    conv_bias: Tensor  # (E)
    x_proj: Tensor  # (R + 2 N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E)
    A_log: Tensor  # (E, N): log(-A)
    D: Tensor  # (E)


FIELDS = len(MixerDirection._fields)


class Mixer(NamedTuple):
    """Parameters of a mixer and of the norm before it."""

    norm: Tensor | None  # (D); None where x comes normed
    in_proj: Tensor  # (2 E, D)
    out_proj: Tensor  # (D, E)
    lines: list[Tensor]  # of S <= 4 directions, each the fields of a MixerDirection
    reverse: Sequence[bool]  # of each: from the last token to the first
    eps: float  # of the norm
    scale: float  # factor on the sum of the directions


class Over(NamedTuple):
    """The sequence that a mixer runs over, where that is not its L rows as they stand."""

    repeats: Tensor | None = None  # (B, L): factor on the time step
    convolved: Virtual | None = None
    scanned: Virtual | None = None


class Steps(NamedTuple):
    """What a mixer makes on its way."""

    u: Tensor  # (S, B, L, E): inputs of the scans
    directions: list[Direction]
    z: Tensor  # (B, L, E): the gate
    dt_mean: Tensor  # (B, S, L)
    update: Tensor  # (B, L, D): what is added to x


AS_IT_STANDS = Over()


def compose(x: Tensor, mixer: Mixer, over: Over = AS_IT_STANDS) -> Steps:
    """The steps of a mixer on x (B, L, D), differentiable."""
    lines = [MixerDirection(*mixer.lines[k : k + FIELDS]) for k in range(0, len(mixer.lines), FIELDS)]
    rows = x if mixer.norm is None else rms_norm(x, mixer.norm, mixer.eps, mixer.in_proj.dtype)
    projected = linear(rows, mixer.in_proj)
    hidden, z = projected.chunk(2, dim=-1)  # (B, L, E) each
    taps, biases = [line.conv.squeeze(1) for line in lines], [line.conv_bias for line in lines]
    u = causal_conv1d(hidden, taps, biases, mixer.reverse, virtual=over.convolved)  # (S, B, L, E)
    narrow = project(u, [line.x_proj for line in lines])  # S times (B, L, R + 2 N)
    rank, states = lines[0].dt_proj.shape[1], lines[0].A_log.shape[1]
    directions = []
    for line, made, reverse in zip(lines, narrow, mixer.reverse, strict=True):
        dt, B, C = made.split([rank, states, states], dim=-1)
        directions.append(Direction(dt, line.A_log, B, C, line.D, line.dt_bias, line.dt_proj, reverse))
    found = scan(u, directions, z, over.repeats, scale=mixer.scale, virtual=over.scanned, log_A=True)
    return Steps(u, directions, z, found.dt_mean, linear(found.y, mixer.out_proj))


def mix(x: Tensor, mixers: Sequence[Mixer], over: Over = AS_IT_STANDS) -> tuple[Tensor, Tensor]:
    """x <- x + mixer(norm(x)) for every mixer in turn, x (B, L, D) fp32.

    Returns:
        x (B, L, D), and the time step's mean over channels (B, S, L) of the last mixer.
    """
    weights = weights_of(mixers)
    if cpu.direct(x, *weights, *tensors_of(over)):
        if _takes(x, mixers, weights, over):
            return _compiled(x, mixers, weights, over)
    elif cpu.compiling(x, *weights, *tensors_of(over)) and alike(mixers) and not torch.is_autocast_enabled("cpu"):
        return torch.ops.mambatrim.mixers(x, *_flat(mixers, over))
    return _composed(x, mixers, over)


def _composed(x: Tensor, mixers: Sequence[Mixer], over: Over) -> tuple[Tensor, Tensor]:
    for mixer in mixers:
        steps = compose(x, mixer, over)
        x, dt_mean = x + steps.update, steps.dt_mean
    return x, dt_mean


def alike(mixers: Sequence[Mixer]) -> bool:
    """Whether they have one set of options, as one call of the operator has."""
    return all(mixer[4:] == mixers[0][4:] for mixer in mixers)


def weights_of(mixers: Sequence[Mixer]) -> list[Tensor]:
    """All parameters of all mixers, in the order of the record."""
    found: list[Tensor] = []
    for norm, in_proj, out_proj, lines, *_ in mixers:
        found += (in_proj, out_proj, *lines) if norm is None else (norm, in_proj, out_proj, *lines)
    return found


def tensors_of(over: Over) -> list[Tensor]:
    found = [] if over.repeats is None else [over.repeats]
    for virtual in over[1:]:
        found += virtual or ()
    return found


def _takes(x: Tensor, mixers: Sequence[Mixer], weights: list[Tensor], over: Over) -> bool:
    """Whether the compiled kernel takes these. The composition says what does not fit."""
    if torch.is_autocast_enabled("cpu") or not takes_stream(x, over):
        return False
    return takes_weights(mixers, weights, x.shape[2])


def takes_stream(x: Tensor, over: Over) -> bool:
    """Whether the compiled kernel takes such a stream over such a sequence."""
    if x.dtype is not torch.float32 or x.dim() != 3:
        return False
    repeats, convolved, scanned = over
    if repeats is not None and repeats.shape != x.shape[:2]:
        return False
    return convolved is None or scanned is None or convolved.share is scanned.share


def takes_weights(mixers: Sequence[Mixer], weights: list[Tensor], columns: int) -> bool:
    """Whether the compiled kernel takes such parameters for a stream of so many columns: fp32, or bf16 where it is the
    one to multiply that; contiguous, and of shapes that fit."""
    _, in_proj, _, lines, reverse, *_ = mixers[0]
    line = MixerDirection(*lines[:FIELDS])
    if (line.conv.dim(), line.dt_proj.dim(), line.A_log.dim()) != (3, 2, 2):
        return False
    (channels, states), (_, rank), taps = line.A_log.shape, line.dt_proj.shape, line.conv.shape[2]
    directions, kind, fp32 = len(reverse), in_proj.dtype, torch.float32
    if directions > MAX_DIRECTIONS or taps > MAX_TAPS or states > MAX_STATES:
        return False
    even = columns % 2 == channels % 2 == 0
    if kind is not fp32 and not (kind is torch.bfloat16 and even and cpu.multiplies_bf16()):
        return False
    wide, row, count = (channels, states), (channels,), len(mixers)
    shapes = [(channels, 1, taps), row, (rank + 2 * states, channels), (channels, rank), row, wide, row] * directions
    shapes = [(columns,), (2 * channels, columns), (columns, channels), *shapes] * count
    kinds = [fp32, kind, kind, *[fp32, fp32, kind, kind, fp32, fp32, fp32] * directions] * count
    fits = [one.shape for one in weights] == shapes and [one.dtype for one in weights] == kinds
    return fits and all(map(Tensor.is_contiguous, weights))


def _compiled(x: Tensor, mixers: Sequence[Mixer], weights: list[Tensor], over: Over) -> tuple[Tensor, Tensor]:
    x, last, sizes = x.contiguous(), len(mixers) - 1, sizes_of(mixers[0])
    y, spare, dt_mean = outputs(x, last + 1, sizes)
    over, place = placed(over, x)
    if not y.numel():
        return y, dt_mean
    head, unused, step = head_of(x, sizes), (0,) * (MAX_DIRECTIONS - sizes.directions), 3 + FIELDS * sizes.directions
    records, source = [COUNT(len(mixers), cpu.UNPACKED, 0)], x.data_ptr()
    pointers, ends = [one.data_ptr() for one in weights], (y.data_ptr(), spare.data_ptr())
    for i, (_, _, _, _, reverse, eps, scale) in enumerate(mixers):
        target = ends[(last - i) % 2]  # by turns, so that the last one writes y
        means = dt_mean.data_ptr() if i == last else 0
        options = (*place, *reverse, *unused, eps, scale)
        rest = pointers[i * step : i * step + step]
        records.append(RECORD(*head, source, target, means, *options, *rest, *unused * FIELDS, cpu.UNPACKED))
        source = target
    cpu.call("mixers", b"".join(records))
    return y, dt_mean


class Sizes(NamedTuple):
    """Of a mixer."""

    channels: int
    states: int
    rank: int
    taps: int
    directions: int
    bfloat16: int  # 1: the projections are bf16


def sizes_of(mixer: Mixer) -> Sizes:
    line = MixerDirection(*mixer.lines[:FIELDS])
    (channels, states), rank, taps = line.A_log.shape, line.dt_proj.shape[1], line.conv.shape[2]
    return Sizes(channels, states, rank, taps, len(mixer.reverse), int(mixer.in_proj.dtype is torch.bfloat16))


def outputs(x: Tensor, count: int, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `count` mixers make of x, for what lies between two of them, and for the means of the steps."""
    y, dt_mean = torch.empty_like(x), x.new_empty((x.shape[0], sizes.directions, x.shape[1]))
    return y, torch.empty_like(x) if count > 1 else y, dt_mean


def head_of(x: Tensor, sizes: Sizes) -> tuple[int, ...]:
    """The first fields of a RECORD."""
    return (*x.shape, *sizes, torch.get_num_threads())


# the addresses of AS_IT_STANDS
NOWHERE = (0,) * 6


def placed(over: Over, x: Tensor) -> tuple[Over, tuple[int, ...]]:
    """The same as the kernel reads it, for as long as it runs, and its addresses."""
    if over is AS_IT_STANDS:
        return over, NOWHERE
    over = _ready(over, *x.shape[:2])
    return over, _place(over)


def _ready(over: Over, batch: int, length: int) -> Over:
    """The same as the kernel reads it: contiguous, fp32, one share."""
    repeats, *virtual = over
    for one in virtual:
        if one is not None:
            virtual_sequence.check(one, batch, length)
    share = _share(over)
    share = share if share is None else cast(share, torch.float32).contiguous()
    convolved, scanned = (
        None if one is None or share is None else Virtual(one.source.contiguous(), share) for one in virtual
    )
    return Over(None if repeats is None else cast(repeats, torch.float32).contiguous(), convolved, scanned)


def _place(over: Over) -> tuple[int, ...]:
    repeats, convolved, scanned = over
    return (cpu.pointer(repeats), *_source(convolved), *_source(scanned), cpu.pointer(_share(over)))


def _share(over: Over) -> Tensor | None:
    """Of the virtual sequences, which have one between them."""
    return next((one.share for one in over[1:] if isinstance(one, Virtual)), None)


def _source(virtual: Virtual | None) -> tuple[int, int]:
    return (0, 0) if virtual is None else (virtual.source.shape[1], virtual.source.data_ptr())


# ------------------------------------------------------------------------------------------------------- the operator


def parts_of(over: Over) -> tuple[Tensor | None, ...]:
    """The last arguments of an operator: repeats, sources of the virtual sequences, their share."""
    repeats, convolved, scanned = over
    sources = (None if one is None else one.source for one in (convolved, scanned))
    return (repeats, *sources, _share(over))


def over_of(repeats: Tensor | None, convolved: Tensor | None, scanned: Tensor | None, share: Tensor | None) -> Over:
    """The inverse of `parts_of`."""
    if repeats is None and share is None:
        return AS_IT_STANDS
    virtual = (None if source is None or share is None else Virtual(source, share) for source in (convolved, scanned))
    return Over(repeats, *virtual)


def _flat(mixers: Sequence[Mixer], over: Over) -> tuple[object, ...]:
    """The arguments of the operator behind x."""
    norms, in_projs, out_projs, lines, *_ = zip(*mixers, strict=True)
    flat = [one for some in lines for one in some]
    options = (list(mixers[0].reverse), mixers[0].eps, mixers[0].scale)
    return (list(norms), list(in_projs), list(out_projs), flat, *options, *parts_of(over))


def _operator(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    return mix_within(x, *_unflat(*flat))


def mix_within(x: Tensor, mixers: Sequence[Mixer], over: Over = AS_IT_STANDS) -> tuple[Tensor, Tensor]:
    """The same as `mix` for operators: PyTorch has seen the call, and records and transforms nothing any more."""
    weights = weights_of(mixers)
    if x.is_cpu and cpu.handles(x) and _takes(x, mixers, weights, over):
        return _compiled(x, mixers, weights, over)
    y, dt_mean = _composed(x, mixers, over)
    return y, cast(dt_mean, x.dtype)


def _unflat(
    norms: list[Tensor],
    in_projs: list[Tensor],
    out_projs: list[Tensor],
    lines: list[Tensor],
    reverse: list[bool],
    eps: float,
    scale: float,
    *parts: Tensor | None,
) -> tuple[list[Mixer], Over]:
    fields = FIELDS * len(reverse)
    mixers = [
        Mixer(*weights, lines[i * fields : (i + 1) * fields], reverse, eps, scale)
        for i, weights in enumerate(zip(norms, in_projs, out_projs, strict=True))
    ]
    return mixers, over_of(*parts)


def _fake(x: Tensor, norms: Any, in_projs: Any, out_projs: Any, lines: Any, reverse: list[bool], *_: Any) -> Any:
    return fake_mixed(x, len(reverse))


def fake_mixed(x: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of what `mix` returns."""
    return x.new_empty(x.shape), x.new_empty(x.shape[0], directions, x.shape[1])


register(
    "mixers",
    "(Tensor x, Tensor[] norms, Tensor[] in_projs, Tensor[] out_projs, Tensor[] lines, bool[] reverse, float eps, "
    "float scale, Tensor? repeats, Tensor? convolved, Tensor? scanned, Tensor? share) -> (Tensor y, Tensor dt_mean)",
    *(_operator, _operator, _fake),
)


@register_flop_formula(torch.ops.mambatrim.mixers)
def _flops(x: Any, norms: Any, in_projs: Any, out_projs: Any, lines: Any, *rest: Any, out_shape: Any = None) -> int:
    """Two for a multiply-add, as the counter of torch has it: those of the operators that it stands for."""
    directions = len(lines) // FIELDS // len(in_projs)
    (channels, _one, taps), _bias, _x_proj, (_channels, rank), _steps, (_again, states), _d = lines[:FIELDS]
    return 2 * len(in_projs) * mixer_macs(x, Sizes(channels, states, rank, taps, directions, 0), *rest[-4:])


def mixer_macs(x: Any, sizes: Sizes, repeats: Any, convolved: Any, scanned: Any, share: Any) -> int:
    """Of one mixer on x (B, L, D), given shapes."""
    batch, length, columns = x
    channels, states, rank, taps, directions, _ = sizes
    line = length * (rank + 2 * states) * channels
    line += length * channels * taps if convolved is None else virtual_sequence.conv_macs(convolved[1], channels, taps)
    line += scan_macs(length, channels, states, rank, None if scanned is None else scanned[1])
    return batch * (3 * length * columns * channels + directions * line)
