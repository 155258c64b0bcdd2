"""The stem as one compiled kernel, `mambatrim::embed`: patches times a weight, special tokens between them, positions
added to all.

The definition is in models/layers.py; callers ask `takes` first. In fp32 the results are the same to the bit; in bf16
nothing is rounded between the products and the stream.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .library import register
from .linear import MOST_ROWS

_RECORD = struct.Struct(cpu.EMBED).pack


def takes(images: Tensor, weight: Tensor, bias: Tensor, special: Tensor, positions: Tensor) -> bool:
    """Whether the compiled kernel embeds these: on a CPU, in fp32, or in bf16 where it is the one to multiply that; few
    enough that a library has no advantage."""
    weights = (weight, bias, special, positions)
    if not (cpu.direct(images, *weights) or (cpu.compiling(images, *weights) and cpu.compiled())):
        return False
    kind, length, rows = weight.dtype, positions.shape[1], special.shape[1]
    if kind is torch.bfloat16 and (weight[0].numel() % 2 or not cpu.multiplies_bf16()):
        return False
    shapes = positions.shape == (1, length, len(weight)) and special.shape == (1, rows, len(weight))
    plain = (
        kind in (torch.float32, torch.bfloat16)
        and all(one.dtype is kind and one.is_contiguous() for one in weights)
        and images.dtype is torch.float32
    )
    return plain and shapes and not torch.is_autocast_enabled("cpu") and 0 < len(images) * length <= MOST_ROWS


def embed(
    images: Tensor, weight: Tensor, bias: Tensor, special: Tensor, at: Sequence[int], positions: Tensor
) -> Tensor:
    """(B, L0, D) fp32.

    Args:
        images: (B, C, H, W) or (B, C, T, H, W), cut into patches from the first corner on.
        weight: (D, C, ...) of a convolution whose stride is its patch; bias: (D).
        special: (1, n, D), at the ascending places `at` of the L0.
        positions: (1, L0, D).
    """
    run = torch.ops.mambatrim.embed if torch.compiler.is_compiling() else _compiled
    return run(images, weight, bias, special, at, positions)


def _compiled(
    images: Tensor, weight: Tensor, bias: Tensor, special: Tensor, at: Sequence[int], positions: Tensor
) -> Tensor:
    images = images.contiguous()
    *_, height, width = images.shape
    *frames, patch_height, patch_width = weight.shape[2:]
    length, columns = positions.shape[1:]
    y = images.new_empty((len(images), length, columns))
    record = _RECORD(
        *(len(images), images.shape[1], images.shape[2] if frames else 1, height, width),
        *(frames[0] if frames else 1, patch_height, patch_width),
        *(length, columns, len(at), weight.dtype is torch.bfloat16, torch.get_num_threads()),
        *(one.data_ptr() for one in (images, weight, bias, special, positions, y)),
    )
    cpu.call("embed", record + struct.pack(f"<{len(at)}q", *at))
    return y


def _fake(images: Tensor, weight: Tensor, bias: Tensor, special: Tensor, at: Any, positions: Tensor) -> Tensor:
    return images.new_empty((images.shape[0], *positions.shape[1:]))


register(
    "embed",
    "(Tensor images, Tensor weight, Tensor bias, Tensor special, int[] at, Tensor positions) -> Tensor",
    *(_compiled, None, _fake),
)


@register_flop_formula(torch.ops.mambatrim.embed)
def _flops(images: Any, weight: Any, bias: Any, special: Any, at: Any, positions: Any, out_shape: Any = None) -> int:
    """Two for a multiply-add of the patches."""
    return int(2 * images[0] * (positions[1] - special[1]) * math.prod(weight))
