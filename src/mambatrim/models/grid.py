"""What models on a grid share: their outer shape, layers with the dtype policy, the channel gate, initial values.

The residual stream is fp32; norms compute in fp32; convolutions and projections compute in the dtype of their weights.

Letters as in kernels/reference.py; H and W are the sides of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.library import wide
from ..reduction import Cost
from .layers import Captured
from .spec import ModelSpec

Sides = tuple[int, int]
ImageSize = int | tuple[int, ...] | None
Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """What every configuration has: (height, width) of the input in pixels, classes, channels of the images."""

    image_size: Sides = (224, 224)
    num_classes: int = 1000
    in_chans: int = 3

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the input."""
        return self.image_size


class GridModel(nn.Module):
    """A model whose layers need the whole grid: convolutions between its scans, or strides.

    It has no reducer; `why_dense` says in a sentence why tokens cannot be removed between its blocks.
    """

    config: GridConfig
    spec: ModelSpec | None
    why_dense: ClassVar[str]

    def sides(self, image_size: ImageSize = None) -> Sides:
        """(height, width) of an input: of a side, of both, or None for the model's own."""
        if image_size is None:
            return self.config.image_size
        given = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(given) != 2:
            raise ValueError(f"an input size is a side, or (height, width), got {given}")
        return given[0], given[1]

    def resize(self, image_size: ImageSize) -> None:
        """Make another input size the model's own."""
        self.config = replace(self.config, image_size=self.sides(image_size))

    def check(self, images: Tensor, least: int) -> None:
        """Raises ValueError unless the images are (B, C, H, W), C as configured, of at least `least` pixels a side."""
        if images.dim() != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(f"images must be (B, {self.config.in_chans}, H, W), got {tuple(images.shape)}")
        if min(images.shape[2:]) < least:
            height, width = images.shape[2:]
            raise ValueError(f"an image must have at least {least}x{least} pixels, got {height}x{width}")

    def feature_maps(self, images: Tensor, layers: Collection[int]) -> list[Tensor]:
        """The stream after some layers, 0-based and ascending: (B, D, h, w) each; in a pyramid a layer is a stage.

        Raises:
            ValueError: there is no such layer.
        """
        count = len(self.layers_of_maps())
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong:
            raise ValueError(f"layers must be from 0 to {count - 1}, got {wrong[0]}")
        return self.run(images, layers)[1]

    def layers_of_maps(self) -> Sequence[nn.Module]:
        """The layers that `feature_maps` counts."""
        raise NotImplementedError

    def run(self, images: Tensor, layers: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """The stream after the last layer as `forward_head` takes it, and the maps after the layers that are named."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """The stream after the last layer, before the final norm."""
        return self.run(images, ())[0]

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def cost(self, image_size: ImageSize = None) -> Cost:
        """MACs of one image."""
        raise NotImplementedError


class LayerNorm(nn.LayerNorm):
    """Over the last dimension, computed in fp32, returned in `dtype` (default: of x)."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        exact = wide(x)
        y = F.layer_norm(x.to(exact), self.normalized_shape, self.weight.to(exact), self.bias.to(exact), self.eps)
        return y.to(dtype or x.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """Computed and returned in fp32, whatever the input is."""

    def forward(self, x: Tensor) -> Tensor:
        exact = wide(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(exact), self.bias.to(exact)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x.to(exact), *statistics, weight, bias, self.training, self.momentum or 0.0, self.eps)


class Conv2d(nn.Conv2d):
    """Takes any dtype and computes in that of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Permute(nn.Module):
    """Dimensions in another order; between the layers of a stem it also keeps their official numbers."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), the exact GELU."""

    def __init__(self, d_model: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, ratio * d_model)
        self.fc2 = nn.Linear(ratio * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return linear(F.gelu(linear(x, self.fc1)), self.fc2)

    def macs(self) -> int:
        """Of one token."""
        return self.fc1.weight.numel() + self.fc2.weight.numel()


class ChannelGate(nn.Module):
    """x times a factor for each channel, made of all tokens ("BiAttn" of LocalMamba, arXiv 2403.09338, section 3.3).

    sigmoid(select(gelu(reduce(mean of norm(x) over the tokens)))).
    """

    def __init__(self, channels: int, ratio: int = 8) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.global_reduce = nn.Linear(channels, channels // ratio)
        self.channel_select = nn.Linear(channels // ratio, channels)

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        """x (B, L, E), share (B, L) of each token in the mean -> (B, L, E)."""
        normed = self.norm(x)
        mean = torch.bmm(share[:, None].to(normed.dtype), normed)  # (B, 1, E)
        hidden = F.gelu(self.global_reduce(mean))
        return x * torch.sigmoid(self.channel_select(hidden))

    def macs(self) -> int:
        """Of one image."""
        return self.global_reduce.weight.numel() + self.channel_select.weight.numel()


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """x (..., I) -> (..., O), by the faster library."""
    y = kernels.linear(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def capture(wanted: Sequence[str], signals: dict[str, Callable[[], Tensor]]) -> Captured:
    """The signals that are asked for; the others are not computed."""
    return {name: signals[name]() for name in wanted if name in signals}


def typed(modules: Iterable[nn.Module], kind: type[Kind]) -> list[Kind]:
    """The modules of one kind, with their type."""
    return [module for module in modules if isinstance(module, kind)]


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    return reduce(add, costs, Cost())


def halved(grid: Sides) -> Sides:
    """Half the sides, rounded up."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def behind(convolution: nn.Conv2d, grid: Sides) -> Sides:
    """The grid that a convolution with padding in numbers makes of this one."""
    padding = [int(p) for p in convolution.padding]
    height, width = (
        (side + 2 * p - kernel) // stride + 1
        for side, p, kernel, stride in zip(grid, padding, convolution.kernel_size, convolution.stride, strict=True)
    )
    return height, width


@torch.no_grad()
def reset_linear(model: nn.Module) -> None:
    """Initial values of all projections, in place: truncated normal weights of deviation 0.02, biases zero."""
    for layer in typed(model.modules(), nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def reset_scan(A_log: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> None:
    """Mamba's initial values (arXiv 2312.00752, section 3.6), in place: A_n = -n, steps log-uniform in [0.001, 0.1].

    A_log (..., N), D (...), dt_weight (..., R), dt_bias (...).
    """
    bound = dt_weight.shape[-1] ** -0.5
    nn.init.uniform_(dt_weight, -bound, bound)
    steps = torch.exp(torch.empty_like(dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
    dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1).log().expand_as(A_log))
    D.fill_(1.0)
