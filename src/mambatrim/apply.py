"""reduce: the same model with another reducer."""

import copy
from typing import TypeVar, cast

from torch import nn

from . import methods
from .flops import ImageSize, Trunk, solve
from .reduction import Method, Reducer, Schedule

Model = TypeVar("Model", bound=nn.Module)


def reduce(
    model: Model,
    flops_reduction: float | None = None,
    schedule: Schedule | None = None,
    method: str | Method = "mtr",
    image_size: ImageSize = None,
) -> Model:
    """Return a copy of the model that removes tokens; the model itself stays as it is.

    The copy is shallow and shares the weights: `.to()` and optimiser steps on one act on both. Who wants independence
    says `copy.deepcopy(reduce(...))`. Call it before `torch.compile`.

    Args:
        model: a model of the zoo.
        flops_reduction: share of the FLOPs to save, from 0 up to below 0.9, in the default stages; or
        schedule: after which block how many patches go. Exactly one of the two.
        method: a name of `methods.METHODS`, or a Method with options, such as `methods.mtr(feature="update")`.
        image_size: input size that the saving is meant for; the model's own by default.
    """
    why = getattr(model, "why_dense", None)
    if why is not None:
        raise ValueError(f"tokens cannot be removed from {type(model).__name__}: {why}")
    if not isinstance(getattr(model, "reducer", None), Reducer) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"reduce takes a model with a reducer, before torch.compile; {type(model).__name__} has none to replace"
        )
    if (flops_reduction is None) == (schedule is None):
        raise ValueError("give exactly one of flops_reduction and schedule")
    chosen = methods.get(method) if isinstance(method, str) else method
    if not isinstance(chosen, Method):
        raise ValueError(f"method must be a name or a Method, got {chosen!r}; a factory has to be called first")
    trunk = cast(Trunk, model)
    if flops_reduction is not None:
        schedule = solve(trunk, flops_reduction, image_size=image_size, method=chosen)
    if not isinstance(schedule, Schedule) or schedule.depth != trunk.depth:
        raise ValueError(f"schedule must be a Schedule for the {trunk.depth} blocks of the model, got {schedule!r}")
    special = trunk.special_tokens(image_size)
    tokens = trunk.num_patches(image_size) + len(special)
    reducer = Reducer(chosen, schedule, special, tokens)
    reducer.lengths(tokens)  # says now, not in the forward, where a step removes too many
    return with_reducer(model, reducer.train(model.training))


def with_reducer(model: Model, reducer: nn.Module) -> Model:
    """A shallow copy of the model that shares the weights and has another reducer."""
    other = copy.copy(model)
    # modules keep their children in a dict, which a shallow copy shares; the weights stay in theirs, shared
    other._modules = {**model._modules, "reducer": reducer}
    return other
