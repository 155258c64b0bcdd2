"""The stem as one compiled kernel: patches times a weight, special tokens between them, positions added to all.

The definition is in models/layers.py; callers ask `takes` first. The results are the same to the bit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .linear import MOST_ROWS

_RECORD = struct.Struct(cpu.EMBED).pack


def takes(images: Tensor, weight: Tensor, bias: Tensor, special: Tensor, positions: Tensor) -> bool:
    """Whether the compiled kernel embeds these: on a CPU, in fp32, few enough that a library has no advantage."""
    tensors = (images, weight, bias, special, positions)
    if not cpu.direct(*tensors) or torch.is_autocast_enabled("cpu"):
        return False
    length, rows = positions.shape[1], special.shape[1]
    shapes = positions.shape == (1, length, len(weight)) and special.shape == (1, rows, len(weight))
    fp32 = all(one.dtype is torch.float32 and one.is_contiguous() for one in tensors)
    return fp32 and shapes and 0 < len(images) * length <= MOST_ROWS


def embed(
    images: Tensor, weight: Tensor, bias: Tensor, special: Tensor, at: Sequence[int], positions: Tensor
) -> Tensor:
    """(B, L0, D).

    Args:
        images: (B, C, H, W) or (B, C, T, H, W), cut into patches from the first corner on.
        weight: (D, C, ...) of a convolution whose stride is its patch; bias: (D).
        special: (1, n, D), at the ascending places `at` of the L0.
        positions: (1, L0, D).
    """
    *_, height, width = images.shape
    *frames, patch_height, patch_width = weight.shape[2:]
    length, columns = positions.shape[1:]
    y = images.new_empty((len(images), length, columns))
    record = _RECORD(
        *(len(images), images.shape[1], images.shape[2] if frames else 1, height, width),
        *(frames[0] if frames else 1, patch_height, patch_width),
        *(length, columns, len(at), torch.get_num_threads()),
        *(one.data_ptr() for one in (images, weight, bias, special, positions, y)),
    )
    cpu.call("embed", record + struct.pack(f"<{len(at)}q", *at))
    return y
