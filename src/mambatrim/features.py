"""features: a model as a backbone, whose maps are on the full grid whatever its reducer removes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .flops import ImageSize


class Backbone(Protocol):
    """What `features` asks of a model."""

    def feature_maps(self, images: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """The stream after some layers, on the full grid."""

    def sides(self, image_size: ImageSize) -> tuple[int, ...]:
        """All sides of an input."""


class Features(nn.Module):
    """Images -> the model's maps behind some layers; `features` makes it.

    model: the model, with its reducer; its classifier is not used.
    layers: 0-based, ascending.
    """

    def __init__(self, model: nn.Module, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> a map (B, D, h, w) for each layer; of a video (B, C, T, H, W) -> (B, D, t, h, w)."""
        return cast(Backbone, self.model).feature_maps(images, self.layers)

    def shapes(self, image_size: ImageSize = None) -> list[tuple[int, ...]]:
        """(D, h, w) of each map for one image, or (D, t, h, w) for one video: what a head is built for.

        Nothing is computed. `image_size` is a side or the sides of the input; the model's own by default.
        """
        backbone, weight = cast(Backbone, self.model), next(self.model.parameters())
        channels = self.model.config.in_chans  # type: ignore[union-attr]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            images = torch.empty(1, cast(int, channels), *backbone.sides(image_size), device=weight.device)
            return [tuple(found.shape[1:]) for found in self(images)]

    def extra_repr(self) -> str:
        """The layers: what `print` shows."""
        return f"layers={list(self.layers)}"


def features(model: nn.Module, layers: Iterable[int] | None = None) -> Features:
    """The model as a backbone: a module that gives feature maps, which a dense head reads as if no token were gone.

    A map is the residual stream, fp32 and not normalised, behind a layer: a block of Vim, VideoMamba, Mamba-Reg,
    LocalVim and PlainMamba, a stage of VMamba, LocalVMamba and MambaVision. A token that was merged is copied to every
    place that it stands for. A place whose token was pruned is zero in a flat model, and in one on a grid has the row
    that it had then. Class and register tokens are left out. A map is taken before tokens go after its block.

    Args:
        model: a model of the zoo, dense or reduced; its weights are shared.
        layers: 0-based, ascending; negative ones count from the end, -1 being the last. By default four that are spread
            evenly, the last among them: 5, 11, 17, 23 of 24, as the official segmentation code of Vim reads.

    Raises:
        ValueError: no layer, a layer that is not there, or layers that do not ascend.
    """
    if not hasattr(model, "feature_maps"):
        raise ValueError(f"features takes a model of the zoo, before torch.compile; got a {type(model).__name__}")
    count = _count(model)
    given = sorted({count * (k + 1) // 4 - 1 for k in range(4)} - {-1}) if layers is None else list(layers)
    for layer in given:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -count <= layer < count:
            raise ValueError(f"layers must be whole numbers from {-count} to {count - 1}, got {layer!r}")
    chosen = tuple(layer % count for layer in given)
    if not chosen or any(b <= a for a, b in pairwise(chosen)):
        raise ValueError(f"layers must name at least one layer, each further on than the one before, got {given}")
    return Features(model, chosen)


def _count(model: nn.Module) -> int:
    """Layers that `feature_maps` counts."""
    stages = getattr(model, "layers_of_maps", None)
    return cast(int, model.depth) if stages is None else len(stages())
