"""What models on a grid share: outer shape, removal of tokens, layers with the dtype policy, initial values.

Tokens are removed inside a section (a stage of a pyramid, or the whole of a model without strides) and put back behind
it: every place gets the row of the token that it was merged into, or its own from when it was pruned. What is exact in
between, if all tokens of a group are alike: norms, projections, MLPs, gates, attention. Not exact: a scan takes fewer
steps, as in the flat families. A convolution over the grid sees the row of a token at every place that it stands for
(zeros where one was pruned, as beyond the border) and is calculated at all places; a token takes the output at its own.

The residual stream is fp32; norms compute in fp32; convolutions and projections compute in the dtype of their weights.

Letters as in kernels/reference.py; H and W are the sides of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.library import wide
from ..reduction import Cost, Reducer, Section, Tokens, default_stages
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
    """A model whose blocks work on grids of tokens. `reducer` decides what happens between blocks; by default nothing.

    A family says which blocks lose tokens together and what they cost (`sections`), what these need to know of the
    places of the tokens (`places`), and how the stream runs through it (`run`).
    """

    config: GridConfig
    spec: ModelSpec | None
    reducer: Reducer

    def __init__(self, config: GridConfig, spec: ModelSpec | None) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.reducer = Reducer.dense()

    # ------------------------------------------------------------------------------------------------- sizes and places

    def sides(self, image_size: ImageSize = None) -> Sides:
        """(height, width) of an input: of a side, of both, or None for the model's own."""
        if image_size is None:
            return self.config.image_size
        given = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(given) != 2:
            raise ValueError(f"an input size is a side, or (height, width), got {given}")
        return given[0], given[1]

    def resize(self, image_size: ImageSize) -> None:
        """Make another input size the model's own. Reduce it anew for the new size."""
        self.config = replace(self.config, image_size=self.sides(image_size))
        if self.spec is not None:
            preprocess = replace(self.spec.preprocess, size=self.config.image_size)
            self.spec = replace(self.spec, config=self.config, preprocess=preprocess)

    def check(self, images: Tensor, least: int) -> None:
        """Raises ValueError unless the images are (B, C, H, W), C as configured, of at least `least` pixels a side."""
        if images.dim() != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(f"images must be (B, {self.config.in_chans}, H, W), got {tuple(images.shape)}")
        if min(images.shape[2:]) < least:
            height, width = images.shape[2:]
            raise ValueError(f"an image must have at least {least}x{least} pixels, got {height}x{width}")

    def blocks(self) -> list[Any]:
        """The blocks between which tokens can go, in the order in which a schedule counts them."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """How many there are."""
        return len(self.blocks())

    @property
    def d_model(self) -> int:
        """Width of the stream in the first section."""
        return self.sections()[0].d_model

    @property
    def d_inner(self) -> int:
        """Channels of the scans in the first section."""
        return self.sections()[0].d_inner

    def num_patches(self, image_size: ImageSize = None) -> int:
        """Tokens at the start of the first section; `image_size` as in `sides`."""
        return self.sections(image_size)[0].patches

    def special_tokens(self, image_size: ImageSize = None) -> tuple[int, ...]:
        """These models have no class and register tokens."""
        return ()

    # ---------------------------------------------------------------------------------------------------------- forward

    def places(self, blocks: Sequence[nn.Module], tokens: Tokens) -> Any:
        """What blocks of a section need besides the stream, until tokens are removed again."""
        raise NotImplementedError

    def through(
        self, blocks: Sequence[nn.Module], x: Tensor, grid: Sides, first: int = 0, layers: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """A section: blocks on the tokens of a grid, the reducer between them.

        Args:
            blocks: of the section. `first` is the number of the first one in the schedule.
            x: (B, L, D), a token for every place.
            layers: blocks (numbered as in the schedule) after which all places are asked for.

        Returns:
            The rows (B, L, D) of all places behind the section, and after each of `layers`, before the reduction there.
        """
        tokens, canvas, seen = Tokens.start(x, grid), x, []
        places = self.places(blocks, tokens)
        for i, block in enumerate(blocks, first):
            rows, captured = block(tokens.x, places, self.reducer.needs(i))
            before = tokens.with_x(rows)
            if i in layers:
                seen.append(restored(before, canvas))
            tokens = self.reducer(i, before, captured)
            if tokens is not before:
                canvas, places = restored(before, canvas), self.places(blocks, tokens)
        return restored(tokens, canvas), seen

    def run(self, images: Tensor, layers: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """The map (B, D, h, w) after the last layer, and those after the layers that are named."""
        raise NotImplementedError

    def layers_of_maps(self) -> Sequence[nn.Module]:
        """The layers that `feature_maps` counts."""
        raise NotImplementedError

    def feature_maps(self, images: Tensor, layers: Collection[int]) -> list[Tensor]:
        """The stream after some layers, 0-based and ascending: (B, D, h, w) each; in a pyramid a layer is a stage.

        All places are there: a merged token is copied to every place that it stands for.

        Raises:
            ValueError: there is no such layer.
        """
        count = len(self.layers_of_maps())
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong:
            raise ValueError(f"layers must be from 0 to {count - 1}, got {wrong[0]}")
        return self.run(images, layers)[1]

    def forward_features(self, images: Tensor, unmerge: bool = False) -> Tokens:
        """The tokens after the last block, row by row, before the final norm.

        Args:
            unmerge: as in flat models; here all places are there in any case.
        """
        x, _ = self.run(images, ())
        return Tokens.start(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))

    def forward_head(self, tokens: Tokens) -> Tensor:
        """Logits (B, num_classes)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    # ------------------------------------------------------------------------------------------------------------- cost

    def sections(self, image_size: ImageSize = None) -> tuple[Section, ...]:
        """The blocks that lose tokens together, one section behind the other."""
        raise NotImplementedError

    def stem_cost(self, image_size: ImageSize = None) -> Cost:
        """MACs of one image in what is no block of a section: the stem, stages of convolutions, the ways down."""
        raise NotImplementedError

    def head_cost(self) -> Cost:
        """MACs of the classifier."""
        raise NotImplementedError

    def cost(self, image_size: ImageSize = None) -> Cost:
        """MACs of one image with all its tokens."""
        blocks = [cost(section.patches) for section in self.sections(image_size) for cost in section.costs]
        return total([self.stem_cost(image_size), self.head_cost(), *blocks])


def restored(tokens: Tokens, canvas: Tensor) -> Tensor:
    """(B, L0, D): every place with the row of its token; where that was pruned, with its row of `canvas` (B, L0, D)."""
    if tokens.x.shape[1] == canvas.shape[1]:
        return tokens.x
    gone = (tokens.origin.dest == tokens.origin.survivors).unsqueeze(2)
    return torch.where(gone, canvas, tokens.dense())


def everywhere(convolution: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
    """A convolution over the grid, (B, C, H, W), of rows x (B, L, C) of tokens -> (B, L0, C): all places."""
    rows = tokens.origin.unmerge(x) if x.shape[1] < tokens.origin.length else x  # (B, L0, C)
    image = rows.transpose(1, 2).unflatten(2, tokens.grid)
    result: Tensor = convolution(image)
    return result.flatten(2).transpose(1, 2)


def at_tokens(x: Tensor, tokens: Tokens) -> Tensor:
    """Of all places x (B, L0, C) those at which the tokens stand: (B, L, C)."""
    return tokens.origin.select(x) if tokens.origin.survivors < x.shape[1] else x


def convolve(convolution: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
    """`everywhere`, at the places of the tokens: (B, L, C) -> (B, L, C)."""
    return at_tokens(everywhere(convolution, x, tokens), tokens)


def usual_blocks(blocks: int) -> tuple[int, ...]:
    """Blocks of a stage after which tokens go by default; none in a short stage, of which one block would gain."""
    return default_stages(blocks) if blocks > 2 else ()


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
