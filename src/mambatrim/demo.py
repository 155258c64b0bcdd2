"""The demonstration: the bundled model on the bundled images, with all its tokens and with fewer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .apply import reduce
from .data import Zip, preprocess
from .evaluate import Progress, evaluate_models, spec_of
from .kernels import cpu
from .models import BUNDLED, create_model
from .report import giga, machine_and_kernels, percent, report, result, table
from .timing import time_models
from .visualize import visualize

MODEL = next(iter(BUNDLED))
SAMPLES = "cifar10_samples.zip"
SAVINGS = (0.2, 0.3, 0.4)
# the paper's, and the one that `reduce` takes by default; the picture is of the last
METHODS = ("mtr", "vsm")
BATCH, REPEATS = 50, 15
# without the compiled kernels a forward takes several times as long
SLOW_LIMIT, SLOW_REPEATS = 200, 5
PICTURED = 4
HEADER = ("", "tokens", "FLOPs", "saved", "top-1", "as dense", "ms/image", "saved")


@dataclass(frozen=True)
class Demo:
    """What was found.

    report: as `report.report` makes it, the dense model first.
    examples: (image, dense prediction, prediction with the fewest tokens) of one image per class.
    picture: the tokens of a few of these images.
    """

    report: dict[str, Any]
    examples: tuple[tuple[str, str, str], ...]
    picture: Image.Image

    def to_text(self) -> str:
        """What was found, for people."""
        dense, *_, fewest = self.report["results"]
        figures = dense["figures"]
        error = 100 * math.sqrt(figures["top1"] * (1 - figures["top1"]) / figures["images"])
        rows = [(name, full, less + ("" if less == full else " *")) for name, full, less in self.examples]
        lines = [
            f"{dense['model']} on {figures['images']:,} CIFAR-10 test images",
            machine_and_kernels(),
            f"\n{table(HEADER, [_row(entry, dense) for entry in self.report['results']])}\n",
            f"top-1: standard error {error:.1f} points. as dense: same first class as with all tokens.",
            "FLOPs: multiply-adds, both scan directions. ms/image: median of interleaved runs, "
            f"{figures['batch']} images at a time.",
        ]
        lines += [f"note: {figures['disturbance']}."] if figures["disturbance"] else []
        lines.append(f"\n{table(('image (class/row)', 'dense', fewest['name']), rows, words=True)}")
        if any(full != less for _, full, less in self.examples):
            lines.append("* another class than with all tokens")
        return "\n".join(lines)


def demo(limit: int | None = None, progress: Progress | None = None) -> Demo:
    """Run it. limit: use only so many images for the accuracy; all, or few where the kernels were not compiled."""
    slow = bool(cpu.missing())
    dense = create_model(MODEL, weights="bundled")
    models: dict[str, nn.Module] = {"dense": dense}
    for method in METHODS:
        models |= {f"{method} -{saving:.0%}": reduce(dense, saving, method=method) for saving in SAVINGS}
    fewest = list(models.values())[-1]
    with _samples() as samples:
        evaluations = evaluate_models(
            models, samples, "dense", BATCH, limit or (SLOW_LIMIT if slow else None), progress
        )
        # the images are sorted by class: the one in the middle of each class
        chosen = [(2 * i + 1) * len(samples) // (2 * len(samples.classes)) for i in range(len(samples.classes))]
        names, pictures = [samples.samples[i][0] for i in chosen], [samples[i][0] for i in chosen]
        step = max(1, len(samples) // BATCH)
        batch = _batch([samples[i][0] for i in range(0, len(samples), step)][:BATCH], dense)  # (BATCH, 3, H, W)
    timings = time_models(models, batch, SLOW_REPEATS if slow else REPEATS)
    timed = {"batch": len(batch), "repeats": timings.repeats, "disturbance": timings.disturbance}
    results = []
    for name, model in models.items():
        found = evaluations[name]
        figures = {"images": found.images, "top1": found.top1, "top5": found.top5, "agreement": found.agreement}
        results.append(result(name, model, figures | {"ms_per_image": timings.times[name].median} | timed))
    inputs = _batch(pictures, dense)
    examples = tuple(zip(names, _predicted(dense, inputs), _predicted(fewest, inputs), strict=True))
    drawn = range(0, len(names), -(-len(names) // PICTURED))
    return Demo(
        report("demo", results), examples, visualize(fewest, [pictures[i] for i in drawn], [names[i] for i in drawn])
    )


@contextmanager
def _samples() -> Iterator[Zip]:
    with as_file(files("mambatrim") / "assets" / SAMPLES) as path:
        yield Zip(path)


def _batch(pictures: Sequence[Image.Image], model: nn.Module) -> Tensor:
    return torch.stack([preprocess(picture, spec_of(model).preprocess) for picture in pictures])


@torch.no_grad()
def _predicted(model: nn.Module, images: Tensor) -> list[str]:
    names = spec_of(model).classes or ()
    return [names[index] for index in model(images).argmax(1).tolist()]


def _row(entry: dict[str, Any], dense: dict[str, Any]) -> tuple[str, ...]:
    figures, flops = entry["figures"], entry["flops"]["both"]
    return (
        entry["name"],
        " > ".join(map(str, dict.fromkeys(entry["tokens"]))),
        giga(flops),
        percent(1 - flops / dense["flops"]["both"]),
        percent(figures["top1"]),
        percent(figures["agreement"]),
        f"{figures['ms_per_image']:.2f}",
        percent(1 - figures["ms_per_image"] / dense["figures"]["ms_per_image"]),
    )
