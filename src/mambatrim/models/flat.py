"""FlatMamba: what Vim, VideoMamba and Mamba-Reg share. One sequence of patches and a few special tokens, bidirectional
blocks on one fp32 stream, a reducer between the blocks, and a head that reads the special tokens.

A family says where its special tokens stand (`special_at`), how position tables become a sequence (`positions`), and,
where that is more than a norm, what the classifier reads (`pool`). Everything else is here.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ..reduction import STEM, Cost, Reducer, Tokens
from .layers import BiMambaMixer, Block, PatchEmbed, RMSNorm, join_rows, linear, resize_positions, split_rows
from .packed import PackedTrunk
from .spec import ModelSpec
from .trunk import Trunk, through, whole

ImageSize = int | tuple[int, ...] | None


@dataclass(frozen=True)
class FlatConfig:
    """Sizes in pixels, then D, the number of blocks and N. The mixer doubles the width, and its filter has 4 taps."""

    image_size: tuple[int, int] = (224, 224)
    patch: int = 16
    stride: int = 16
    d_model: int = 192
    depth: int = 24
    d_state: int = 16
    num_classes: int = 1000
    in_chans: int = 3

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the input: (height, width), before them the frames of a video."""
        return self.image_size

    def with_sides(self, sides: tuple[int, ...]) -> Self:
        """The same model for another input."""
        height, width = sides
        return replace(self, image_size=(height, width))

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sides of a patch."""
        return self.patch, self.patch

    @property
    def steps(self) -> tuple[int, ...]:
        """Strides of the patches."""
        return self.stride, self.stride

    @property
    def special(self) -> int:
        """Class and register tokens."""
        return 1

    @property
    def features(self) -> int:
        """Width of what the classifier reads."""
        return self.d_model


class FlatMamba(nn.Module):
    """The trunk. `reducer` decides what happens between blocks; by default nothing.

    A family calls `reset` when it has made the parameters that it adds.
    """

    config: FlatConfig
    reducer: Reducer
    # factor on the sum of the two scans
    scale: ClassVar[float] = 0.5
    # whether the blocks can keep the clock of the recurrence running (`reduction.SequencePolicy`)
    takes_layout: ClassVar[bool] = True
    # whether patches can go before block 0
    reduces_stem: ClassVar[bool] = True

    def __init__(self, config: FlatConfig, spec: ModelSpec | None = None) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.patch_embed = PatchEmbed(config.in_chans, config.d_model, config.kernel, config.steps)
        patches = math.prod(self._table_grid())
        self.cls_token = nn.Parameter(torch.zeros(1, config.special, config.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + len(self.table_rows(patches)), config.d_model))
        mixers = (BiMambaMixer(config.d_model, config.d_state, scale=self.scale) for _ in range(config.depth))
        self.layers: nn.ModuleList = Trunk(Block(config.d_model, mixer) for mixer in mixers)
        self.norm_f = RMSNorm(config.d_model)
        self.head = nn.Linear(config.features, config.num_classes)
        self.reducer = Reducer.dense()

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
        return cast(list[Block], list(self.layers))

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def d_model(self) -> int:
        return self.config.d_model

    @property
    def d_inner(self) -> int:
        return self.blocks()[0].mixer.d_inner

    # ------------------------------------------------------------------------------------------------- sizes and places

    def sides(self, image_size: ImageSize = None) -> tuple[int, ...]:
        """All sides of an input: of a side, (height, width), (frames, height, width), or None for the model's own."""
        own = self.config.sides
        if image_size is None:
            return own
        given = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(given) not in (2, len(own)):
            names = ("frames", "height", "width")[-len(own) :]
            raise ValueError(f"an input size is a side, or ({', '.join(names)}), got {given}")
        return (*own[: len(own) - len(given)], *given)

    def num_patches(self, image_size: ImageSize = None) -> int:
        """Patches that the stem makes of an input; `image_size` as in `sides`."""
        return math.prod(self.patch_embed.grid(*self.sides(image_size)))

    def special_tokens(self, image_size: ImageSize = None) -> tuple[int, ...]:
        """Where the stem puts class and register tokens."""
        return self.special_at(self.num_patches(image_size))

    def special_at(self, patches: int) -> tuple[int, ...]:
        """Positions of the special tokens in the sequence that the stem makes, ascending."""
        raise NotImplementedError

    def table_rows(self, patches: int) -> tuple[int, ...]:
        """Rows of `pos_embed` that are the special tokens' own, in a table for so many patches."""
        return self.special_at(patches)

    def _table_grid(self) -> tuple[int, ...]:
        """(h, w) that `pos_embed` is for."""
        return self.patch_embed.grid(*self.config.sides)[-2:]

    def table(self, grid: tuple[int, ...]) -> Tensor:
        """`pos_embed` for another grid (h, w). Special tokens keep their rows; these move to where the tokens stand."""
        own = self._table_grid()
        if own == grid:
            return self.pos_embed
        patches, special = split_rows(self.pos_embed, self.table_rows(math.prod(own)))
        return join_rows(resize_positions(patches, own, grid), special, self.table_rows(math.prod(grid)))

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        """(1, L0, D): what the stem adds to the sequence."""
        return self.table(grid)

    @torch.no_grad()
    def resize(self, image_size: ImageSize) -> None:
        """Make another input size the model's own: position tables change for good as `embed` does in passing.

        Reduce it anew for the new size; copies that `reduce` made before stay as they are.
        """
        sides = self.sides(image_size)
        table = self.table(self.patch_embed.grid(*sides)[-2:])
        # shallow copies share the dict of parameters, and must not get the new table
        self._parameters = dict(self._parameters)
        self.pos_embed = nn.Parameter(table.detach())
        self.config = self.config.with_sides(sides)
        if self.spec is not None:
            preprocess = replace(self.spec.preprocess, size=self.config.image_size)
            self.spec = replace(self.spec, config=self.config, preprocess=preprocess)

    # ---------------------------------------------------------------------------------------------------------- forward

    def embed(self, images: Tensor) -> Tokens:
        """(B, C, H, W) or (B, C, T, H, W), any size from one patch on -> the stem's tokens, special ones included."""
        sides = images.shape[2:]
        if len(sides) != len(self.config.sides) or images.shape[1] != self.config.in_chans:
            kind, axes = ("videos", "T, H, W") if len(self.config.sides) == 3 else ("images", "H, W")
            raise ValueError(f"{kind} must be (B, {self.config.in_chans}, {axes}), got {tuple(images.shape)}")
        grid = self.patch_embed.grid(*sides)
        at = self.special_at(math.prod(grid))
        return Tokens.start(self.patch_embed.sequence(images, self.cls_token, at, self.positions(grid)), grid)

    @whole
    def forward_features(self, images: Tensor, unmerge: bool = False) -> Tokens:
        """The tokens after the last block, before the final norm.

        Args:
            unmerge: give every token of the stem the row that it was merged into (zeros where it was pruned), so that
                all L0 are there again, in their places.
        """
        tokens, _ = self._run(images, ())
        return Tokens.start(tokens.dense(), tokens.grid) if unmerge else tokens

    @whole
    def feature_maps(self, images: Tensor, layers: Collection[int]) -> list[Tensor]:
        """The stream after some blocks (0-based, ascending) on the full grid: (B, D, h, w) or (B, D, t, h, w) each.

        A merged token is copied to every place that it stands for; a map is taken before the reduction after its block.

        Raises:
            ValueError: there is no such block.
        """
        wrong = [layer for layer in layers if not 0 <= layer < self.depth]
        if wrong:
            raise ValueError(f"layers must be from 0 to {self.depth - 1}, got {wrong[0]}")
        _, seen = self._run(images, layers)
        return [self.feature_map(tokens) for tokens in seen]

    def feature_map(self, tokens: Tokens) -> Tensor:
        """The patch tokens as a picture: (B, D, h, w), or (B, D, t, h, w) of a video."""
        patches, _ = split_rows(tokens.dense(), self.special_at(math.prod(tokens.grid)))
        return patches.transpose(1, 2).unflatten(2, tokens.grid)

    def _run(self, images: Tensor, layers: Collection[int]) -> tuple[Tokens, list[Tokens]]:
        """The tokens after the last block, and as they leave the blocks `layers`, before these are reduced."""
        tokens, seen = self.embed(images), []
        tokens = self.reducer(STEM, tokens, {"hidden": tokens.x})
        layout = self.reducer.layout(tokens)
        start, depth = 0, self.depth
        run = self.layers.through if isinstance(self.layers, PackedTrunk) else partial(through, self.layers)
        for i in range(depth):
            if not (self.reducer.acts(i) or i in layers or i + 1 == depth):
                continue
            x, captured = run(start, i + 1, tokens.x, self.reducer.needs(i), layout)
            left, start = tokens.with_x(x), i + 1
            if i in layers:
                seen.append(left)
            tokens = self.reducer(i, left, captured)
            if tokens is not left:
                layout = self.reducer.layout(tokens)
        return tokens, seen

    def pool(self, tokens: Tokens) -> Tensor:
        """(B, features): what the classifier reads, from the special tokens, wherever they are now."""
        # for other image sizes than the model's own too
        special = tokens.take(self.special_at(math.prod(tokens.grid)))  # (B, n, D)
        return self.norm_f(special, self.head.weight.dtype).flatten(1)

    def forward_head(self, tokens: Tokens) -> Tensor:
        """Logits (B, num_classes)."""
        return linear(self.head, self.pool(tokens)).to(torch.float32)

    @whole
    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.layers, PackedTrunk) and not torch.compiler.is_compiling():
            return self.layers.replay(self._logits, images, self)
        return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    # ------------------------------------------------------------------------------------------------------------- cost

    def block_cost(self, length: int, **positions: int) -> Cost:
        """MACs of one block for one image of `length` tokens; `positions` as the mixer's `convolved` and `scanned`."""
        return self.blocks()[0].cost(length, **positions)

    def stem_cost(self, image_size: ImageSize = None) -> Cost:
        per_patch = self.patch_embed.proj.weight.numel()
        patches = self.num_patches(image_size)
        # counters of the papers embed the class token of Vim and VideoMamba too
        return Cost(stem=patches * per_patch, quirks=len(self.table_rows(patches)) * per_patch)

    def head_cost(self) -> Cost:
        return Cost(head=self.head.weight.numel())
