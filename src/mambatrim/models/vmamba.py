"""VMamba (arXiv 2401.10166): a pyramid of blocks that scan their grid in four directions.

Two generations: version 2, and the first one ("vanilla"), which gates, merges patches and has no MLP. Keys of the state
dict are those of the official checkpoints; the official models that keep the channels first have the same keys and
results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..reduction import Tokens
from .grid import Conv2d, GridConfig, LayerNorm, Permute, capture
from .layers import Captured
from .orders import Walk, column_order, restricted
from .pyramid import Block, DirectedScan, Halving, PatchMerging, Places, Pyramid, Stage
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess

_MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class VMambaConfig(GridConfig):
    """D of the first stage, blocks of each stage, E / D, and N; `vanilla` for the first generation."""

    d_model: int = 96
    depths: tuple[int, ...] = (2, 2, 5, 2)
    expand: int = 2
    d_state: int = 1
    vanilla: bool = False


class CrossScan(DirectedScan):
    """Rows, columns, and both from their end ("SS2D", section 4.2)."""

    def orders(self) -> tuple[str, ...]:
        return ("columns",)

    def sum_of_scans(self, u: Tensor, places: Places, wanted: Sequence[str]) -> tuple[Tensor, Captured]:
        way = places.walks["columns"]
        by_column = way.spread(u)  # (B, L, E)
        rows = [self.direction(u, k, reverse=k == 2) for k in (0, 2)]
        columns = [self.direction(by_column, k, reverse=k == 3) for k in (1, 3)]
        along = kernels.scan(u.expand(2, *u.shape), rows)
        down = kernels.scan(by_column.expand(2, *by_column.shape), columns)

        def each(signal: Callable[[Tensor, kernels.Direction], Tensor]) -> Tensor:
            (first, third), (second, fourth) = (
                [signal(x, d) for d in pair] for x, pair in ((u, rows), (by_column, columns))
            )
            return torch.stack([first, way.left(second), third, way.left(fourth)], dim=1)  # (B, S, L, .)

        def dt_mean() -> Tensor:
            (first, third), (second, fourth) = along.dt_mean.unbind(1), down.dt_mean.unbind(1)
            return torch.stack([first, way.left(second), third, way.left(fourth)], dim=1)

        signals = {
            "dt": lambda: each(lambda x, d: reference.step_size(d.dt, d.dt_bias, d.dt_weight, softplus=True)),
            "dt_mean": dt_mean,
            "B": lambda: each(lambda x, d: d.B),
            "C": lambda: each(lambda x, d: d.C),
            "y": lambda: each(lambda x, d: kernels.scan(x[None], [d]).y),
        }
        return along.y + way.left(down.y), capture(wanted, signals)


def stem_of_patches(in_chans: int, d_model: int) -> nn.Sequential:
    """Patches of 4x4 pixels and a norm: (B, C, H, W) -> (B, H/4, W/4, D), rounded down."""
    return nn.Sequential(Conv2d(in_chans, d_model, 4, 4), Permute(0, 2, 3, 1), LayerNorm(d_model))


def _stem_of_two(in_chans: int, d_model: int) -> nn.Sequential:
    """Two convolutions of stride 2: (B, C, H, W) -> (B, H/4, W/4, D), rounded up."""
    first, second = Conv2d(in_chans, d_model // 2, 3, 2, 1), Conv2d(d_model // 2, d_model, 3, 2, 1)
    return nn.Sequential(
        *(first, Permute(0, 2, 3, 1), LayerNorm(d_model // 2), Permute(0, 3, 1, 2), nn.GELU()),
        *(second, Permute(0, 2, 3, 1), LayerNorm(d_model)),
    )


class VMamba(Pyramid):
    """VMamba, of either generation."""

    def __init__(self, config: VMambaConfig, spec: ModelSpec | None = None) -> None:
        vanilla, last = config.vanilla, len(config.depths) - 1
        stages = []
        for s, depth in enumerate(config.depths):
            width = config.d_model * 2**s
            scans = [CrossScan(width, config.expand, config.d_state, gated=vanilla) for _ in range(depth)]
            blocks = [Block(width, scan, 0 if vanilla else _MLP_RATIO) for scan in scans]
            down = PatchMerging if vanilla else Halving
            stages.append(Stage(blocks, None if s == last else down(width)))
        stem = stem_of_patches if vanilla else _stem_of_two
        super().__init__(config, spec, stem(config.in_chans, config.d_model), stages, width)

    def walk(self, name: str, tokens: Tokens) -> Walk:
        height, width = tokens.grid
        return restricted(column_order((height, width), tokens.x.device), tokens.origin.keep)


# names in files of the first generation, in the order in which they are replaced
_OLD_STEM = {"patch_embed.proj.": "patch_embed.0.", "patch_embed.norm.": "patch_embed.2."}
_OLD_HEAD = {"norm.": "classifier.norm.", "head.": "classifier.head."}
_OLD_PARTS = {".ln_1.": ".norm.", ".self_attention.": ".op."}


def convert(state: Mapping[str, Tensor], config: VMambaConfig) -> dict[str, Tensor]:
    """Weights as they are published -> under the keys of the model.

    Files of the first generation have older names; models with the channels first save projections as convolutions of
    1x1.
    """
    return {_renamed(name): _as_projection(name, tensor) for name, tensor in state.items()}


def _renamed(name: str) -> str:
    for old, new in (_OLD_STEM | _OLD_HEAD).items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    for old, new in _OLD_PARTS.items():
        name = name.replace(old, new)
    for part in ("x_proj", "dt_projs"):
        name = name.replace(f".op.{part}.weight", f".op.{part}_weight")
    return name


def _as_projection(name: str, tensor: Tensor) -> Tensor:
    is_projection = tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
    return tensor.flatten(1) if is_projection else tensor


def _entry(name: str, config: VMambaConfig, counts: tuple[int, int], top1: float, file: str) -> ModelSpec:
    release = "%23v0cls" if config.vanilla else "%23v2cls"
    return ModelSpec(
        name=name,
        family="vmamba",
        config=config,
        preprocess=Preprocess((224, 224), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        # not on the Hub: the file has to be fetched from the release page
        checkpoint=CheckpointFile("", file, "model", *counts, top1),
        licence="MIT",
        source=f"https://github.com/MzeroMiko/VMamba/releases/tag/{release}",
    )


def _v2(d_model: int, third: int, expand: int) -> VMambaConfig:
    return VMambaConfig(d_model=d_model, depths=(2, 2, third, 2), expand=expand)


def _v0(d_model: int, third: int) -> VMambaConfig:
    return VMambaConfig(d_model=d_model, depths=(2, 2, third, 2), d_state=16, vanilla=True)


VARIANTS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _entry("vmamba_tiny_s1l8", _v2(96, 8, 1), (276, 30_249_064), 82.6, "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        _entry("vmamba_tiny_s2l5", _v2(96, 5, 2), (222, 30_705_832), 82.5, "vssm_tiny_0230_ckpt_epoch_262.pth"),
        _entry("vmamba_small_s2l15", _v2(96, 15, 2), (402, 50_147_752), 83.6, "vssm_small_0229_ckpt_epoch_222.pth"),
        _entry("vmamba_small_s1l20", _v2(96, 20, 1), (492, 49_012_840), 83.3, "vssm1_small_0229s_ckpt_epoch_240.pth"),
        _entry("vmamba_base_s2l15", _v2(128, 15, 2), (402, 88_557_800), 83.9, "vssm_base_0229_ckpt_epoch_237.pth"),
        _entry("vmamba_base_s1l20", _v2(128, 20, 1), (492, 86_614_504), 83.8, "vssm1_base_0229s_ckpt_epoch_225.pth"),
        _entry("vanilla_vmamba_tiny", _v0(96, 9), (212, 22_893_448), 82.2, "vssmtiny_dp01_ckpt_epoch_292.pth"),
        _entry("vanilla_vmamba_small", _v0(96, 27), (446, 44_417_416), 83.5, "vssmsmall_dp03_ckpt_epoch_238.pth"),
        _entry("vanilla_vmamba_base", _v0(128, 27), (446, 76_254_056), 83.7, "vssmbase_dp06_ckpt_epoch_241.pth"),
    )
}
