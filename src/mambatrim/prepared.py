"""Images decoded and cropped once and then held in memory as bytes, for models that see them many times."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .data import SUFFIXES, Dataset, batches, open_dataset, read_image
from .evaluate import Data, meaning_of_labels
from .models.spec import ModelSpec, Preprocess

# images that are decoded at a time
CHUNK = 256


@dataclass(frozen=True)
class Prepared:
    """A data set as a model of some input size sees it.

    pixels: (n, 3, H, W) uint8, before normalisation.
    labels: (n,) int64 in the order of `classes`; None where the data set has no labels.
    classes: names of the classes in the data set.
    digest: of pixels and labels; two data sets with the same one are the same.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.pixels)

    def truth(self, spec: ModelSpec) -> Tensor | None:
        """(n,): the labels as classes of the model of `spec`; None where there are none."""
        return None if self.labels is None else meaning_of_labels(self.classes, spec)[self.labels]

    def inputs(self, how: Preprocess, start: int, stop: int) -> Tensor:
        """Images `start` to `stop` as `data.preprocess` gives them, to the last bit: (B, 3, H, W) fp32."""
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (how.mean, how.std))
        return (self.pixels[start:stop].to(torch.float32) / 255 - mean) / std


def prepare(dataset: Dataset, how: Preprocess, progress: Callable[[int, int], None] | None = None) -> Prepared:
    """Decode and crop a data set.

    Raises:
        ValueError: an image cannot be read, or there are none.
    """
    if not len(dataset):
        raise ValueError("the data set is empty")
    raw = unnormalised(how)
    pixels = torch.empty((len(dataset), 3, *how.size), dtype=torch.uint8)
    labels, done = torch.empty(len(dataset), dtype=torch.int64), 0
    for images, given in batches(dataset, raw, CHUNK):
        pixels[done : done + len(images)] = (images * 255).round().to(torch.uint8)
        labels[done : done + len(images)] = given
        done += len(images)
        if progress is not None:
            progress(done, len(dataset))
    digest = hashlib.sha256(pixels.numpy().data)
    digest.update(str((tuple(pixels.shape), dataset.classes)).encode())
    digest.update(labels.numpy().data)
    return Prepared(pixels, labels if dataset.classes else None, tuple(dataset.classes), digest.hexdigest()[:16])


def unnormalised(how: Preprocess) -> Preprocess:
    """The same crop without normalisation: pixels from 0 to 1."""
    return replace(how, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def batch_ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of batches."""
    return ((start, min(start + size, count)) for start in range(0, count, size))


@dataclass(frozen=True)
class Unlabelled:
    """The pictures of another data set; its labels are not looked at."""

    whole: Dataset
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.whole[index][0], 0


class Pictures:
    """A folder of pictures without classes."""

    classes: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        self.files = _own_pictures(root)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.files[index]), 0


def open_data(data: Data) -> Dataset:
    """A data set as `data.open_dataset` opens it; a folder of pictures, none of them in a folder, has no labels."""
    if not isinstance(data, str | os.PathLike):
        return data
    place = Path(data)
    if place.is_dir() and _own_pictures(place) and not any(place.glob("*/*")) and not any(place.glob("*.parquet")):
        return Pictures(place)
    return open_dataset(place)


def _own_pictures(root: Path) -> list[Path]:
    return sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
