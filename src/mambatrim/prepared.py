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

from .clips import frames_of, open_clips
from .data import SUFFIXES, Dataset, Sample, batches, open_dataset, read_image
from .evaluate import Data, meaning_of_labels, spread
from .models.spec import ModelSpec, Preprocess

# images that are decoded at a time
CHUNK = 256


@dataclass(frozen=True)
class Prepared:
    """A data set as a model of some input size sees it.

    pixels: (n, 3, H, W) uint8, before normalisation; (n, 3, T, H, W) of videos.
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
        """Images `start` to `stop` as `data.preprocess` gives them, to the last bit: as `pixels`, fp32."""
        shape = (3, *[1] * (self.pixels.dim() - 2))
        mean, std = (torch.tensor(values, dtype=torch.float32).view(shape) for values in (how.mean, how.std))
        return (self.pixels[start:stop].to(torch.float32) / 255 - mean) / std


def prepare(
    dataset: Dataset,
    how: Preprocess,
    progress: Callable[[int, int], None] | None = None,
    frames: int | None = None,
) -> Prepared:
    """Decode and crop a data set of pictures, or of videos of so many `frames`.

    Raises:
        ValueError: an image cannot be read, there are none, or they are pictures and not videos, or the other way.
    """
    if not len(dataset):
        raise ValueError("the data set is empty")
    raw = unnormalised(how)
    shape = (3, *([frames] if frames else []), *how.size)
    pixels = torch.empty((len(dataset), *shape), dtype=torch.uint8)
    labels, done = torch.empty(len(dataset), dtype=torch.int64), 0
    for images, given in batches(dataset, raw, max(1, CHUNK // (frames or 1))):
        if images.shape[1:] != shape:
            wanted = f"videos of {frames} frames" if frames else "pictures"
            raise ValueError(
                f"the model takes {wanted}, inputs of {shape}, and the data set has {tuple(images.shape[1:])}"
            )
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

    def __getitem__(self, index: int) -> tuple[Sample, int]:
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


def open_data(data: Data, frames: int | None = None) -> Dataset:
    """A data set as `data.open_dataset` opens it; a folder of pictures, none of them in a folder, has no labels.

    With `frames`, a data set of videos as `clips.open_clips` opens it.
    """
    if not isinstance(data, str | os.PathLike):
        return data
    place = Path(data)
    if frames:
        return open_clips(place, frames)
    if place.is_dir() and _own_pictures(place) and not any(place.glob("*/*")) and not any(place.glob("*.parquet")):
        return Pictures(place)
    return open_dataset(place)


def read_inputs(data: Data, spec: ModelSpec, limit: int | None = None) -> Tensor:
    """`limit` pictures or videos of a data set, spread evenly, as the model of `spec` takes them, without labels:
    (n, 3, H, W), or (n, 3, T, H, W)."""
    frames = frames_of(spec)
    found = prepare(Unlabelled(spread(open_data(data, frames), limit)), spec.preprocess, frames=frames)
    return found.inputs(spec.preprocess, 0, len(found))


def _own_pictures(root: Path) -> list[Path]:
    return sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
