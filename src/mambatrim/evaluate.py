"""Accuracy of a model on labelled images, alone or beside others that see the same batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .clips import frames_of, open_clips
from .data import Dataset, Sample, batches, open_dataset
from .models.spec import ModelSpec
from .timing import run_time

Data = str | os.PathLike[str] | Dataset
# called after every batch with the images done and the images in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a data set.

    images: how many it classified.
    top1, top5: shares of them whose label was the first, or among the first five; top5 is None where there are no more
        than five classes.
    agreement: share of them where it and the baseline put the same class first; None without a baseline.
    ms_per_image: mean time of its forward passes, without reading images. `timing.time_models` compares more exactly.
    """

    images: int
    top1: float
    top5: float | None
    agreement: float | None
    ms_per_image: float


def evaluate(
    model: nn.Module,
    data: Data,
    baseline: nn.Module | None = None,
    batch_size: int = 50,
    limit: int | None = None,
) -> Evaluation:
    """Classify a data set.

    Args:
        model: a model of the zoo, reduced or not, on any device.
        data: a data set of `data.py`, or the path of one: a folder per class, a zip file of such folders, or a parquet
            file; for a model of videos a folder per class, as `clips.open_clips` takes. The labels go by the names of
            the classes where the model knows these; by number where the names are numbers; else by order.
        baseline: another model, usually the dense one, to compare each prediction with.
        batch_size: images at a time.
        limit: use only so many images, spread evenly over the data set.

    Raises:
        ValueError: the data set cannot be read, or its classes are not the model's.
    """
    models = {"model": model} if baseline is None else {"model": model, "baseline": baseline}
    return evaluate_models(models, data, None if baseline is None else "baseline", batch_size, limit)["model"]


@torch.no_grad()
def evaluate_models(
    models: Mapping[str, nn.Module],
    data: Data,
    baseline: str | None = None,
    batch_size: int = 50,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Classify a data set with several models that take the same input, batch by batch in turn; as `evaluate`."""
    if not models or (baseline is not None and baseline not in models):
        raise ValueError(
            f"baseline must be one of the models ({', '.join(models) or 'there are none'}), not {baseline!r}"
        )
    specs = [spec_of(model) for model in models.values()]
    if any(spec.preprocess != specs[0].preprocess or spec.classes != specs[0].classes for spec in specs):
        raise ValueError(f"the models {', '.join(models)} differ in their classes or in how images are prepared")
    dataset = spread(_opened(data, frames_of(specs[0])) if isinstance(data, str | os.PathLike) else data, limit)
    if not dataset.classes:
        raise ValueError("the data set has no classes, and accuracy needs labels")
    meaning = meaning_of_labels(dataset.classes, specs[0])
    device = next(next(iter(models.values())).parameters()).device
    ranked: dict[str, list[Tensor]] = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)
    labels: list[Tensor] = []
    for images, given in batches(dataset, specs[0].preprocess, batch_size):
        images = images.to(device)  # (B, 3, H, W)
        if not labels:
            _warm_up(models, images, int(meaning.max()))
        for name, model in models.items():
            logits, spent = run_time(model, images)  # (B, classes)
            ranked[name].append(logits.argsort(dim=1, descending=True, stable=True)[:, :6].cpu())
            seconds[name] += spent
        labels.append(meaning[given])
        if progress is not None:
            progress(sum(map(len, labels)), len(dataset))
    truth = torch.cat(labels)  # (n,)
    ranks = {name: torch.cat(parts) for name, parts in ranked.items()}  # (n, up to 6)
    reference = None if baseline is None else ranks[baseline][:, 0]
    return {name: _evaluation(ranks[name], truth, reference, seconds[name]) for name in models}


def _opened(path: str | os.PathLike[str], frames: int | None) -> Dataset:
    return open_clips(Path(path), frames) if frames else open_dataset(path)


def spec_of(model: nn.Module) -> ModelSpec:
    """The entry of the zoo that a model was made from: how its images are prepared, and what its classes are."""
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise ValueError(f"{type(model).__name__} has no spec that says how images are prepared; use create_model")
    return spec


def _warm_up(models: Mapping[str, nn.Module], images: Tensor, last: int) -> None:
    """One run of each that is not timed; and the widths of the classifiers are checked."""
    for name, model in models.items():
        width = model(images).shape[1]
        if width <= last:
            raise ValueError(f"the labels go up to class {last}, but the model ({name}) has only {width} classes")


def _evaluation(ranked: Tensor, truth: Tensor, reference: Tensor | None, seconds: float) -> Evaluation:
    """Figures from the classes by rank (n, up to 6), the labels (n,) and the baseline's first choices (n,)."""
    hit = ranked == truth.unsqueeze(1)
    images, first = len(truth), ranked[:, 0]
    return Evaluation(
        images=images,
        top1=int(hit[:, 0].sum()) / images,
        top5=int(hit[:, :5].sum()) / images if ranked.shape[1] > 5 else None,
        agreement=None if reference is None else int((first == reference).sum()) / images,
        ms_per_image=1000 * seconds / images,
    )


def meaning_of_labels(names: tuple[str, ...], spec: ModelSpec) -> Tensor:
    """(classes of the data set,): which of the model's classes each label is.

    Raises:
        ValueError: the model has no class of a name.
    """
    known = spec.classes
    # a data set without names calls its classes by their labels, and folders called 0, 1, 10, 2 are in that order
    if all(name.isdecimal() for name in names):
        return torch.tensor([int(name) for name in names])
    if known is None:
        return torch.arange(len(names))
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"the data set has a class {strange[0]!r} that {spec.name} does not know: {', '.join(known)}")
    return torch.tensor([known.index(name) for name in names])


@dataclass(frozen=True)
class Part:
    """Some images of a data set, by their indices there."""

    whole: Dataset
    indices: tuple[int, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Sample, int]:
        return self.whole[self.indices[index]]


def spread(dataset: Dataset, limit: int | None) -> Dataset:
    """`limit` images spread evenly: the first ones of a data set are often all of one class."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, not {limit}")
    count = len(dataset)
    if not count:
        raise ValueError("the data set is empty")
    if limit is None or limit >= count:
        return dataset
    return Part(dataset, tuple(index * count // limit for index in range(limit)))
