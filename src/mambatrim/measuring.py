"""The bench of a comparison: images in memory, cells on the disk, and what measures those that are missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__
from .apply import reduce
from .cells import Cell, Store, describe, weights_digest
from .comparison import BESIDE, DENSE, Row, Timing
from .entries import Entrant, Entry
from .evaluate import Data, spec_of
from .flops import Trunk, count_flops
from .models.spec import Preprocess
from .prepared import Prepared, batch_ranges, open_data, prepare, unnormalised
from .reduction import CONVENTIONS, Schedule
from .report import machine
from .timing import time_functions

# a batch has at most so many images, and about so many pixels
BATCH, PIXELS = 250, 250 * 64 * 64
# a timing is of short calls, of which the fastest counts: these are the least disturbed
TIMED_IMAGES, TIMED_REPEATS = 32, 9


class Bench:
    """The images in memory, the cells on the disk, and what measures those that are missing."""

    def __init__(
        self, data: Data, frames: int | None, out: str | os.PathLike[str] | None, timing: bool, run: bool
    ) -> None:
        self.dataset, self.frames = open_data(data, frames), frames
        self.labelled = bool(self.dataset.classes)
        self.store = None if out is None else Store(out)
        self.timing, self.run = timing, run
        self.about = {
            "data": str(data) if isinstance(data, str | os.PathLike) else type(data).__name__,
            "versions": {"mambatrim": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        self._prepared: dict[Preprocess, Prepared] = {}
        self._digests: dict[int, str] = {}
        self._kept: dict[int, nn.Module] = {}

    def images(self, model: nn.Module) -> Prepared:
        """The data set as a model's input, decoded once for all models that crop alike."""
        cropped = unnormalised(spec_of(model).preprocess)
        if cropped not in self._prepared:
            self._prepared[cropped] = prepare(self.dataset, cropped, frames=self.frames)
        return self._prepared[cropped]

    def truth(self, model: nn.Module, dense: Cell) -> Tensor:
        """(n,) classes that count as right."""
        labels = self.images(model).truth(spec_of(model))
        return dense.predictions.long() if labels is None else labels

    def dense(self, model: nn.Module) -> Cell | None:
        """The cell of a model as it is, with its logits."""
        if getattr(model, "reducer", None) is not None and cast(Any, model).reducer.schedule.places:
            raise ValueError(f"compare takes dense models and reduces them itself, but this one is {model.reducer}")
        return self._cell(model, model, self._config(model, {"name": DENSE}, 0.0, Schedule(())), None, {})

    def entrant(self, row: Row, model: nn.Module, entrant: Entrant, dense: Cell) -> tuple[Row, Cell | None]:
        """Row and cell of one method at one target; the row says why where it cannot be."""
        beside = self._digest(model)
        if isinstance(entrant, nn.Module):
            config = self._config(entrant, {"name": BESIDE, "beside": beside}, 0.0, Schedule(()))
            row = replace(row, method=BESIDE, **counts(entrant, model))
            return row, self._cell(entrant, model, config, dense, {"label": row.name})
        entry = entrant if isinstance(entrant, Entry) else Entry(entrant)
        row = replace(row, method=entry.method.name)
        try:
            schedule = entry.schedule(cast(Trunk, model), row.target, entry.method)
            fast = reduce(model, schedule=schedule, method=entry.method)
            self._try(fast)
        except ValueError as error:
            return replace(row, note=" ".join(str(error).split())), None
        described = {**describe(entry.method), "name": entry.method.name}
        config = self._config(model, described, row.target, schedule)
        row = replace(row, **counts(fast, model))
        return row, self._cell(fast, model, config, dense, {"label": row.name})

    @torch.inference_mode()
    def _try(self, model: nn.Module) -> None:
        """Run one image, so that what a method cannot do is said here."""
        model(self.images(model).inputs(spec_of(model).preprocess, 0, 1).to(next(model.parameters()).device))

    def _digest(self, model: nn.Module) -> str:
        if id(model) not in self._digests:
            self._digests[id(model)] = weights_digest(model)
            self._kept[id(model)] = model  # so that no other object gets its id
        return self._digests[id(model)]

    def _config(self, model: nn.Module, method: Mapping[str, Any], target: float, schedule: Schedule) -> dict[str, Any]:
        spec, images = spec_of(model), self.images(model)
        dtypes = sorted({str(value.dtype) for value in model.state_dict().values()})
        return {
            "version": __version__,
            "model": {
                "name": spec.name,
                "config": describe(spec.config),
                "weights": self._digest(model),
                "dtypes": dtypes,
                "mean": list(spec.preprocess.mean),
                "std": list(spec.preprocess.std),
            },
            "data": {"images": len(images), "digest": images.digest},
            "method": dict(method),
            "target": target,
            **schedule.as_dict(),
        }

    def _cell(
        self, model: nn.Module, beside: nn.Module, config: dict[str, Any], dense: Cell | None, about: dict[str, Any]
    ) -> Cell | None:
        """The cell from the disk, or else measured and kept; None where it is missing and nothing is to be run."""
        found = None if self.store is None else self.store.find(config)
        if found is None and not self.run:
            return None
        cell = found
        if cell is None:
            predictions, kl, logits = answers(model, self.images(model), dense)
            cell = Cell(config, predictions, kl, logits, None, {**self.about, **about})
        if self.timing and self.run and dense is not None and not _timed_here(cell):
            cell = replace(cell, timing=self._time(model, beside))
        if self.store is not None and cell is not found:
            self.store.keep(cell)
        return cell

    def _time(self, model: nn.Module, beside: nn.Module) -> dict[str, Any]:
        """The model's and the dense model's time, calls interleaved."""
        count = min(TIMED_IMAGES, len(self.dataset))
        calls = {}
        for name, each in (("dense", beside), ("reduced", model)):
            inputs = self.images(each).inputs(spec_of(each).preprocess, 0, count)
            calls[name] = partial(each, inputs.to(next(each.parameters()).device))
        with torch.inference_mode():
            found = time_functions(calls, TIMED_REPEATS, per=count)
        timing = Timing(
            ms=found.times["reduced"].fastest,
            dense_ms=found.times["dense"].fastest,
            batch=count,
            repeats=found.repeats,
            threads=found.threads,
            disturbance=found.disturbance,
        )
        return {**asdict(timing), "machine": machine()}


def timing_of(cell: Cell) -> Timing | None:
    """The time that was measured for a cell, if any."""
    stored = cell.timing
    return None if stored is None else Timing(**{known.name: stored[known.name] for known in fields(Timing)})


def _timed_here(cell: Cell) -> bool:
    """Whether the cell has a time, taken on this kind of machine with as many threads."""
    return cell.timing is not None and cell.timing["machine"] == machine()


def counts(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """FLOPs of a row, by convention, and what they save of another model's."""
    reports = {convention: count_flops(cast(Trunk, model), convention=convention) for convention in CONVENTIONS}
    whole = {convention: count_flops(cast(Trunk, dense), convention=convention).total for convention in CONVENTIONS}
    lengths, schedule = reports["both"].lengths, cast(Trunk, model).reducer.schedule
    return {
        "removed": schedule.removed or (0,) * len(lengths),
        "stem": schedule.stem,
        "tokens": lengths,
        "flops": {convention: found.total for convention, found in reports.items()},
        "saved": {convention: 1 - found.total / whole[convention] for convention, found in reports.items()},
    }


@torch.inference_mode()
def answers(model: nn.Module, images: Prepared, dense: Cell | None) -> tuple[Tensor, Tensor, Tensor]:
    """First classes (n,) int32, divergence from the dense model (n,), and logits if this is the dense model itself."""
    how, device = spec_of(model).preprocess, next(model.parameters()).device
    size = max(1, min(BATCH, PIXELS // images.pixels[0, 0].numel()))
    predictions, divergences, kept = [], [], []
    for start, stop in batch_ranges(len(images), size):
        logits = model(images.inputs(how, start, stop).to(device)).float().cpu()  # (B, classes)
        predictions.append(logits.argmax(dim=1).to(torch.int32))
        if dense is None:
            kept.append(logits)
            divergences.append(torch.zeros(len(logits)))
        else:
            divergences.append(_divergence(dense.logits[start:stop], logits))
    return torch.cat(predictions), torch.cat(divergences), torch.cat(kept) if kept else torch.empty(0, 0)


def _divergence(dense: Tensor, other: Tensor) -> Tensor:
    """KL(dense || other) in nats, from logits (B, classes) each -> (B,) fp32."""
    if dense.shape != other.shape:
        raise ValueError(f"models that are compared must have the same classes, got {dense.shape[1]}, {other.shape[1]}")
    mine, its = (F.log_softmax(logits.double(), dim=1) for logits in (dense, other))
    return (mine.exp() * (mine - its)).sum(dim=1).clamp(min=0).float()
