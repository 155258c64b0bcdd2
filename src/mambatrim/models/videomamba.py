"""VideoMamba (arXiv 2403.06977) for images and videos: Vim's blocks with the directions added, the class token first.

A video becomes one sequence, frame by frame: the position embedding is that of a frame, and the patches (not the class
token) get a temporal one besides. State-dict keys are those of the official checkpoints. Names: videomamba_SIZE_SIDE
for images (224 is not said), videomamba_SIZE_DATA_fFRAMES_SIDE for videos (K400 and 224 are not said), and
SIZE_mask for what was pretrained by masking: videomamba_tiny_448, videomamba_tiny_f8, videomamba_middle_mask_ssv2_f16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..reduction import Score
from .flat import FlatConfig, FlatMamba, ImageSize
from .layers import join_rows, resize_frames, resize_positions, split_rows
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess

# At index 0 the forward scan has seen nothing but the class token: all that the last block's class token learns comes
# by the backward one. MTR's score from that direction alone, as an option: methods.mtr(score=BACKWARD_DELTA).
BACKWARD_DELTA = Score(
    "backward delta", ("dt_mean",), lambda signals: signals.dt_mean[:, 1], lambda d_model, d_inner: d_inner
)
# what the scripts for fine-tuning put in front of the names
PREFIXES = ("backbone.", "encoder.")


@dataclass(frozen=True)
class VideoMambaConfig(FlatConfig):
    """Besides the common sizes: frames of the input (None for images), and how many of them a patch covers."""

    frames: int | None = None
    tubelet: int = 1

    def __post_init__(self) -> None:
        if self.tubelet < 1 or (self.frames is not None and self.frames < self.tubelet):
            raise ValueError(f"frames must be at least the tubelet, which is at least 1, got {self.frames} frames")

    @property
    def sides(self) -> tuple[int, ...]:
        return self.image_size if self.frames is None else (self.frames, *self.image_size)

    def with_sides(self, sides: tuple[int, ...]) -> VideoMambaConfig:
        return replace(super().with_sides(sides[-2:]), frames=None if self.frames is None else sides[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        return super().kernel if self.frames is None else (self.tubelet, *super().kernel)

    @property
    def steps(self) -> tuple[int, ...]:
        return super().steps if self.frames is None else (self.tubelet, *super().steps)


class VideoMamba(FlatMamba):
    """VideoMamba: (B, C, H, W), or (B, C, T, H, W) where the configuration has frames."""

    config: VideoMambaConfig
    scale: ClassVar[float] = 1.0

    def __init__(self, config: VideoMambaConfig, spec: ModelSpec | None = None) -> None:
        super().__init__(config, spec)
        if config.frames is not None:
            times = self.patch_embed.grid(*config.sides)[0]
            # zeros: a model that was inflated from images begins as that model on every frame
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, times, config.d_model))
        self.reset()

    def special_at(self, patches: int) -> tuple[int, ...]:
        return (0,)

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        table = self.table(grid[-2:])  # (1, h w + 1, D)
        if self.config.frames is None:
            return table
        space, own = split_rows(table, self.special_at(table.shape[1] - 1))
        time = resize_frames(self.temporal_pos_embedding, grid[0])  # (1, t, D)
        both = space.unsqueeze(1) + time.unsqueeze(2)  # (1, t, h w, D)
        return join_rows(both.flatten(1, 2), own, self.special_at(both.shape[1] * both.shape[2]))

    @torch.no_grad()
    def resize(self, image_size: ImageSize) -> None:
        super().resize(image_size)
        if self.config.frames is not None:
            times = self.patch_embed.grid(*self.config.sides)[0]
            self.temporal_pos_embedding = nn.Parameter(resize_frames(self.temporal_pos_embedding, times).detach())


# ---------------------------------------------------------------------------------------------------------- checkpoints


def convert(state: Mapping[str, Tensor], config: VideoMambaConfig) -> dict[str, Tensor]:
    """The weights of a published file under the model's names; those of an image model are inflated for a video."""
    bare = {next((name[len(p) :] for p in PREFIXES if name.startswith(p)), name): x for name, x in state.items()}
    kernel = bare.get("patch_embed.proj.weight")
    flat = kernel is not None and kernel.dim() == 4
    return inflate(bare, config) if flat and config.frames is not None else bare


def inflate(state: Mapping[str, Tensor], config: VideoMambaConfig) -> dict[str, Tensor]:
    """The weights of an image model, or of a model of other frames, made to fit a video model.

    The kernel (D, C, p, p) becomes the centre of one over `tubelet` frames, zeros elsewhere. The position table, of a
    square grid, is resized (bicubic) around the row of its class token, the temporal one along time (linear); where
    there is none it is zero. All other entries stay as they are.

    Raises:
        ValueError: `config` is that of an image model, an entry is missing, or the table's grid is not square.
    """
    if config.frames is None:
        raise ValueError("inflate makes weights of a video model, but this configuration has no frames")
    inflated = dict(state)
    for needed in ("patch_embed.proj.weight", "pos_embed"):
        if needed not in state:
            raise ValueError(f"weights of an image model have an entry {needed}, and these have none")
    kernel, table = state["patch_embed.proj.weight"], state["pos_embed"]
    if kernel.dim() == 4:
        centre = torch.zeros_like(kernel).unsqueeze(2).repeat(1, 1, config.tubelet, 1, 1)  # (D, C, t, p, p)
        centre[:, :, config.tubelet // 2] = kernel
        inflated["patch_embed.proj.weight"] = centre
    times, *grid = (
        (n - one) // step + 1 for n, one, step in zip(config.sides, config.kernel, config.steps, strict=True)
    )
    inflated["pos_embed"] = _resize_square(table, tuple(grid))
    time = state.get("temporal_pos_embedding", torch.zeros_like(table[:, :times]))
    inflated["temporal_pos_embedding"] = resize_frames(time, times)
    return inflated


def _resize_square(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(1, n n + 1, D), the class token's row first -> the same for a grid (h, w)."""
    if table.shape[1] == math.prod(grid) + 1:
        return table
    patches, own = split_rows(table, (0,))
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise ValueError(f"a position table of {patches.shape[1]} patches is not that of a square grid")
    return join_rows(resize_positions(patches, (side, side), grid), own, (0,))


# -------------------------------------------------------------------------------------------------------------- entries

REPO, SOURCE, PATCH = "OpenGVLab/VideoMamba", "https://github.com/OpenGVLab/VideoMamba", 16
# D, blocks, entries and parameters of the image model of 224 pixels and 1,000 classes
SIZES = {
    "tiny": (192, 24, 415, 7_148_008),
    "small": (384, 24, 415, 25_796_584),
    "middle": (576, 32, 551, 74_217_448),
    "base": (768, 24, 415, 97_598_440),
}
# its name in the tables, and its classes
DATA = {
    "k400": ("Kinetics-400", 400),
    "ssv2": ("Something-Something-v2", 174),
    "breakfast": ("Breakfast", 10),
    "coin": ("COIN", 180),
}


def _checkpoint(size: str, config: VideoMambaConfig, file: str, key: str, top1: float, dataset: str) -> CheckpointFile:
    _, _, entries, parameters = SIZES[size]
    patches = (config.image_size[0] // PATCH) * (config.image_size[1] // PATCH)
    base = FlatConfig()
    rows = patches - (base.image_size[0] // PATCH) * (base.image_size[1] // PATCH) + (config.frames or 0)
    parameters += config.d_model * rows + (config.d_model + 1) * (config.num_classes - base.num_classes)
    return CheckpointFile(REPO, file, key, entries + (config.frames is not None), parameters, top1, dataset)


def _image(size: str, side: int, top1: float) -> ModelSpec:
    d_model, depth, *_ = SIZES[size]
    config = VideoMambaConfig(image_size=(side, side), d_model=d_model, depth=depth)
    steps = {224: "224", 448: "224to448", 576: "224to448to576"}
    file = f"videomamba_{size[0]}{PATCH}_in1k_res{steps[side]}.pth"
    return ModelSpec(
        name=f"videomamba_{size}" + (f"_{side}" if side != 224 else ""),
        family="videomamba",
        config=config,
        preprocess=Preprocess((side, side), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        checkpoint=_checkpoint(size, config, file, "model", top1, "ImageNet-1K"),
        licence="Apache-2.0",
        source=SOURCE,
    )


def _video(size: str, data: str, frames: int, top1: float, side: int = 224, mask: bool = False) -> ModelSpec:
    d_model, depth, *_ = SIZES[size]
    dataset, classes = DATA[data]
    config = VideoMambaConfig((side, side), d_model=d_model, depth=depth, num_classes=classes, frames=frames)
    parts = ["videomamba", size, *(["mask"] if mask else []), *([data] if data != "k400" else []), f"f{frames}"]
    masked, to = "_mask_ft" if mask else "", f"to{side}" if side != 224 else ""
    file = f"videomamba_{size[0]}{PATCH}_{data}{masked}_f{frames}_res224{to}.pth"
    # the authors' tables link other files in the place of these two, so that their names are not known
    unknown = mask and (data, frames, side) in (("k400", 16, 224), ("ssv2", 16, 224))
    return ModelSpec(
        name="_".join([*parts, *([str(side)] if side != 224 else [])]),
        family="videomamba",
        config=config,
        # of each frame; the published accuracies are means over three crops and several clips
        preprocess=Preprocess((side, side), 1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD),
        checkpoint=_checkpoint(size, config, "" if unknown else file, "", top1, dataset),
        licence="Apache-2.0",
        source=SOURCE,
    )


# image models: side and ImageNet-1K top-1
IMAGES: dict[str, dict[int, float]] = {
    "tiny": {224: 76.9, 448: 79.3, 576: 79.6},
    "small": {224: 81.2, 448: 83.2, 576: 83.5},
    "middle": {224: 82.8, 448: 83.8, 576: 84.0},
    "base": {224: 82.7},
}
# video models: data, frames and side, and top-1 of tiny, small, middle, and middle pretrained by masking
VIDEOS: dict[tuple[str, int, int], tuple[float, float, float, float]] = {
    ("k400", 8, 224): (76.9, 79.3, 80.6, 82.0),
    ("k400", 16, 224): (78.1, 80.8, 81.9, 83.4),
    ("k400", 32, 224): (78.8, 81.5, 82.4, 83.9),
    ("k400", 64, 224): (79.6, 81.8, 82.8, 84.3),
    ("k400", 64, 384): (80.3, 82.7, 83.3, 85.0),
    ("ssv2", 8, 224): (65.1, 66.6, 67.3, 70.2),
    ("ssv2", 16, 224): (66.0, 67.7, 68.3, 71.0),
    ("ssv2", 16, 288): (66.2, 68.1, 68.4, 71.4),
    ("breakfast", 32, 224): (94.3, 95.3, 94.8, 97.9),
    ("breakfast", 64, 224): (94.3, 97.4, 95.8, 96.9),
    ("coin", 32, 224): (86.2, 88.4, 88.3, 89.6),
    ("coin", 64, 224): (87.0, 88.7, 89.5, 90.4),
}
_ENTRIES = [_image(size, side, top1) for size, sides in IMAGES.items() for side, top1 in sides.items()] + [
    _video(size, data, frames, top1[column], side, mask)
    for column, (size, mask) in enumerate((("tiny", False), ("small", False), ("middle", False), ("middle", True)))
    for (data, frames, side), top1 in VIDEOS.items()
]
VARIANTS: dict[str, ModelSpec] = {spec.name: spec for spec in _ENTRIES}
