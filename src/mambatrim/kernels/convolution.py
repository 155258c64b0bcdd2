"""The depthwise causal convolution, in one direction or several, with SiLU: what callers use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import conv_operator, cpu
from . import virtual as virtual_sequence
from .library import MAX_DIRECTIONS, cast, wide
from .virtual import Virtual

MAX_TAPS = 8


def causal_conv1d(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    reverse: Sequence[bool] = (False,),
    silu: bool = True,
    virtual: Virtual | None = None,
) -> Tensor:
    """Depthwise causal convolutions of the same x in S directions, then SiLU: x (B, L, E), S weights (E, K) -> (S, B,
    L, E).

    A reversed direction sees each token and the K - 1 tokens behind it. K is at most 8. Over a virtual sequence every
    row gets the mean of what its positions would.

    Raises:
        ValueError: a shape does not fit; the sentence names the argument.
    """
    if x.dim() != 3 or any(w.dim() != 2 or w.shape[0] != x.shape[2] for w in weight):
        shapes = [tuple(w.shape) for w in weight]
        raise ValueError(f"x must be (B, L, E) and every weight (E, K), got {tuple(x.shape)} and {shapes}")
    if not 1 <= len(weight) <= MAX_DIRECTIONS or len(reverse) != len(weight) or len(bias) not in (0, len(weight)):
        raise ValueError(f"give 1 to {MAX_DIRECTIONS} weights and as many biases (or none) and directions as weights")
    if not 1 <= weight[0].shape[1] <= MAX_TAPS or any(w.shape != weight[0].shape for w in weight):
        raise ValueError(f"all weights must have the same 1 to {MAX_TAPS} taps, got {[w.shape[1] for w in weight]}")
    exact = wide(x)
    taps, offsets = [cast(w, exact) for w in weight], [cast(b, exact) for b in bias]
    if virtual is None:
        run = conv_operator.conv_cpu if cpu.direct(x, *weight, *bias) else torch.ops.mambatrim.causal_conv1d
        return run(x, taps, offsets, list(reverse), silu)
    virtual_sequence.check(virtual, *x.shape[:2])
    return virtual_sequence.conv1d(x, taps, offsets, list(reverse), silu, virtual)
