"""MambaVision (arXiv 2407.08083): two stages of convolutions, then two stages of Mamba mixers and attention in windows.

Keys of the state dict are those of the official checkpoints. Windows are entries of the batch, so convolution and scan
begin anew in each. A stage is padded to whole windows once, before its blocks: padding is a token like any other in
them, and is cut off behind them. Tokens are removed in the stages of windows only, as many in every window; what is
left of a window is a shorter sequence for its convolutions of three steps, as in flat models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from ..reduction import Cost, Section, Tokens
from .grid import (
    BatchNorm2d,
    Conv2d,
    GridConfig,
    GridModel,
    ImageSize,
    Sides,
    behind,
    linear,
    reset_linear,
    total,
    typed,
    usual_blocks,
)
from .mambavision_blocks import Attention, Block, ConvBlock, Downsample, MambaVisionMixer, Stem
from .orders import from_windows, to_windows
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess


@dataclass(frozen=True, kw_only=True)
class MambaVisionConfig(GridConfig):
    """D of the first stage and channels inside the stem, blocks of each stage; attention heads and window sides of the
    last two stages; whether their blocks scale what they add (Base and larger)."""

    d_model: int = 80
    stem: int = 32
    depths: tuple[int, int, int, int] = (1, 3, 8, 4)
    heads: tuple[int, int] = (8, 16)
    windows: tuple[int, int] = (14, 7)
    layer_scale: bool = False


class ConvLevel(nn.Module):
    """A stage of convolutions, and the way down to the next."""

    def __init__(self, d_model: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(d_model) for _ in range(depth))
        self.downsample = Downsample(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """The blocks alone: x (B, D, H, W) -> the same."""
        for block in self.blocks:
            x = block(x)
        return x

    def cost(self, grid: Sides) -> Cost:
        """MACs of the blocks for one image."""
        return total(block.cost(math.prod(grid)) for block in typed(self.blocks, ConvBlock))


class WindowLevel(nn.Module):
    """A stage of blocks in windows: Mamba mixers in the first half of the blocks, attention in the rest."""

    def __init__(self, d_model: int, depth: int, heads: int, window: int, layer_scale: bool, last: bool) -> None:
        super().__init__()
        self.d_model, self.window = d_model, window
        mixers = (
            MambaVisionMixer(d_model) if i < math.ceil(depth / 2) else Attention(d_model, heads) for i in range(depth)
        )
        self.blocks = nn.ModuleList(Block(d_model, mixer, layer_scale) for mixer in mixers)
        self.downsample = nn.Identity() if last else Downsample(d_model)

    def typed_blocks(self) -> list[Block]:
        """The blocks, with their type."""
        return typed(self.blocks, Block)

    def section(self, grid: Sides) -> Section:
        """The blocks on a grid of this size, padding included."""
        blocks, windows = self.typed_blocks(), math.prod(-(-side // self.window) for side in grid)
        # only mixers have a time step
        without = tuple(i for i, block in enumerate(blocks) if isinstance(block.mixer, Attention))
        return Section(
            patches=self.window**2,
            d_model=self.d_model,
            d_inner=self.d_model // 2,
            costs=tuple(cache(partial(block.cost, windows=windows)) for block in blocks),
            after=tuple(i for i in usual_blocks(len(blocks)) if i not in without),
            windows=windows,
            without_scan=without,
        )


class MambaVision(GridModel):
    """MambaVision, for images of any size."""

    config: MambaVisionConfig

    def __init__(self, config: MambaVisionConfig, spec: ModelSpec | None = None) -> None:
        super().__init__(config, spec)
        widths = [config.d_model * 2**stage for stage in range(4)]
        self.patch_embed = Stem(config.in_chans, config.stem, config.d_model)
        levels: list[nn.Module] = [ConvLevel(widths[s], config.depths[s]) for s in (0, 1)]
        for s, heads, window in zip((2, 3), config.heads, config.windows, strict=True):
            levels.append(WindowLevel(widths[s], config.depths[s], heads, window, config.layer_scale, last=s == 3))
        self.levels = nn.ModuleList(levels)
        self.norm = BatchNorm2d(widths[3])
        self.head = nn.Linear(widths[3], config.num_classes)
        reset_linear(self)
        for mixer in typed(self.modules(), MambaVisionMixer):
            mixer.reset()

    def stages(self) -> list[ConvLevel | WindowLevel]:
        """The four stages, with their type."""
        return [level for level in self.levels if isinstance(level, ConvLevel | WindowLevel)]

    def blocks(self) -> list[Block]:
        """Those of the stages of windows."""
        return [block for level in typed(self.levels, WindowLevel) for block in level.typed_blocks()]

    def layers_of_maps(self) -> Sequence[nn.Module]:
        return self.stages()

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H/4, W/4) fp32, sides rounded up."""
        self.check(images, 1)
        return self.patch_embed(images)

    def places(self, blocks: Sequence[nn.Module], tokens: Tokens) -> Tensor | None:
        """What attention adds to its logits for every token, (B, 1, 1, L): the logarithm of how many it stands for."""
        reduced = tokens.x.shape[1] < tokens.origin.length
        return tokens.size.log()[:, None, None] if reduced else None

    def run(self, images: Tensor, layers: Collection[int]) -> tuple[Tensor, list[Tensor]]:
        """(B, 8 D, H/32, W/32), sides rounded up, and the maps behind the stages `layers`, before the way down."""
        x, seen, first = self.embed(images), [], 0
        for s, level in enumerate(self.stages()):
            if isinstance(level, WindowLevel):
                blocks, side, grid = level.typed_blocks(), level.window, (x.shape[2], x.shape[3])
                rows, _ = self.through(blocks, to_windows(x, side), (side, side), first)
                x, first = from_windows(rows, side, grid), first + len(blocks)
            else:
                x = level(x)
            if s in layers:
                seen.append(x)
            x = level.downsample(x).to(torch.float32)
        return x, seen

    def forward_head(self, tokens: Tokens) -> Tensor:
        image = tokens.x.transpose(1, 2).unflatten(2, tokens.grid)
        pooled = self.norm(image).mean((2, 3))
        return linear(pooled.to(self.head.weight.dtype), self.head).to(torch.float32)

    def grids(self, image_size: ImageSize = None) -> list[Sides]:
        """The grid of each stage."""
        grid, grids = self.sides(image_size), []
        for convolution in typed(self.patch_embed.modules(), Conv2d):
            grid = behind(convolution, grid)
        for level in self.stages():
            grids.append(grid)
            for convolution in typed(level.downsample.modules(), Conv2d):
                grid = behind(convolution, grid)
        return grids

    def sections(self, image_size: ImageSize = None) -> tuple[Section, ...]:
        pairs = zip(self.stages(), self.grids(image_size), strict=True)
        return tuple(level.section(grid) for level, grid in pairs if isinstance(level, WindowLevel))

    def stem_cost(self, image_size: ImageSize = None) -> Cost:
        costs, grid = [], self.sides(image_size)

        def down(modules: nn.Module) -> None:
            nonlocal grid
            for convolution in typed(modules.modules(), Conv2d):
                grid = behind(convolution, grid)
                costs.append(Cost(stem=convolution.weight.numel() * math.prod(grid)))

        down(self.patch_embed)
        for level in self.stages():
            if isinstance(level, ConvLevel):
                costs.append(level.cost(grid))
            down(level.downsample)
        return total(costs)

    def head_cost(self) -> Cost:
        return Cost(head=self.head.weight.numel())


def convert(state: Mapping[str, Tensor], config: MambaVisionConfig) -> dict[str, Tensor]:
    """Weights as they are published -> under the keys of the model.

    Files of a larger system hold the model under "encoder."; files of old versions of torch lack the counters of the
    batch norms, which nothing is calculated with.
    """
    encoder = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    found = encoder or dict(state)
    for name in list(found):
        if name.endswith(".running_mean"):
            found.setdefault(f"{name.removesuffix('running_mean')}num_batches_tracked", torch.tensor(0))
    return found


def _entry(
    name: str, config: MambaVisionConfig, counts: tuple[int, int], top1: float, crop: float, weights: str
) -> ModelSpec:
    repo, file = weights.split(":")
    where = f"nvidia/MambaVision-{repo}", f"mambavision_{file}.pth.tar", "state_dict"
    squash = config.image_size == (512, 512)
    return ModelSpec(
        name=f"mambavision_{name}",
        family="mambavision",
        config=config,
        preprocess=Preprocess(config.image_size, crop, "bicubic", IMAGENET_MEAN, IMAGENET_STD, squash),
        checkpoint=CheckpointFile(*where, *counts, top1),
        licence="NVIDIA Source Code License-NC: no commercial use",
        source="https://github.com/NVlabs/MambaVision",
    )


def _config(d_model: int, third: int, heads: int) -> MambaVisionConfig:
    """Base and larger; `third` blocks in the third stage, `heads` in its attention."""
    depths, pair = (3, 3, third, 5), (heads, 2 * heads)
    return MambaVisionConfig(d_model=d_model, stem=64, depths=depths, heads=pair, layer_scale=True)


_T2 = MambaVisionConfig(depths=(1, 3, 11, 4))
_S = MambaVisionConfig(d_model=96, stem=64, depths=(3, 3, 7, 5))
_B, _L, _L2 = _config(128, 10, 8), _config(196, 10, 16), _config(196, 12, 16)
_L2_512 = replace(_L2, image_size=(512, 512), windows=(32, 16))
_L3_256 = replace(_config(256, 20, 16), image_size=(256, 256), depths=(3, 3, 20, 10), windows=(16, 8))
_L3_512 = replace(_L3_256, image_size=(512, 512), windows=(32, 16))
# entries and parameters
_T_HAS, _T2_HAS, _S_HAS, _B_HAS = (252, 31_794_248), (298, 35_104_008), (285, 50_140_584), (356, 97_685_288)
_L_HAS, _L2_HAS, _L3_HAS = (356, 227_961_048), (389, 241_554_824), (601, 739_570_472)

VARIANTS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _entry("tiny", MambaVisionConfig(), _T_HAS, 82.3, 1.0, "T-1K:tiny_1k"),
        _entry("tiny2", _T2, _T2_HAS, 82.7, 0.98, "T2-1K:tiny2_1k"),
        _entry("small", _S, _S_HAS, 83.3, 0.93, "S-1K:small_1k"),
        _entry("base", _B, _B_HAS, 84.2, 1.0, "B-1K:base_1k"),
        _entry("large", _L, _L_HAS, 85.0, 1.0, "L-1K:large_1k"),
        _entry("large2", _L2, _L2_HAS, 85.3, 1.0, "L2-1K:large2_1k"),
        # trained on ImageNet-21K, then on ImageNet-1K
        _entry("base_21k", _B, _B_HAS, 84.9, 1.0, "B-21K:base_21k"),
        _entry("large_21k", _L, _L_HAS, 86.1, 1.0, "L-21K:large_21k"),
        # at 512 pixels the official evaluation squashes the whole picture into a square before it crops
        _entry("large2_512_21k", _L2_512, _L2_HAS, 87.3, 0.93, "L2-512-21K:L2_21k_240m_512"),
        _entry("large3_256_21k", _L3_256, _L3_HAS, 87.3, 1.0, "L3-256-21K:L3_21k_740m_256"),
        _entry("large3_512_21k", _L3_512, _L3_HAS, 88.1, 0.93, "L3-512-21K:L3_21k_740m_512"),
    )
}
