"""PlainMamba (arXiv 2403.17695): one grid from the first block to the last, scanned as a snake in four ways.

Keys of the state dict are those of the official checkpoints, `backbone.` and `head.` included.

What the official code does and trained weights know: in each of the four scans only the input is put into the order of
the scan. Time steps, B and C stay row by row, so that step t meets the time step of token t and the input of another.

When tokens are removed, these pairs stay as they are: a scan loses the steps at which the input of a removed token
would enter, with the time step, B and C that such a step has, and with its move. So time steps, B and C are calculated
at all places, as the convolution is, and what MTR scores is the time step that a token's own input meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..reduction import Cost, Section, Tokens, default_stages, take_rows
from .grid import (
    BatchNorm2d,
    Conv2d,
    GridConfig,
    GridModel,
    ImageSize,
    LayerNorm,
    Sides,
    at_tokens,
    behind,
    capture,
    convolve,
    everywhere,
    linear,
    reset_linear,
    reset_scan,
    total,
    typed,
)
from .layers import Captured, resize_positions
from .orders import Order, Walk, restricted, snakes
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess

_STEM, _SCANS, _MOVES, _EXPAND = 64, 4, 5, 2
_PATCH = 16  # pixels: the stem halves once, then come patches of 8x8


@dataclass(frozen=True, kw_only=True)
class PlainMambaConfig(GridConfig):
    """D, the number of blocks and N; convolutions in the stem behind the first; blocks that end in a convolution."""

    d_model: int = 192
    depth: int = 24
    d_state: int = 16
    stem_convolutions: int = 1
    convolved: tuple[int, ...] = ()


class Stem(nn.Module):
    """Convolutions, then patches: (B, C, H, W) -> (B, D, H/16, W/16); an image is filled up with zeros on the right and
    at the bottom."""

    def __init__(self, in_chans: int, convolutions: int, d_model: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv2d(in_chans, _STEM, 7, 2, 3, bias=False), BatchNorm2d(_STEM), nn.ReLU())
        more = [(Conv2d(_STEM, _STEM, 3, 1, 1, bias=False), BatchNorm2d(_STEM), nn.ReLU()) for _ in range(convolutions)]
        self.convs = nn.Sequential(*(layer for group in more for layer in group))
        self.projection = Conv2d(_STEM, d_model, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convs(self.stem(images))
        side = self.projection.stride[0]
        x = F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side))
        return self.projection(x)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of all images stand.

    tokens: their origin and grid; not their rows. walks: of the four snakes, over the tokens that are there. steps: (B,
    L) for each, which step of the whole snake a step is; moves: (B, L) for each, the move that led to it.
    """

    tokens: Tokens
    walks: list[Walk]
    steps: list[Tensor]
    moves: list[Tensor]

    @staticmethod
    def of(tokens: Tokens) -> Places:
        """The places of tokens."""
        height, width = tokens.grid
        at = tokens.origin.keep  # (B, L)
        visits, moves = snakes((height, width), at.device)  # (4, L0) each
        there = torch.arange(visits.shape[1], device=at.device).expand_as(visits)
        back = torch.zeros_like(visits).scatter(1, visits, there).unbind(0)
        walks = [restricted(Order(enter, enter, len(enter)), at) for enter in back]
        steps = [take_rows(enter[at], way.visits) for enter, way in zip(back, walks, strict=True)]
        return Places(tokens, walks, steps, [move[step] for move, step in zip(moves.unbind(0), steps, strict=True)])


class SnakeMixer(nn.Module):
    """Four snake scans that share all parameters; the move that led to a place adds a row of `direction_Bs` to B."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        inner, self.dt_rank, self.d_state = _EXPAND * d_model, math.ceil(d_model / 16), d_state
        self.in_proj = nn.Linear(d_model, 2 * inner)
        self.conv2d = Conv2d(inner, inner, 7, padding=3, groups=inner)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.direction_Bs = nn.Parameter(torch.zeros(_MOVES, d_state))
        self.out_proj = nn.Linear(inner, d_model)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values of the scan."""
        reset_scan(self.A_log, self.D, self.dt_proj.weight, self.dt_proj.bias)
        nn.init.trunc_normal_(self.direction_Bs, std=0.02)

    def forward(self, x: Tensor, places: Places, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) -> (B, L, D), and the signals that are `wanted`, all by the token whose input enters."""
        hidden, z = linear(x, self.in_proj).chunk(2, dim=-1)  # (B, L, E) each
        all_places = F.silu(everywhere(self.conv2d, hidden, places.tokens))  # (B, L0, E)
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = kernels.linear(all_places, self.x_proj.weight).split(sizes, dim=-1)  # (B, L0, .)
        u = at_tokens(all_places, places.tokens)  # (B, L, E)
        # the four scans are entries of one batch: (4 B, L, .)
        inputs = torch.cat([way.spread(u) for way in places.walks])
        dts, Bs, Cs = (torch.cat([take_rows(signal, step) for step in places.steps]) for signal in (dt, B, C))
        Bs = Bs + self.direction_Bs.to(B.dtype)[torch.cat(places.moves)]
        # the official code adds the bias once in dt_proj and once more in the scan
        bias = 2 * self.dt_proj.bias
        direction = kernels.Direction(dts, -torch.exp(self.A_log), Bs, Cs, self.D, bias, self.dt_proj.weight)
        scanned = kernels.scan(inputs[None], [direction])

        def by_token(steps: Tensor) -> list[Tensor]:  # (4 B, L, ...), in the order of each scan -> (B, L, ...)
            parts = steps.unflatten(0, (_SCANS, -1)).unbind(0)
            return [way.left(part) for way, part in zip(places.walks, parts, strict=True)]

        y = by_token(scanned.y)
        gate = F.silu(z)
        update = linear(sum(y[1:], y[0]) * gate, self.out_proj)

        def each(steps: Callable[[], Tensor]) -> Callable[[], Tensor]:
            return lambda: torch.stack(by_token(steps()), dim=1)

        signals = {
            "update": lambda: update,
            "dt": each(lambda: reference.step_size(dts, bias, self.dt_proj.weight, softplus=True)),
            "dt_mean": each(lambda: scanned.dt_mean[:, 0]),
            "B": each(lambda: Bs),
            "C": each(lambda: Cs),
            "y": each(lambda: scanned.y),
            "y_gated": lambda: torch.stack(y, dim=1) * gate[:, None],
        }
        return update, capture(wanted, signals)

    def cost(self, length: int, places: int) -> Cost:
        """MACs of one image of `length` tokens, on a grid of so many places."""
        inner = self.D.numel()
        projections = (self.in_proj.weight.numel() + self.out_proj.weight.numel()) * length
        # x_proj and dt_proj are there once, for all places; without the gate
        one = inner * (9 * self.d_state + 1) * length
        scan = (self.x_proj.weight.numel() + self.dt_proj.weight.numel()) * places + one
        return Cost(projections, self.conv2d.weight.numel() * places, scan, directions=(_SCANS - 1) * one)


class Layer(nn.Module):
    """x + mamba(norm(x)); where there is a convolution, then gelu(batch norm(convolution of that)), without a skip."""

    def __init__(self, d_model: int, d_state: int, convolved: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.dw = _depthwise(d_model) if convolved else None
        self.mamba = SnakeMixer(d_model, d_state)

    def forward(self, x: Tensor, places: Places, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) fp32 -> the same, and the `wanted` signals."""
        update, captured = self.mamba(self.norm(x, self.mamba.in_proj.weight.dtype), places, wanted)
        x = x + update
        if self.dw is not None:
            x = convolve(self.dw, x, places.tokens)
        return x, captured | capture(wanted, {"hidden": lambda: x})

    def cost(self, length: int, places: int) -> Cost:
        own = Cost() if self.dw is None else Cost(conv=typed(self.dw, Conv2d)[0].weight.numel() * places)
        return self.mamba.cost(length, places) + own


def _depthwise(d_model: int) -> nn.Sequential:
    convolution = Conv2d(d_model, d_model, 3, padding=1, groups=d_model, bias=False)
    return nn.Sequential(convolution, BatchNorm2d(d_model), nn.GELU())


class Backbone(nn.Module):
    """Stem, position table, layers, final norm."""

    def __init__(self, config: PlainMambaConfig, grid: Sides) -> None:
        super().__init__()
        self.patch_embed = Stem(config.in_chans, config.stem_convolutions, config.d_model)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(grid), config.d_model))
        self.layers = nn.ModuleList(
            Layer(config.d_model, config.d_state, i in config.convolved) for i in range(config.depth)
        )
        self.ln1 = LayerNorm(config.d_model, eps=1e-6)


class Head(nn.Module):
    """The classifier."""

    def __init__(self, d_model: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_model, num_classes)


class PlainMamba(GridModel):
    """PlainMamba."""

    config: PlainMambaConfig

    def __init__(self, config: PlainMambaConfig, spec: ModelSpec | None = None) -> None:
        super().__init__(config, spec)
        self.backbone = Backbone(config, self._grid(config.image_size))
        self.head = Head(config.d_model, config.num_classes)
        reset_linear(self)
        nn.init.trunc_normal_(self.backbone.pos_embed, std=0.02)
        for layer in self.blocks():
            layer.mamba.reset()

    @staticmethod
    def _grid(sides: Sides) -> Sides:
        height, width = (-(-side // _PATCH) for side in sides)
        return height, width

    def blocks(self) -> list[Layer]:
        """The layers, with their type."""
        return typed(self.backbone.layers, Layer)

    def layers_of_maps(self) -> Sequence[nn.Module]:
        return self.blocks()

    def table(self, grid: Sides) -> Tensor:
        """The position table (1, L, D) for a grid."""
        return resize_positions(self.backbone.pos_embed, self._grid(self.config.image_size), grid)

    def resize(self, image_size: ImageSize) -> None:
        """Make another input size the model's own: the position table changes for good as `embed` does in passing."""
        table = self.table(self._grid(self.sides(image_size))).detach()
        super().resize(image_size)
        self.backbone.pos_embed = nn.Parameter(table)

    def embed(self, images: Tensor) -> tuple[Tensor, Sides]:
        """(B, C, H, W) -> (B, L, D) fp32, and the grid."""
        self.check(images, 1)
        x = self.backbone.patch_embed(images)
        grid = x.shape[2], x.shape[3]
        return (x.flatten(2).transpose(1, 2) + self.table(grid)).to(torch.float32), grid

    def places(self, blocks: Sequence[nn.Module], tokens: Tokens) -> Places:
        return Places.of(tokens)

    def run(self, images: Tensor, layers: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """(B, D, H/16, W/16), and the maps after the layers that are named."""
        x, grid = self.embed(images)
        x, seen = self.through(self.blocks(), x, grid, layers=layers)
        last, *maps = (rows.transpose(1, 2).unflatten(2, grid) for rows in (x, *seen))
        return last, maps

    def forward_head(self, tokens: Tokens) -> Tensor:
        pooled = self.backbone.ln1(tokens.x).mean(1)
        return linear(pooled.to(self.head.fc.weight.dtype), self.head.fc).to(torch.float32)

    def sections(self, image_size: ImageSize = None) -> tuple[Section, ...]:
        places, width = math.prod(self._grid(self.sides(image_size))), self.config.d_model
        costs = tuple(cache(partial(layer.cost, places=places)) for layer in self.blocks())
        return (Section(places, width, _EXPAND * width, costs, default_stages(len(costs))),)

    def stem_cost(self, image_size: ImageSize = None) -> Cost:
        sides = self.sides(image_size)
        stem, grid = self.backbone.patch_embed, self._grid(sides)
        half = behind(typed(stem.stem, Conv2d)[0], sides)
        costs = [Cost(stem=stem.projection.weight.numel() * math.prod(grid))]
        for convolution in typed((*stem.stem, *stem.convs), Conv2d):
            costs.append(Cost(stem=convolution.weight.numel() * math.prod(half)))
        return total(costs)

    def head_cost(self) -> Cost:
        return Cost(head=self.head.fc.weight.numel())


def _entry(name: str, config: PlainMambaConfig, counts: tuple[int, int], top1: float) -> ModelSpec:
    return ModelSpec(
        name=f"plainmamba_{name}",
        family="plain_mamba",
        config=config,
        preprocess=Preprocess((224, 224), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        checkpoint=CheckpointFile("ChenhongyiYang/PlainMamba", f"{name}.pth", "state_dict", *counts, top1),
        licence="Apache-2.0",
        source="https://github.com/ChenhongyiYang/PlainMamba",
    )


_L1 = PlainMambaConfig(convolved=(0,))
_L2 = PlainMambaConfig(d_model=384, stem_convolutions=2)
_L3 = PlainMambaConfig(d_model=448, depth=36, stem_convolutions=2)

VARIANTS: dict[str, ModelSpec] = {
    "plainmamba_l1": _entry("l1", _L1, (361, 7_551_656), 77.9),
    "plainmamba_l2": _entry("l2", _L2, (361, 26_145_832), 81.6),
    "plainmamba_l3": _entry("l3", _L3, (529, 50_956_456), 82.3),
}
