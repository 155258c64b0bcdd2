"""LocalVim (LocalMamba, arXiv 2403.09338): one sequence, scanned in four of eight orders, which each layer has its own.

Keys of the state dict are those of the official checkpoints. The orders are not in it: they stand in the configuration.

Tokens may be removed: an order is then restricted to the survivors, a merged token keeps the place and the rotation of
the one that it was merged into, and means over the tokens weigh each by its size. Window padding stays where it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..reduction import Cost, Reducer, Tokens
from .flat import FlatConfig, FlatMamba
from .grid import ChannelGate, ImageSize, capture, reset_scan, typed
from .layers import Captured, PatchEmbed, RMSNorm, resize_positions
from .orders import Walk, directions, walk
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess

_SCANS, _TAPS, _EXPAND = 4, 4, 2


@dataclass(frozen=True)
class LocalVimConfig(FlatConfig):
    """`directions` of every layer, four out of h, v, w2, w7 and these with "_flip"; a class token in the middle, or
    rotary positions and a mean over all tokens."""

    depth: int = 20
    directions: tuple[tuple[str, ...], ...] = ()
    class_token: bool = False

    @property
    def special(self) -> int:
        """Class tokens."""
        return int(self.class_token)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row."""
        height, width = (-(-side // self.patch) for side in self.image_size)
        return height, width


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of all images stand: what layers need besides the stream.

    walks: by the name of the order. share: (B, L) of each token in a mean over all. rotation: cosines and sines
    (B, L, D), or None.
    """

    walks: dict[str, Walk]
    share: Tensor
    rotation: tuple[Tensor, Tensor] | None

    def rotate(self, x: Tensor) -> Tensor:
        """Turn pairs of channels of x (B, L, D) by the angles of each token's place."""
        if self.rotation is None:
            return x
        cosine, sine = self.rotation
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cosine + torch.stack([-odd, even], dim=-1).flatten(-2) * sine


class LocalMixer(nn.Module):
    """Four Mamba-1 scans of one projection, each in its own order and with its own parameters, through one gate."""

    def __init__(self, d_model: int, d_state: int, directions: Sequence[str]) -> None:
        super().__init__()
        inner, self.dt_rank, self.d_state = _EXPAND * d_model, math.ceil(d_model / 16), d_state
        self.d_inner, self.directions = inner, tuple(directions)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        for j in range(len(self.directions)):
            self.register_parameter(f"A_log_{j}", nn.Parameter(torch.empty(inner, d_state)))
            self.register_parameter(f"D_{j}", nn.Parameter(torch.empty(inner)))
            self.add_module(f"conv1d_{j}", nn.Conv1d(inner, inner, _TAPS, groups=inner))
            self.add_module(f"x_proj_{j}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj_{j}", nn.Linear(self.dt_rank, inner))
        self.attn = ChannelGate(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        for j in range(len(self.directions)):
            names = (f"A_log_{j}", f"D_{j}", f"dt_proj_{j}.weight", f"dt_proj_{j}.bias")
            reset_scan(*map(self.get_parameter, names))

    def forward(self, x: Tensor, places: Places, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) -> (B, L, D), and the `wanted` signals, all tokens in token order."""
        xz = kernels.linear(x, self.in_proj.weight)  # (B, L, 2 E)
        gated, captured = [], []
        for j, name in enumerate(self.directions):
            out, signals = self._scan(j, xz, places.walks[name], wanted)
            gated.append(self.attn(out, places.share))
            captured.append(signals)
        update = kernels.linear(sum(gated[1:], gated[0]), self.out_proj.weight)
        found = {name: torch.stack([signals[name] for signals in captured], dim=1) for name in captured[0]}
        return update, found | capture(wanted, {"update": lambda: update})

    def _scan(self, j: int, xz: Tensor, way: Walk, wanted: Sequence[str]) -> tuple[Tensor, Captured]:
        """Direction j of xz (B, L, 2 E) -> (B, L, E), and its own signals, (B, L, .) each."""
        hidden, z = way.spread(xz).chunk(2, dim=-1)  # (B, T, E) each
        taps, bias = self.get_parameter(f"conv1d_{j}.weight").squeeze(1), self.get_parameter(f"conv1d_{j}.bias")
        u = kernels.causal_conv1d(hidden, [taps], [bias], reverse=(way.reverse,))  # (1, B, T, E)
        projected = kernels.linear(u[0], self.get_parameter(f"x_proj_{j}.weight"))
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A, D = -torch.exp(self.get_parameter(f"A_log_{j}")), self.get_parameter(f"D_{j}")
        weight, offset = self.get_parameter(f"dt_proj_{j}.weight"), self.get_parameter(f"dt_proj_{j}.bias")
        direction = kernels.Direction(dt, A, B, C, D, offset, weight, way.reverse)
        scanned = kernels.scan(u, [direction], z)
        out = way.left(scanned.y)  # (B, L, E)
        signals = {
            "dt": lambda: way.entered(reference.step_size(dt, offset, weight, softplus=True)),
            "dt_mean": lambda: way.entered(scanned.dt_mean[:, 0]),
            "B": lambda: way.entered(B),
            "C": lambda: way.entered(C),
            "y": lambda: way.left(kernels.scan(u, [direction]).y),
            "y_gated": lambda: out,
        }
        return out, capture(wanted, signals)

    def cost(self, length: int) -> Cost:
        """MACs for one image of `length` tokens, window padding not counted, the scan as 9 E N L."""
        inner, states = self.d_inner, self.d_state
        projections = (self.in_proj.weight.numel() + self.out_proj.weight.numel()) * length
        conv = _TAPS * inner * length
        scan = inner * (self.dt_rank + 2 * states) * length
        scan += kernels.scan_macs(length, inner, states, self.dt_rank)
        others = (_SCANS - 1) * (conv + scan) + _SCANS * self.attn.macs()
        # the official count has the projections and the gate of one direction and its convolution at L + 3 places,
        # 5 E N L + 2 E L for each scan, and D L for the norm
        quirks = inner * length * (_SCANS * (5 * states + 2) - (9 * states + 2))
        quirks += self.attn.macs() + _TAPS * inner * (_TAPS - 1) + self.in_proj.in_features * length
        return Cost(projections, conv, scan, directions=others, quirks=quirks)


class LocalBlock(nn.Module):
    """x <- r(x) + mixer(norm(r(x))), r the rotation, on one fp32 stream."""

    def __init__(self, d_model: int, mixer: LocalMixer) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = mixer

    def forward(self, x: Tensor, places: Places, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) fp32 -> the same, and the `wanted` signals."""
        x = places.rotate(x)
        update, captured = self.mixer(self.norm(x, self.mixer.in_proj.weight.dtype), places, wanted)
        x = x + update
        return x, captured | capture(wanted, {"hidden": lambda: x})

    def cost(self, length: int) -> Cost:
        return self.mixer.cost(length)


class PaddedPatchEmbed(PatchEmbed):
    """Patches of an image that is filled up with zeros on the right and at the bottom."""

    def grid(self, *sides: int) -> tuple[int, ...]:
        """Patches per column and row, the last ones perhaps in part; raises ValueError for an image without pixels."""
        if len(sides) != len(self.patch) or min(sides) < 1:
            raise ValueError(f"an image must have at least 1x1 pixels, got {'x'.join(map(str, sides))}")
        return tuple(-(-side // patch) for side, patch in zip(sides, self.patch, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.patch, images.shape[2:]
        return super().forward(F.pad(images, (0, -width % columns, 0, -height % rows)))


class Rotation(nn.Module):
    """Rotary positions (EVA-02, arXiv 2303.11331): half of the channels by row, half by column, scaled to a 14x14 grid.

    The tables are part of the checkpoint, and resized rather than calculated for another grid.
    """

    freqs_cos: Tensor  # (M, D)
    freqs_sin: Tensor

    def __init__(self, d_model: int, grid: tuple[int, int]) -> None:
        super().__init__()
        half = d_model // 2
        speeds = 10000.0 ** (-torch.arange(0, half, 2) / half)
        rows, columns = (torch.outer(torch.arange(n) / n * 14, speeds).repeat_interleave(2, dim=1) for n in grid)
        angles = [rows[:, None].expand(*grid, half), columns.expand(*grid, half)]
        table = torch.cat(angles, dim=-1).flatten(0, 1)  # (M, D)
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())

    def tables(self, own: tuple[int, ...], grid: tuple[int, ...]) -> list[Tensor]:
        """Cosines and sines (M, D) for a grid; `own` is that of the buffers."""
        return [resize_positions(table[None], own, grid)[0] for table in (self.freqs_cos, self.freqs_sin)]


class LocalVim(FlatMamba):
    """LocalVim."""

    config: LocalVimConfig

    takes_layout = False
    reduces_stem = False

    def __init__(self, config: LocalVimConfig, spec: ModelSpec | None = None) -> None:
        nn.Module.__init__(self)  # nothing of the trunk's own parts
        if len(config.directions) != config.depth or any(len(four) != _SCANS for four in config.directions):
            raise ValueError(f"directions must be {_SCANS} for each of {config.depth} layers, got {config.directions}")
        self.config, self.spec = config, spec
        self.patch_embed = PaddedPatchEmbed(config.in_chans, config.d_model, config.kernel, config.steps)
        patches = math.prod(self._table_grid())
        cls_token = torch.zeros(1, config.special, config.d_model)
        if config.class_token:
            self.cls_token = nn.Parameter(cls_token)
        else:
            self.register_buffer("cls_token", cls_token, persistent=False)
            self.rope = Rotation(config.d_model, config.grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + config.special, config.d_model))
        mixers = (LocalMixer(config.d_model, config.d_state, four) for four in config.directions)
        self.layers = nn.ModuleList(LocalBlock(config.d_model, mixer) for mixer in mixers)
        self.norm_f = RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.num_classes)
        self.reducer = Reducer.dense()
        self.reset()

    def blocks(self) -> list[Any]:
        """The layers."""
        return typed(self.layers, LocalBlock)

    def special_at(self, patches: int) -> tuple[int, ...]:
        """The class token, if there is one, in the middle."""
        return (patches // 2,) if self.config.class_token else ()

    @torch.no_grad()
    def resize(self, image_size: ImageSize) -> None:
        """Make another input size the model's own: position tables change for good as they do in passing."""
        own = self.config.grid
        super().resize(image_size)
        if not self.config.class_token:
            # a module of its own: shallow copies share the one that was here, and must not get the new tables
            rope = copy.copy(self.rope)
            rope._buffers = dict(zip(("freqs_cos", "freqs_sin"), self.rope.tables(own, self.config.grid), strict=True))
            self._modules = {**self._modules, "rope": rope}

    def places(self, tokens: Tokens) -> Places:
        """Where the tokens stand now."""
        height, width = tokens.grid
        origin, is_class = tokens.origin.keep, None  # (B, L)
        if self.config.class_token:
            middle = height * width // 2
            is_class = origin == middle
            origin = torch.where(origin > middle, origin - 1, origin)
        names = sorted({name for four in self.config.directions for name in four})
        walks = {name: walk(name, (height, width), origin, is_class) for name in names}
        share = tokens.size / tokens.size.sum(1, keepdim=True)
        if self.config.class_token:
            return Places(walks, share, None)
        cosine, sine = (table[origin] for table in self.rope.tables(self.config.grid, tokens.grid))
        return Places(walks, share, (cosine, sine))

    def _run(self, images: Tensor, layers: Collection[int]) -> tuple[Tokens, list[Tokens]]:
        tokens, seen = self.embed(images), []
        places = self.places(tokens)
        for i, layer in enumerate(self.blocks()):
            x, captured = layer(tokens.x, places, self.reducer.needs(i))
            tokens = tokens.with_x(x)
            if i in layers:
                seen.append(tokens)
            tokens = self.reducer(i, tokens, captured)
            if tokens.x.shape[1] < x.shape[1]:
                places = self.places(tokens)
        return tokens, seen

    def pool(self, tokens: Tokens) -> Tensor:
        """(B, D): the class token, or the mean over the tokens, in which a merged one counts as often as its size."""
        if self.config.class_token:
            return super().pool(tokens)
        share = tokens.size / tokens.size.sum(1, keepdim=True)
        mean = torch.bmm(share[:, None], self.norm_f(tokens.x, torch.float32))  # (B, 1, D)
        return mean[:, 0].to(self.head.weight.dtype)


# searched by the authors, for the tiny models
_SEARCHED = """
    h v_flip w7 w7_flip, h_flip w2_flip w7 w7_flip, h h_flip v w7, h h_flip v v_flip, h h_flip v v_flip,
    h h_flip v v_flip, h_flip v v_flip w7, h_flip v v_flip w2_flip, h h_flip v v_flip, h h_flip v v_flip,
    h v v_flip w2, h v v_flip w2_flip, h h_flip v_flip w7, h_flip v v_flip w2, h h_flip v v_flip,
    h v w2 w2_flip, v v_flip w2 w7, h h_flip v w2, h h_flip w2_flip w7, v v_flip w2 w2_flip
"""
_TINY = directions(_SEARCHED)
# the official code defines the small model twice; this is the later definition, which wins
_SMALL = directions("h h_flip w2 w2_flip") * 20


def _entry(name: str, config: LocalVimConfig, counts: tuple[int, int], top1: float, file: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="local_vim",
        config=config,
        preprocess=Preprocess((224, 224), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        # not on the Hub: the file has to be fetched from the release page
        checkpoint=CheckpointFile("", file, "state_dict", *counts, top1),
        licence="Apache-2.0",
        source="https://github.com/hunto/LocalMamba/releases/tag/v1.0.0",
    )


VARIANTS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _entry("local_vim_tiny", LocalVimConfig(directions=_TINY), (748, 7_994_152), 76.2, "local_vim_tiny.ckpt"),
        _entry(
            *("local_vim_tiny_mid", LocalVimConfig(directions=_TINY, class_token=True), (747, 7_994_536), 77.8),
            file="local_vim_tiny_middle_cls_token.ckpt",
        ),
        # the published link leads to a file of another model
        _entry("local_vim_small", LocalVimConfig(d_model=384, directions=_SMALL), (748, 27_783_784), 81.1, ""),
    )
}
