"""LocalVMamba (LocalMamba, arXiv 2403.09338): the first VMamba, with four of eight scan orders in each block.

Keys of the state dict are those of the official checkpoints. The orders are not in it: they stand in the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..reduction import Cost, Tokens
from .grid import ChannelGate, GridConfig, capture
from .layers import Captured
from .orders import Walk, directions, walk
from .pyramid import DIRECTIONS, Block, DirectedScan, PatchMerging, Places, Pyramid, Stage
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess
from .vmamba import stem_of_patches


@dataclass(frozen=True, kw_only=True)
class LocalVMambaConfig(GridConfig):
    """D of the first stage, blocks of each stage, E / D, and N; `directions` of every block, stage after stage."""

    d_model: int = 96
    depths: tuple[int, ...] = (2, 2, 9, 2)
    expand: int = 2
    d_state: int = 16
    directions: tuple[tuple[str, ...], ...] = ()


class MultiScan(nn.Module):
    """The gate of the scans, under its official name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = ChannelGate(channels)


class LocalScan(DirectedScan):
    """Scans in four listed orders, each through the same gate before they are added.

    Window padding is a step with a zero input: the state decays by it, whether tokens are removed or not.
    """

    def __init__(self, d_model: int, expand: int, d_state: int, names: Sequence[str]) -> None:
        super().__init__(d_model, expand, d_state, gated=True)
        self.names = tuple(names)
        self.multi_scan = MultiScan(self.d_inner)

    def orders(self) -> tuple[str, ...]:
        return self.names

    def sum_of_scans(self, u: Tensor, places: Places, wanted: Sequence[str]) -> tuple[Tensor, Captured]:
        gated, captured = [], []
        for k, name in enumerate(self.names):
            way = places.walks[name]
            steps = way.spread(u)  # (B, T, E)
            direction = self.direction(steps, k, way.reverse)
            scanned = kernels.scan(steps[None], [direction])
            out = way.left(scanned.y)  # (B, L, E)
            gated.append(self.multi_scan.attn(out, places.share))
            captured.append(_signals(direction, scanned, out, way, wanted))
        found = {name: torch.stack([signals[name] for signals in captured], dim=1) for name in captured[0]}
        return sum(gated[1:], gated[0]), found

    def cost(self, length: int, places: int) -> Cost:
        """MACs of one image, window padding not counted."""
        return super().cost(length, places) + Cost(directions=DIRECTIONS * self.multi_scan.attn.macs())


def _signals(
    direction: kernels.Direction, scanned: kernels.Scan, out: Tensor, way: Walk, wanted: Sequence[str]
) -> Captured:
    """Of one direction, (B, L, .) each, in token order."""
    d = direction
    return capture(
        wanted,
        {
            "dt": lambda: way.entered(reference.step_size(d.dt, d.dt_bias, d.dt_weight, softplus=True)),
            "dt_mean": lambda: way.entered(scanned.dt_mean[:, 0]),
            "B": lambda: way.entered(d.B),
            "C": lambda: way.entered(d.C),
            "y": lambda: out,
        },
    )


class LocalVMamba(Pyramid):
    """LocalVMamba."""

    config: LocalVMambaConfig

    def __init__(self, config: LocalVMambaConfig, spec: ModelSpec | None = None) -> None:
        if len(config.directions) != sum(config.depths) or any(len(four) != DIRECTIONS for four in config.directions):
            raise ValueError(
                f"directions must be {DIRECTIONS} for each of {sum(config.depths)} blocks, got {config.directions}"
            )
        listed, stages, last = iter(config.directions), [], len(config.depths) - 1
        for s, depth in enumerate(config.depths):
            width = config.d_model * 2**s
            scans = [LocalScan(width, config.expand, config.d_state, next(listed)) for _ in range(depth)]
            blocks = [Block(width, scan, mlp_ratio=0) for scan in scans]
            stages.append(Stage(blocks, None if s == last else PatchMerging(width)))
        super().__init__(config, spec, stem_of_patches(config.in_chans, config.d_model), stages, width)

    def walk(self, name: str, tokens: Tokens) -> Walk:
        height, width = tokens.grid
        return walk(name, (height, width), tokens.origin.keep, None)


# searched by the authors
_TINY = directions("""
    h h_flip w7 w7_flip, h_flip v_flip w2 w2_flip, h_flip v_flip w2_flip w7, h_flip v v_flip w2,
    h h_flip v_flip w2_flip, h_flip v_flip w2 w2_flip, h w2_flip w7 w7_flip, h h_flip v v_flip, h v_flip w7 w7_flip,
    h_flip v w2 w7_flip, v v_flip w2 w7_flip, h h_flip v_flip w2_flip, v_flip w2_flip w7 w7_flip,
    h_flip v_flip w2_flip w7_flip, h_flip v w7 w7_flip
""")
_SMALL = directions("""
    h v v_flip w7_flip, h h_flip v w7, h_flip v v_flip w7, h_flip v w2_flip w7, h_flip v w2_flip w7,
    h_flip v_flip w2 w7_flip, h_flip v v_flip w7, h v v_flip w7, h v v_flip w7, h v v_flip w7_flip,
    h h_flip v v_flip, h v v_flip w2, v v_flip w2_flip w7, h h_flip v w2, h_flip v v_flip w7_flip,
    h h_flip v v_flip, h v v_flip w7_flip, h v v_flip w7_flip, h h_flip v_flip w7, h_flip v_flip w2_flip w7,
    h_flip v v_flip w7_flip, v v_flip w7 w7_flip, h v v_flip w7_flip, h_flip v v_flip w2, h v v_flip w2_flip,
    h h_flip v w7, h h_flip w7 w7_flip, h v_flip w2 w2_flip, h v_flip w2 w7, h v v_flip w7_flip,
    h_flip v w2_flip w7, h_flip v_flip w7 w7_flip, h v w7 w7_flip
""")


def _entry(name: str, config: LocalVMambaConfig, counts: tuple[int, int], top1: float, file: str) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="local_vmamba",
        config=config,
        preprocess=Preprocess((224, 224), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        # not on the Hub: the file has to be fetched from the release page
        checkpoint=CheckpointFile("", file, "state_dict", *counts, top1),
        licence="Apache-2.0",
        source="https://github.com/hunto/LocalMamba/releases/tag/v1.0.0",
    )


_DEEP = LocalVMambaConfig(depths=(2, 2, 27, 2), directions=_SMALL)
_TINY_HAS, _SMALL_HAS = (302, 25_527_160), (644, 49_748_536)

VARIANTS: dict[str, ModelSpec] = {
    # the file was announced and not there when this was written
    "local_vmamba_tiny": _entry("local_vmamba_tiny", LocalVMambaConfig(directions=_TINY), _TINY_HAS, 82.7, ""),
    "local_vmamba_small": _entry("local_vmamba_small", _DEEP, _SMALL_HAS, 83.7, "local_vssm_small.ckpt"),
}
