"""What is known about a model besides its code: how images are prepared, where weights come from, the licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocess:
    """From a picture to the network's input: resize, crop the centre, normalise.

    Args:
        size: (height, width) of the input in pixels.
        crop: share of the resized picture that the crop keeps: 0.875 means resize to 256 for an input of 224.
        interpolation: one of `INTERPOLATIONS`.
        mean, std: of red, green and blue in [0, 1].
        squash: resize both sides, whatever that does to the proportions, so that the crop leaves out the same share of
            all four edges; else the short side, and more of the long one is cut off.

    Raises:
        ValueError: for a size, crop, interpolation, mean or std that cannot be used.
    """

    size: tuple[int, int]
    crop: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be (height, width), each at least 1, not {self.size}")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must be above 0 and at most 1, not {self.crop}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; known: {', '.join(INTERPOLATIONS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std must be three numbers each, std above 0, not {self.mean} and {self.std}")

    @property
    def resize(self) -> tuple[int, int]:
        """(height, width) that the resized picture covers, before the crop."""
        return int(self.size[0] / self.crop), int(self.size[1] / self.crop)


@dataclass(frozen=True)
class CheckpointFile:
    """A published file of weights.

    Args:
        repo: id on the Hugging Face Hub, such as "hustvl/Vim-small-midclstok".
        file: its name there; empty where it is not known, and the user has to name it.
        key: where the weights are inside: "model", "model_ema", or "" for a file that holds nothing else.
        entries: number of tensors.
        parameters: number of numbers in them.
        top1: published accuracy in percent, or None.
        dataset: what it was measured on.
    """

    repo: str
    file: str
    key: str
    entries: int
    parameters: int
    top1: float | None
    dataset: str = "ImageNet-1K"


@dataclass(frozen=True)
class ModelSpec:
    """One entry of the model zoo: pure data, which `create_model` and everything that reads images go by.

    Args:
        name: as in `create_model(name)`.
        family: the file of `models/` that builds it.
        config: the frozen configuration record of that family.
        preprocess: how its images are prepared.
        checkpoint: the published weights, or None.
        licence: of the weights.
        source: paper or repository.
        classes: names in the order of the logits, or None where they are not known.
    """

    name: str
    family: str
    config: Any
    preprocess: Preprocess
    checkpoint: CheckpointFile | None
    licence: str
    source: str
    classes: tuple[str, ...] | None = None
