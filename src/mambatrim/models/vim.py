"""Vim (Vision Mamba, arXiv 2401.09417): bidirectional Mamba blocks, a class token in the middle of the sequence.

Keys of the state dict are those of the official checkpoints; the two-stream blocks of the official code are one fp32
stream here (the adds are the same). The architecture: patch embedding, class token inserted at M // 2 before the
position embedding is added, blocks, norm of the class token, linear head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..reduction import Cost, Reducer, Tokens
from .layers import BiMambaMixer, Block, PatchEmbed, RMSNorm, resize_positions
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess

ImageSize = int | tuple[int, ...] | None


@dataclass(frozen=True)
class VimConfig:
    """Sizes in pixels, then D, the number of blocks and N. The mixer doubles the width, and its filter has 4 taps."""

    image_size: tuple[int, int] = (224, 224)
    patch: int = 16
    stride: int = 16
    d_model: int = 192
    depth: int = 24
    d_state: int = 16
    num_classes: int = 1000
    in_chans: int = 3


class Vim(nn.Module):
    """Vision Mamba. `reducer` decides what happens between blocks; by default nothing."""

    reducer: Reducer

    def __init__(self, config: VimConfig, spec: ModelSpec | None = None) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.patch_embed = PatchEmbed(config.in_chans, config.d_model, config.patch, config.stride)
        patches = math.prod(self.patch_embed.grid(*config.image_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, config.d_model))
        mixers = (BiMambaMixer(config.d_model, config.d_state, scale=0.5) for _ in range(config.depth))
        self.layers = nn.ModuleList(Block(config.d_model, mixer) for mixer in mixers)
        self.norm_f = RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.num_classes)
        self.reducer = Reducer.dense()
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values as in Vim: truncated normal embeddings, residual projections scaled with the depth."""
        for table in (self.cls_token, self.pos_embed, self.head.weight):
            nn.init.trunc_normal_(table, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.patch_embed.reset()
        for layer in self.blocks():
            nn.init.kaiming_uniform_(layer.mixer.out_proj.weight, a=math.sqrt(5))
            layer.mixer.out_proj.weight /= math.sqrt(self.depth)

    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def d_model(self) -> int:
        return self.config.d_model

    @property
    def d_inner(self) -> int:
        return self.blocks()[0].mixer.d_inner

    def num_patches(self, image_size: ImageSize = None) -> int:
        """Patches that the stem makes of an image: a side, (height, width), or None for the configured size."""
        return math.prod(self.patch_embed.grid(*self._sides(image_size)))

    def special_tokens(self, image_size: ImageSize = None) -> tuple[int, ...]:
        """Where the stem puts the class token: in the middle."""
        return (self.num_patches(image_size) // 2,)

    def _sides(self, image_size: ImageSize) -> tuple[int, int]:
        if image_size is None:
            return self.config.image_size
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return height, width

    def embed(self, images: Tensor) -> Tokens:
        """(B, C, H, W), any size from one patch on -> Tokens of M + 1 rows, the class token at M // 2."""
        if images.dim() != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(f"images must be (B, {self.config.in_chans}, H, W), got {tuple(images.shape)}")
        grid = self.patch_embed.grid(images.shape[2], images.shape[3])
        patches = self.patch_embed(images)  # (B, M, D)
        # the class token's own row of the table stands in the middle: it is taken out before the grid is resized
        middle = (self.pos_embed.shape[1] - 1) // 2
        table = torch.cat([self.pos_embed[:, :middle], self.pos_embed[:, middle + 1 :]], dim=1)
        table = resize_positions(table, self.patch_embed.grid(*self.config.image_size), grid)
        patches = patches + table
        cls = (self.cls_token + self.pos_embed[:, middle : middle + 1]).expand(len(images), -1, -1)
        half = patches.shape[1] // 2
        return Tokens.start(torch.cat([patches[:, :half], cls, patches[:, half:]], dim=1).to(torch.float32), grid)

    def forward_features(self, images: Tensor) -> Tokens:
        """The tokens after the last block, before the final norm."""
        tokens = self.embed(images)
        for i, layer in enumerate(self.blocks()):
            x, captured = layer(tokens.x, self.reducer.needs(i))
            tokens = self.reducer(i, tokens.with_x(x), captured)
        return tokens

    def forward_head(self, tokens: Tokens) -> Tensor:
        """Logits (B, num_classes) from the class token, wherever it is now."""
        middle = math.prod(tokens.grid) // 2  # for other image sizes than the configured one too
        cls = tokens.take((middle,))[:, 0]  # (B, D)
        return self.head(self.norm_f(cls, self.head.weight.dtype)).to(torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    # ------------------------------------------------------------------------------------------------------------ cost

    def block_cost(self, length: int) -> Cost:
        """MACs of one block for one image of `length` tokens."""
        return self.blocks()[0].cost(length)

    def stem_cost(self, image_size: ImageSize = None) -> Cost:
        per_patch = self.patch_embed.proj.weight.numel()
        # counters of the papers embed the class token too
        return Cost(stem=self.num_patches(image_size) * per_patch, quirks=per_patch)

    def head_cost(self) -> Cost:
        return Cost(head=self.head.weight.numel())


def _entry(
    name: str, d_model: int, stride: int, parameters: int, top1: float, file: str, key: str = "model"
) -> ModelSpec:
    size = name.removeprefix("vim_").removesuffix("_plus")
    checkpoint = CheckpointFile(f"hustvl/Vim-{size}-midclstok", file, key, 415, parameters, top1)
    return ModelSpec(
        name=name,
        family="vim",
        config=VimConfig(d_model=d_model, stride=stride),
        preprocess=Preprocess((224, 224), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        checkpoint=checkpoint,
        licence="Apache-2.0",
        source="https://github.com/hustvl/Vim",
    )


VARIANTS: dict[str, ModelSpec] = {
    "vim_tiny": _entry("vim_tiny", 192, 16, 7_148_008, 76.1, "vim_t_midclstok_76p1acc.pth"),
    "vim_small": _entry("vim_small", 384, 16, 25_796_584, 80.5, "vim_s_midclstok_80p5acc.pth"),
    # the published accuracy of Base belongs to the averaged weights
    "vim_base": _entry("vim_base", 768, 16, 97_598_440, 81.9, "vim_b_midclstok_81p9acc.pth", "model_ema"),
    # in the repositories of the stride-16 models, under file names that were not known when this was written
    "vim_tiny_plus": _entry("vim_tiny_plus", 192, 8, 7_250_344, 78.3, ""),
    "vim_small_plus": _entry("vim_small_plus", 384, 8, 26_001_256, 81.6, ""),
    "vim_cifar10": ModelSpec(
        name="vim_cifar10",
        family="vim",
        config=VimConfig((32, 32), patch=4, stride=4, d_model=160, depth=12, d_state=8, num_classes=10),
        preprocess=Preprocess((32, 32), 1.0, "bicubic", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        checkpoint=None,
        licence="Apache-2.0",
        source="recipes/train_cifar10.py",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}
