"""The pyramid of VMamba and LocalVMamba: a stem, four stages of blocks on a grid, and a classifier.

A family defines its stem, the way down between stages, and the orders in which the scans of a block run over the grid.
Blocks take tokens row by row, (B, L, D), of which some may be gone; stems and ways down take grids, (B, H, W, D). Keys
of the state dict are those of the official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..reduction import Cost, Section, Tokens
from .grid import (
    Conv2d,
    GridConfig,
    GridModel,
    ImageSize,
    LayerNorm,
    Mlp,
    Permute,
    Sides,
    behind,
    capture,
    convolve,
    halved,
    linear,
    reset_linear,
    reset_scan,
    typed,
    usual_blocks,
)
from .layers import Captured
from .orders import Walk
from .spec import ModelSpec

DIRECTIONS = 4


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of all images stand: what blocks need besides the stream.

    tokens: their origin and grid; not their rows. walks: by the name of the order. share: (B, L) of each token in a
    mean over all.
    """

    tokens: Tokens
    walks: dict[str, Walk]
    share: Tensor


class DirectedScan(nn.Module):
    """What the scans of a grid share: a convolution, four scans with parameters of their own, a norm of their sum.

    out_proj(norm(sum of the scans)), times silu(z) before out_proj where there is a gate. The four scans themselves
    are `sum_of_scans`, which a family defines.
    """

    def __init__(self, d_model: int, expand: int, d_state: int, gated: bool) -> None:
        super().__init__()
        inner, self.dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.d_inner, self.d_state, self.gated = inner, d_state, gated
        self.in_proj = nn.Linear(d_model, 2 * inner if gated else inner, bias=False)
        self.conv2d = Conv2d(inner, inner, 3, padding=1, groups=inner, bias=gated)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, self.dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(DIRECTIONS * inner))
        self.out_norm = LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values of the scan."""
        nn.init.uniform_(self.x_proj_weight, -(self.d_inner**-0.5), self.d_inner**-0.5)
        grouped = self.A_logs.view(DIRECTIONS, self.d_inner, -1), self.Ds.view(DIRECTIONS, -1)
        reset_scan(*grouped, self.dt_projs_weight, self.dt_projs_bias)

    def forward(self, x: Tensor, places: Places, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) -> (B, L, D), and the signals that are `wanted`, in token order in every direction.

        The gate stands behind the norm of the sum; in "y_gated" it is applied to every direction alone, without the
        norm. Where there is no gate, this is "y".
        """
        hidden = kernels.linear(x, self.in_proj.weight)
        hidden, z = hidden.chunk(2, dim=-1) if self.gated else (hidden, None)  # (B, L, E)
        u = F.silu(convolve(self.conv2d, hidden, places.tokens))
        y, signals = self.sum_of_scans(u, places, [*wanted, "y"] if "y_gated" in wanted else wanted)
        y = self.out_norm(y)
        gate = None if z is None else F.silu(z)
        update = kernels.linear(y if gate is None else y * gate, self.out_proj.weight)
        own = {
            "update": lambda: update,
            "y_gated": lambda: signals["y"] if gate is None else signals["y"] * gate[:, None],
        }
        return update, {name: signals[name] for name in wanted if name in signals} | capture(wanted, own)

    def orders(self) -> tuple[str, ...]:
        """Names of the orders in which it walks over the tokens."""
        raise NotImplementedError

    def sum_of_scans(self, u: Tensor, places: Places, wanted: Sequence[str]) -> tuple[Tensor, Captured]:
        """u (B, L, E) -> the same, and the `wanted` signals."""
        raise NotImplementedError

    def direction(self, u: Tensor, k: int, reverse: bool) -> kernels.Direction:
        """Direction k of u (B, L, E), in the order of u."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = kernels.linear(u, self.x_proj_weight[k]).split(sizes, dim=-1)  # (B, L, R), (B, L, N), (B, L, N)
        A = -torch.exp(self.A_logs.view(DIRECTIONS, self.d_inner, -1)[k])
        D = self.Ds.view(DIRECTIONS, -1)[k]
        return kernels.Direction(dt, A, B, C, D, self.dt_projs_bias[k], self.dt_projs_weight[k], reverse)

    def cost(self, length: int, places: int) -> Cost:
        """MACs of one image of `length` tokens, on a grid of so many places, all of which are convolved."""
        inner = self.d_inner
        projections = (self.in_proj.weight.numel() + self.out_proj.weight.numel()) * length
        # without the gate that `scan_macs` counts: here it is one for all directions
        scan = inner * (self.dt_rank + 2 * self.d_state - 1) * length
        scan += kernels.scan_macs(length, inner, self.d_state, self.dt_rank)
        others = (DIRECTIONS - 1) * scan
        # the published counts have all four directions
        return Cost(projections, self.conv2d.weight.numel() * places, scan, directions=others, quirks=others)


class Block(nn.Module):
    """x + op(norm(x)), then x + mlp(norm2(x)) where there is an MLP."""

    def __init__(self, d_model: int, op: DirectedScan, mlp_ratio: int) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.op = op
        self.norm2 = LayerNorm(d_model) if mlp_ratio else None
        self.mlp = Mlp(d_model, mlp_ratio) if mlp_ratio else None

    def forward(self, x: Tensor, places: Places, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) fp32 -> the same, and the `wanted` signals."""
        dtype = self.op.in_proj.weight.dtype
        update, captured = self.op(self.norm(x, dtype), places, wanted)
        x = x + update
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.mlp(self.norm2(x, dtype))
        return x, captured | capture(wanted, {"hidden": lambda: x})

    def cost(self, length: int, places: int) -> Cost:
        mlp = self.mlp.macs() * length if self.mlp is not None else 0
        return self.op.cost(length, places) + Cost(mlp)


class PatchMerging(nn.Module):
    """2x2 places become one of twice the width: (B, H, W, D) -> (B, H/2, W/2, 2 D), odd sides filled up with zeros."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * d_model)
        self.reduction = nn.Linear(4 * d_model, 2 * d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        places = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        joined = self.norm(torch.cat(places, dim=-1), self.reduction.weight.dtype)
        return linear(joined, self.reduction)

    def macs(self) -> int:
        """Of one place behind it."""
        return self.reduction.weight.numel()


class Halving(nn.Sequential):
    """A convolution of stride 2 and a norm: (B, H, W, D) -> (B, H/2, W/2, 2 D), rounded up."""

    def __init__(self, d_model: int) -> None:
        convolution = Conv2d(d_model, 2 * d_model, 3, 2, 1)
        super().__init__(Permute(0, 3, 1, 2), convolution, Permute(0, 2, 3, 1), LayerNorm(2 * d_model))

    def macs(self) -> int:
        """Of one place behind it."""
        return sum(convolution.weight.numel() for convolution in typed(self, Conv2d))


class Stage(nn.Module):
    """Blocks, and the way down to the next stage, or none."""

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | Halving | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = nn.Identity() if downsample is None else downsample

    def typed_blocks(self) -> list[Block]:
        """The blocks, with their type."""
        return typed(self.blocks, Block)


class Classifier(nn.Module):
    """Logits from the mean over the normed grid."""

    def __init__(self, d_model: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) -> (B, num_classes)."""
        pooled = self.norm(x).mean(1)
        return linear(pooled.to(self.head.weight.dtype), self.head).to(torch.float32)


class Pyramid(GridModel):
    """The trunk, for images of any size."""

    def __init__(
        self, config: GridConfig, spec: ModelSpec | None, stem: nn.Sequential, stages: Sequence[Stage], d_model: int
    ) -> None:
        super().__init__(config, spec)
        self.patch_embed = stem
        self.layers = nn.ModuleList(stages)
        self.classifier = Classifier(d_model, config.num_classes)
        reset_linear(self)

    def stages(self) -> list[Stage]:
        """The four stages, with their type."""
        return typed(self.layers, Stage)

    def blocks(self) -> list[Block]:
        return [block for stage in self.stages() for block in stage.typed_blocks()]

    def layers_of_maps(self) -> Sequence[nn.Module]:
        return self.stages()

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/4, W/4, D) fp32."""
        first = typed(self.patch_embed, Conv2d)[0]
        self.check(images, first.kernel_size[0] - 2 * int(first.padding[0]))
        return self.patch_embed(images).to(torch.float32)

    def places(self, blocks: Sequence[nn.Module], tokens: Tokens) -> Places:
        names = sorted({name for block in typed(blocks, Block) for name in block.op.orders()})
        walks = {name: self.walk(name, tokens) for name in names}
        return Places(tokens, walks, tokens.size / tokens.size.sum(1, keepdim=True))

    def walk(self, name: str, tokens: Tokens) -> Walk:
        """An order by its name, restricted to the tokens that are there."""
        raise NotImplementedError

    def run(self, images: Tensor, layers: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """(B, 8 D, H/32, W/32), sides rounded up, and the maps behind the stages `layers`, before the way down."""
        x, seen, first = self.embed(images), [], 0
        for s, stage in enumerate(self.stages()):
            blocks, grid = stage.typed_blocks(), (x.shape[1], x.shape[2])
            rows, _ = self.through(blocks, x.flatten(1, 2), grid, first)
            x, first = rows.unflatten(1, grid), first + len(blocks)
            if s in layers:
                seen.append(x.permute(0, 3, 1, 2))
            x = stage.downsample(x).to(torch.float32)
        return x.permute(0, 3, 1, 2), seen

    def forward_head(self, tokens: Tokens) -> Tensor:
        return self.classifier(tokens.x)

    def grids(self, image_size: ImageSize = None) -> list[Sides]:
        """The grid of each stage."""
        grid = self.sides(image_size)
        for convolution in typed(self.patch_embed, Conv2d):
            grid = behind(convolution, grid)
        grids = [grid]
        for _ in self.stages()[1:]:
            grids.append(halved(grids[-1]))
        return grids

    def sections(self, image_size: ImageSize = None) -> tuple[Section, ...]:
        found = []
        for stage, grid in zip(self.stages(), self.grids(image_size), strict=True):
            blocks, places = stage.typed_blocks(), math.prod(grid)
            costs = tuple(cache(partial(block.cost, places=places)) for block in blocks)
            width, inner = blocks[0].norm.normalized_shape[0], blocks[0].op.d_inner
            found.append(Section(places, width, inner, costs, usual_blocks(len(blocks))))
        return tuple(found)

    def stem_cost(self, image_size: ImageSize = None) -> Cost:
        macs, grid = 0, self.sides(image_size)
        for convolution in typed(self.patch_embed, Conv2d):
            grid = behind(convolution, grid)
            macs += convolution.weight.numel() * math.prod(grid)
        for stage, below in zip(self.stages(), self.grids(image_size)[1:], strict=False):
            if isinstance(stage.downsample, PatchMerging | Halving):
                macs += stage.downsample.macs() * math.prod(below)
        return Cost(stem=macs)

    def head_cost(self) -> Cost:
        return Cost(head=self.classifier.head.weight.numel())
