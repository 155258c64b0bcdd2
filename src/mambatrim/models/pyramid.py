"""The pyramid of VMamba and LocalVMamba: a stem, four stages of blocks on a grid, and a classifier.

A family defines its stem, the way down between stages, and how the scans of a block run over the grid. The grid is (B,
H, W, D) throughout; keys of the state dict are those of the official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..reduction import Cost
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
    halved,
    linear,
    reset_linear,
    reset_scan,
    total,
    typed,
)
from .layers import Captured
from .spec import ModelSpec

DIRECTIONS = 4


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

    def forward(self, x: Tensor, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, H, W, D) -> (B, H, W, D), and the signals that are `wanted`, places row by row in every direction."""
        hidden = kernels.linear(x, self.in_proj.weight)
        hidden, z = hidden.chunk(2, dim=-1) if self.gated else (hidden, None)  # (B, H, W, E)
        u = F.silu(self.conv2d(hidden.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y, captured = self.sum_of_scans(u, wanted)
        y = self.out_norm(y)
        y = y if z is None else y * F.silu(z)
        update = kernels.linear(y, self.out_proj.weight)
        return update, captured | capture(wanted, {"update": lambda: update.flatten(1, 2)})

    def sum_of_scans(self, u: Tensor, wanted: Sequence[str]) -> tuple[Tensor, Captured]:
        """u (B, H, W, E) -> the same, and the `wanted` signals."""
        raise NotImplementedError

    def direction(self, u: Tensor, k: int, reverse: bool) -> kernels.Direction:
        """Direction k of u (B, L, E), in the order of u."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt, B, C = kernels.linear(u, self.x_proj_weight[k]).split(sizes, dim=-1)  # (B, L, R), (B, L, N), (B, L, N)
        A = -torch.exp(self.A_logs.view(DIRECTIONS, self.d_inner, -1)[k])
        D = self.Ds.view(DIRECTIONS, -1)[k]
        return kernels.Direction(dt, A, B, C, D, self.dt_projs_bias[k], self.dt_projs_weight[k], reverse)

    def cost(self, grid: Sides) -> Cost:
        """MACs of one image."""
        length, inner = math.prod(grid), self.d_inner
        projections = (self.in_proj.weight.numel() + self.out_proj.weight.numel()) * length
        # without the gate that `scan_macs` counts: here it is one for all directions
        scan = inner * (self.dt_rank + 2 * self.d_state - 1) * length
        scan += kernels.scan_macs(length, inner, self.d_state, self.dt_rank)
        others = (DIRECTIONS - 1) * scan
        # the published counts have all four directions
        return Cost(projections, self.conv2d.weight.numel() * length, scan, directions=others, quirks=others)


class Block(nn.Module):
    """x + op(norm(x)), then x + mlp(norm2(x)) where there is an MLP."""

    def __init__(self, d_model: int, op: DirectedScan, mlp_ratio: int) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.op = op
        self.norm2 = LayerNorm(d_model) if mlp_ratio else None
        self.mlp = Mlp(d_model, mlp_ratio) if mlp_ratio else None

    def forward(self, x: Tensor, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, H, W, D) fp32 -> the same, and the `wanted` signals."""
        dtype = self.op.in_proj.weight.dtype
        update, captured = self.op(self.norm(x, dtype), wanted)
        x = x + update
        if self.mlp is not None and self.norm2 is not None:
            x = x + self.mlp(self.norm2(x, dtype))
        return x, captured

    def cost(self, grid: Sides) -> Cost:
        mlp = self.mlp.macs() * math.prod(grid) if self.mlp is not None else 0
        return self.op.cost(grid) + Cost(mlp)


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

    def forward(self, x: Tensor) -> Tensor:
        """The blocks alone: x (B, H, W, D) -> the same."""
        for block in self.blocks:
            x, _ = block(x)
        return x


class Classifier(nn.Module):
    """Logits from the mean over the normed grid."""

    def __init__(self, d_model: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, D) -> (B, num_classes)."""
        pooled = self.norm(x).mean((1, 2))
        return linear(pooled.to(self.head.weight.dtype), self.head).to(torch.float32)


class Pyramid(GridModel):
    """The trunk, for images of any size."""

    why_dense = "convolutions over the grid stand in its blocks, and strides of 2 between its stages"

    def __init__(
        self, config: GridConfig, spec: ModelSpec | None, stem: nn.Sequential, stages: Sequence[Stage], d_model: int
    ) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.patch_embed = stem
        self.layers = nn.ModuleList(stages)
        self.classifier = Classifier(d_model, config.num_classes)
        reset_linear(self)

    def stages(self) -> list[Stage]:
        """The four stages, with their type."""
        return typed(self.layers, Stage)

    def layers_of_maps(self) -> Sequence[nn.Module]:
        return self.stages()

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/4, W/4, D) fp32."""
        first = typed(self.patch_embed, Conv2d)[0]
        self.check(images, first.kernel_size[0] - 2 * int(first.padding[0]))
        return self.patch_embed(images).to(torch.float32)

    def run(self, images: Tensor, layers: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """(B, H/32, W/32, 8 D), sides rounded up, and the maps behind the stages `layers`, before the way down."""
        x, seen = self.embed(images), []
        for s, stage in enumerate(self.stages()):
            x = stage(x)
            if s in layers:
                seen.append(x.permute(0, 3, 1, 2))
            x = stage.downsample(x).to(torch.float32)
        return x, seen

    def forward_head(self, x: Tensor) -> Tensor:
        return self.classifier(x)

    def cost(self, image_size: ImageSize = None) -> Cost:
        """MACs of one image; the convolutions and projections between the stages are counted as stem."""
        grid = self.sides(image_size)
        costs = [Cost(head=self.classifier.head.weight.numel())]
        for convolution in typed(self.patch_embed, Conv2d):
            grid = behind(convolution, grid)
            costs.append(Cost(stem=convolution.weight.numel() * math.prod(grid)))
        for stage in self.stages():
            costs += [block.cost(grid) for block in typed(stage.blocks, Block)]
            if isinstance(stage.downsample, PatchMerging | Halving):
                grid = halved(grid)
                costs.append(Cost(stem=stage.downsample.macs() * math.prod(grid)))
        return total(costs)
