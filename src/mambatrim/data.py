"""Pictures from files and data sets, and the way from a picture to a network's input.

A data set has `classes`, a length, and gives (picture, label) by index. B batch, H and W height and width of the input.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mambatrim.models.spec import ModelSpec, Preprocess

# the endings that count as pictures in a folder; a file that is named to `read_image` may have any
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# no picture grows beyond this when it is resized: it stops at what Pillow takes for a decompression bomb in a file
MAX_PIXELS = 178_956_970

# broken bytes make Pillow's readers raise nearly anything
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


# a picture, or the frames of a video
Sample = Image.Image | Sequence[Image.Image]


class Dataset(Protocol):
    """What `batches` and the evaluation ask of a data set."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes in the order of the labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Sample, int]:
        """A picture in RGB, or the frames of a video, and its label."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture in RGB, the right way up (the orientation in EXIF data is applied), what is transparent on white.

    Raises:
        ValueError: one sentence naming the file: missing, empty, no picture, damaged, too large, of unknown range.
    """
    file = Path(path)
    if not file.exists():
        raise ValueError(f"there is no image {file}")
    if not file.is_file():
        raise ValueError(f"{file} is not a file but a folder or a device; name the image itself")
    try:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
        with file.open("rb") as stream:
            return _decode(stream, str(file))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def _decode(stream: IO[bytes], name: str) -> Image.Image:
    """The picture in a stream of bytes; `name` is what the errors call it."""
    with warnings.catch_warnings():
        # Pillow warns of large pictures (which are read, up to its second limit) and of metadata that nobody looks at
        warnings.simplefilter("ignore")
        image = _open(stream, name)
        # EXIF data that cannot be read says nothing about the pixels
        with contextlib.suppress(*UNREADABLE):
            image = ImageOps.exif_transpose(image)
    try:
        return _to_rgb(image)
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be converted from {image.mode} to RGB: {error}") from error


def _open(stream: IO[bytes], name: str) -> Image.Image:
    """The picture as it is stored, all of its pixels read."""
    try:
        image = Image.open(stream)
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels and is not read") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image in a format that is known here") from error
    except UNREADABLE as error:
        raise ValueError(f"{name} is a damaged or incomplete image ({error})") from error
    if min(image.size) < 1:
        raise ValueError(f"{name} has no pixels: {image.width} x {image.height}")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image)).convert("RGB")
    if image.mode == "F":
        raise ValueError("real numbers have no known range, save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_16_bits(values: np.ndarray[Any, Any]) -> Image.Image:
    """Grey in 8 bits from (H, W) integers in [0, 65535]; Pillow's own conversion cuts everything above 255 off."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integers outside [0, 65535] have no known range, save the image with 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def preprocess(image: Image.Image, how: Preprocess) -> Tensor:
    """The network's input (3, H, W) in float32: short side (or both sides) resized, centre cropped, normalised.

    The sizes and positions are rounded as torchvision's Resize, CenterCrop, ToTensor and Normalize do for pictures of
    PIL, so that published accuracies can be compared. For an input that is not square, the resized picture just covers
    it.

    Raises:
        ValueError: the picture is so narrow that its long side would become too large.
    """
    (high, wide), (crop_high, crop_wide) = how.resize, how.size
    width, height = image.size
    height_decides = high * width >= wide * height
    size = (high * width // height, high) if height_decides else (wide, wide * height // width)
    if how.squash:
        size = wide, high
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels is too narrow to be resized to {size[0]} x {size[1]}")
    resized = image.convert("RGB").resize(size, Image.Resampling[how.interpolation.upper()])
    left, top = round((size[0] - crop_wide) / 2), round((size[1] - crop_high) / 2)
    cropped = resized.crop((left, top, left + crop_wide, top + crop_high))
    pixels = np.asarray(cropped, dtype=np.float32) / np.float32(255)  # (H, W, 3)
    normal = (pixels - np.asarray(how.mean, dtype=np.float32)) / np.asarray(how.std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))  # (3, H, W)


def load_images(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], spec: ModelSpec) -> Tensor:
    """The input (B, 3, H, W) for the model of `spec` from one image file or several; (B, 3, T, H, W) for a model of
    videos, each path being one, as in `read_video`.

    Raises:
        ValueError: there is no path, or one cannot be read (see `read_image` and `read_video`).
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files:
        raise ValueError("load_images needs the path of at least one image")
    return torch.stack([load_input(file, spec) for file in files])


def load_input(path: str | os.PathLike[str], spec: ModelSpec) -> Tensor:
    """As `load_images`, for one path: (3, H, W), or (3, T, H, W)."""
    *frames, _, _ = getattr(spec.config, "sides", spec.preprocess.size)
    if not frames:
        return preprocess(read_image(path), spec.preprocess)
    return preprocess_sample(read_video(path, frames[0]), spec.preprocess)


def preprocess_sample(sample: Sample, how: Preprocess) -> Tensor:
    """`preprocess` of a picture, (3, H, W), or of each of the frames of a video, (3, T, H, W)."""
    if isinstance(sample, Image.Image):
        return preprocess(sample, how)
    return torch.stack([preprocess(frame, how) for frame in sample], dim=1)


def read_video(path: str | os.PathLike[str], frames: int) -> list[Image.Image]:
    """So many pictures of a video, one from the middle of each of as many equal parts of it, in RGB as `read_image`.

    Args:
        path: a folder with an image file for each frame, in the order of their names (numbers in them count as
            numbers), or one file with several frames: an animated GIF, PNG or WebP, or a TIFF of several pages.
        frames: how many; of a shorter video some come more than once.

    Raises:
        ValueError: there is nothing, a file cannot be read, or there are not at least two frames.
    """
    place = Path(path)
    if not place.is_dir():
        return _frames_of_file(place, frames)
    files = sorted((file for file in place.iterdir() if _is_picture(file)), key=_by_number)
    if len(files) < 2:
        raise ValueError(f"{place} has not at least two images, the frames of a video ({', '.join(SUFFIXES)})")
    return [read_image(files[index]) for index in middles(len(files), frames)]


def _frames_of_file(file: Path, frames: int) -> list[Image.Image]:
    read_image(file)  # complains of all that is wrong with any picture
    try:
        with Image.open(file) as image:
            count, found = getattr(image, "n_frames", 1), []
            for index in middles(count, frames) if count > 1 else ():
                image.seek(index)
                found.append(_to_rgb(image.copy()))
    except UNREADABLE as error:
        raise ValueError(f"{file} is a damaged or incomplete video ({error})") from error
    if not found:
        raise ValueError(
            f"{file} holds one picture, and this model takes videos: a folder of frames, or an animated GIF"
        )
    return found


def middles(count: int, parts: int) -> list[int]:
    """Of `count` frames those in the middle of each of so many equal parts."""
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def _by_number(file: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


class Folder:
    """One folder per class, their names in sorted order being the classes; images may lie deeper inside.

    Raises:
        ValueError: the path is no folder, or there is no image in any folder of it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is no folder")
        folders = sorted(entry for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        self.classes = tuple(folder.name for folder in folders)
        self.samples = [(file, label) for label, folder in enumerate(folders) for file in _images(folder)]
        if not self.samples:
            raise ValueError(f"{self.root} has no images in folders, one folder per class ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label = self.samples[index]
        return read_image(file), label


def _images(folder: Path) -> list[Path]:
    return sorted(filter(_is_picture, folder.rglob("*")))


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.is_file()


class Zip:
    """A zip file with one folder per class in it, read as `Folder` reads one on the disk, without unpacking it.

    Raises:
        ValueError: there is no such file, it is damaged or no zip file, or there is no image in any folder of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}")
        try:
            self._archive = zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, *UNREADABLE) as error:
            raise ValueError(f"{self.path} is a damaged zip file or none at all ({error})") from error
        # a folder may have an entry of its own, as "cat/": an empty class keeps its label
        entries = sorted(
            name for name in self._archive.namelist() if "/" in name and not name.startswith((".", "__MACOSX"))
        )
        self.classes = tuple(sorted({name.split("/", 1)[0] for name in entries}))
        labels = {name: label for label, name in enumerate(self.classes)}
        images = [name for name in entries if PurePosixPath(name).suffix.lower() in SUFFIXES]
        self.samples = [(name, labels[name.split("/", 1)[0]]) for name in images]
        if not self.samples:
            raise ValueError(f"{self.path} has no images in folders, one folder per class ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, label = self.samples[index]
        try:
            content = self._archive.read(name)
        except (zipfile.BadZipFile, *UNREADABLE) as error:
            raise ValueError(f"{name} in {self.path} is damaged or cannot be unpacked ({error})") from error
        return _decode(io.BytesIO(content), f"{name} in {self.path}"), label


class Parquet:
    """A parquet file with the columns `image` (a struct with the file's `bytes`) and `label` (integers from 0 on).

    The names of the classes come from the file's metadata, where the Hugging Face library writes them; else they are
    the labels as text.

    Raises:
        ValueError: pyarrow is not installed, or the file is missing, damaged, or laid out otherwise.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}")
        try:
            import pyarrow.compute  # imported here: an extra of the package
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"pyarrow is needed to read {self.path}: pip install pyarrow, or mambatrim with the extra data"
            ) from error
        try:
            table = pyarrow.parquet.read_table(self.path, columns=["image", "label"])
            self._images = pyarrow.compute.struct_field(table["image"], "bytes")
            self._labels = np.asarray(table["label"].to_numpy(), dtype=np.int64)
        except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self.path} is no parquet file with the columns image (bytes) and label (integers): {reason}"
            ) from error
        if not len(self._labels):
            raise ValueError(f"{self.path} has no rows")
        lowest, highest = int(self._labels.min()), int(self._labels.max())
        self.classes = _class_names(table.schema.metadata) or tuple(str(label) for label in range(highest + 1))
        if lowest < 0 or highest >= len(self.classes):
            raise ValueError(f"{self.path} has labels from {lowest} to {highest} for {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = range(len(self))[index]
        content = self._images[row].as_py()
        if not content:
            raise ValueError(f"row {row} of {self.path} holds no image")
        return _decode(io.BytesIO(content), f"row {row} of {self.path}"), int(self._labels[row])


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """The class names that the Hugging Face library left in a file's metadata, or none."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        info = json.loads((metadata or {})[b"huggingface"])
        return tuple(map(str, info["info"]["features"]["label"]["names"]))
    return ()


def open_dataset(path: str | os.PathLike[str]) -> Folder | Parquet | Zip:
    """The data set at `path`: a parquet or zip file, a folder with one parquet file in it, or one folder per class.

    Raises:
        ValueError: there is nothing, or nothing that can be read as a data set, or several parquet files.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"there is no data set {place}")
    if place.is_file():
        return Zip(place) if place.suffix.lower() == ".zip" else Parquet(place)
    tables = sorted(place.glob("*.parquet"))
    if len(tables) > 1:
        raise ValueError(
            f"{place} has several data sets, name one of them: {', '.join(table.name for table in tables)}"
        )
    return Parquet(tables[0]) if tables else Folder(place)


def batches(dataset: Dataset, how: Preprocess, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole data set in order as inputs (B, 3, H, W), or (B, 3, T, H, W) of videos, and labels (B,) in int64; the
    last batch may be smaller.

    Raises:
        ValueError: batch_size is below 1, or an image cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
        images = torch.stack([preprocess_sample(sample, how) for sample, _ in samples])
        yield images, torch.tensor([label for _, label in samples])
