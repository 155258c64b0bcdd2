"""Data sets of videos, each in a folder of frames or in a file with several, for models that take frames."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .data import UNREADABLE, read_video
from .models.spec import ModelSpec

# the endings that count as videos in a folder: formats of pictures that can hold several frames
ANIMATED = (".apng", ".gif", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Clips:
    """Videos as so many frames each; as a data set of `data.py`, but for a list of pictures in each place.

    classes: names in the order of the labels; none where the videos lie in no classes, and every label is 0.
    samples: (folder or file, label) of each video.
    frames: how many pictures of a video are taken, spread evenly as `data.read_video` does.
    """

    classes: tuple[str, ...]
    samples: tuple[tuple[Path, int], ...]
    frames: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sequence[Image.Image], int]:
        video, label = self.samples[index]
        return read_video(video, self.frames), label


def open_clips(root: Path, frames: int) -> Clips:
    """The videos of a folder: in one folder per class, or directly in it, and then without labels.

    A folder in `root` is a class if it has folders or files with several frames in it, and else a video of its frames.

    Raises:
        ValueError: the path is no folder, or there is no video in it.
    """
    if not root.is_dir():
        raise ValueError(
            f"{root} is no folder: a model of videos takes a folder with one folder per class, and in these a folder "
            "of frames or an animated file for each video"
        )
    folders = [place for place in _entries(root) if place.is_dir()]
    if any(_videos(folder) for folder in folders):
        classes = tuple(folder.name for folder in folders)
        samples = [(video, label) for label, folder in enumerate(folders) for video in _videos(folder)]
        return Clips(classes, tuple(samples), frames)
    found = [place for place in _entries(root) if place.is_dir() or _has_frames(place)]
    if not found:
        raise ValueError(f"{root} has no videos, each a folder of frames or an animated file")
    return Clips((), tuple((video, 0) for video in found), frames)


def frames_of(spec: ModelSpec) -> int | None:
    """How many frames the model of `spec` takes; None if it takes pictures."""
    *frames, _, _ = getattr(spec.config, "sides", spec.preprocess.size)
    return frames[0] if frames else None


def _videos(folder: Path) -> list[Path]:
    return [place for place in _entries(folder) if place.is_dir() or _has_frames(place)]


def _entries(folder: Path) -> list[Path]:
    return sorted(place for place in folder.iterdir() if not place.name.startswith("."))


def _has_frames(file: Path) -> bool:
    """Whether a file holds more than one picture."""
    if file.suffix.lower() in ANIMATED:
        with contextlib.suppress(*UNREADABLE), Image.open(file) as image:
            return int(getattr(image, "n_frames", 1)) > 1
    return False
