"""The same model in another way: `reduce`, with fewer tokens; `pack`, for inference on this processor."""

import copy
from typing import TypeVar, cast

from torch import nn

from . import flops, methods
from .flops import ImageSize, Pyramid, refuse_stem, sections, solve
from .models.flat import FlatMamba
from .models.packed import PackedTrunk
from .models.trunk import Trunk
from .reduction import AS_IT_STANDS, SIGNALS, Method, Reducer, Schedule, Section

Model = TypeVar("Model", bound=nn.Module)


def reduce(
    model: Model,
    flops_reduction: float | None = None,
    schedule: Schedule | None = None,
    method: str | Method | None = None,
    image_size: ImageSize = None,
) -> Model:
    """Return a copy of the model that removes tokens; the model itself stays as it is.

    The copy is shallow and shares the weights: `.to()` and optimiser steps on one act on both. Who wants independence
    says `copy.deepcopy(reduce(...))`. Call it before `torch.compile`.

    Args:
        model: a model of the zoo.
        flops_reduction: share of the FLOPs to save, from 0 up to below 0.9, in the default stages; or
        schedule: after which block how many patches go. Exactly one of the two. In a pyramid blocks are counted over
            all stages that have scans, patches are those of a stage (of each of its windows, where there are some), and
            behind a stage all places have a token again.
        method: a name of `methods.METHODS`, or a Method with options, such as `methods.mtr(feature="update")`. By
            default "vsm" where the model's blocks can keep the clock of the recurrence running (Vim, VideoMamba,
            Mamba-Reg), which loses least (docs/beyond.md), and "mtr" elsewhere.
        image_size: input size that the saving is meant for; the model's own by default.
    """
    if not isinstance(getattr(model, "reducer", None), Reducer) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"reduce takes a model with a reducer, before torch.compile; {type(model).__name__} has none to replace"
        )
    if (flops_reduction is None) == (schedule is None):
        raise ValueError("give exactly one of flops_reduction and schedule")
    takes_layout = getattr(model, "takes_layout", False)
    if method is None:
        method = "vsm" if takes_layout else "mtr"
    chosen = methods.get(method) if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise ValueError(f"method must be a name or a Method, got {chosen!r}; a factory has to be called first")
    if chosen.sequence is not AS_IT_STANDS and not takes_layout:
        raise ValueError(
            f"the blocks of {type(model).__name__} take a reduced sequence only as it stands, and method "
            f"{chosen.name!r} wants {chosen.sequence.name!r}; choose another method, or sequence=AS_IT_STANDS"
        )
    if isinstance(getattr(model, "layers", None), PackedTrunk):
        PackedTrunk.offers(_of_blocks(chosen))
    trunk = cast(flops.Trunk | Pyramid, model)
    if flops_reduction is not None:
        schedule = solve(trunk, flops_reduction, image_size=image_size, method=chosen)
    parts = sections(trunk, image_size)
    depth = sum(part.depth for part in parts)
    if not isinstance(schedule, Schedule) or schedule.depth != depth:
        raise ValueError(f"schedule must be a Schedule for the {depth} blocks of the model, got {schedule!r}")
    if schedule.stem:
        refuse_stem(model)
        lacking = [name for name in _of_blocks(chosen) if name != "hidden"]
        if lacking:
            raise ValueError(
                f"patches cannot go before block 0 with method {chosen.name!r}: it needs {lacking[0]!r} of a block, "
                "and none has run"
            )
    reducer = _reducer(chosen, schedule, parts, trunk.special_tokens(image_size))
    return with_reducer(model, reducer.train(model.training))


def pack(model: Model) -> Model:
    """Return a copy of the model for inference on this processor, its blocks packed: at one image Vim-T takes about a
    tenth less time with all tokens and a fifth less at -40 % (docs/benchmarks.md).

    The copy does not follow the model: its weights are those of now, those of the blocks in a form of their own that
    cannot be trained or saved, and blocks have no signals but "dt_mean" and "hidden". `reduce` takes it as it takes the
    model. Where all that a forward does is kernels, as it is with the methods "mtr" and "vsm", it is recorded once for
    every shape of images and then run again without Python between them.

    Args:
        model: Vim, VideoMamba or Mamba-Reg, on a CPU, in fp32, or in bf16 where the processor multiplies it and has no
            AMX.

    Raises:
        ValueError: it is none of these, has blocks that were changed or have hooks, or is compiled; or the compiled
            kernels are missing.
    """
    layers = getattr(model, "layers", None)
    if isinstance(layers, PackedTrunk):
        return model
    if not isinstance(model, FlatMamba) or not isinstance(layers, Trunk):
        raise ValueError(f"pack takes Vim, VideoMamba or Mamba-Reg, before torch.compile; got {type(model).__name__}")
    PackedTrunk.offers(_of_blocks(model.reducer.method))
    packed = PackedTrunk(model.blocks())
    # the weights of the blocks are not copied once more
    others = copy.deepcopy(_with(model, layers=nn.ModuleList())).requires_grad_(False)
    return _with(others, layers=packed)


def _reducer(method: Method, schedule: Schedule, parts: tuple[Section, ...], special: tuple[int, ...]) -> Reducer:
    """The reducer; says now, not in the forward, where a step cannot be done."""
    first = 0
    of_a_scan = [name for name in method.needs if SIGNALS.get(name) == 2]
    for part in parts:
        tokens = part.patches + part.special
        Reducer(method, schedule.only(first, part.depth), special, tokens).lengths(tokens)
        asked = [first + block for block in part.without_scan if of_a_scan and schedule.at(first + block)]
        if asked:
            raise ValueError(
                f"tokens cannot go after block {asked[0]} with method {method.name!r}: it needs {of_a_scan[0]!r} of a "
                "scan, and the block has attention"
            )
        first += part.depth
    # a class token stands elsewhere in sequences of another length; pyramids have none
    return Reducer(method, schedule, special, tokens if len(parts) == 1 else None)


def with_reducer(model: Model, reducer: nn.Module) -> Model:
    """A shallow copy of the model that shares the weights and has another reducer."""
    return _with(model, reducer=reducer)


def _of_blocks(method: Method) -> list[str]:
    """The signals of blocks that a method needs."""
    return [name for name in method.needs if name in SIGNALS]


def _with(model: Model, **parts: nn.Module) -> Model:
    """A shallow copy that has some other parts."""
    other = copy.copy(model)
    # modules keep their children in a dict, which a shallow copy shares; the weights stay in theirs, shared
    other._modules = {**model._modules, **parts}
    return other
