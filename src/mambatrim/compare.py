"""compare: models, methods and savings on the same images, cell by cell; a stopped run continues where it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .bootstrap import difference_interval, share_interval
from .cells import Cell, key
from .clips import frames_of
from .comparison import DENSE, Comparison, Row
from .entries import Entrant, Entry, Scheduler, in_stages, nearest
from .evaluate import Data, spec_of
from .measuring import Bench, counts, timing_of
from .reduction import Method

__all__ = ["Entrant", "Entry", "Progress", "Scheduler", "compare", "in_stages", "nearest"]

# cells done, cells in all, and what is done now
Progress = Callable[[int, int, str], None]


def compare(
    models: Mapping[str, nn.Module],
    methods: Mapping[str, Entrant],
    targets: Sequence[float],
    data: Data,
    out: str | os.PathLike[str] | None = None,
    reference: str | None = "mtr",
    timing: bool = True,
    run: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Run every model with every method at every saving on the same images, and say what each loses.

    Args:
        models: dense models of the zoo, by what to call them.
        methods: by what to call them: a Method; an Entry, which has stages of its own; or another dense model of the
            same classes, to stand beside the reduced ones.
        targets: shares of the FLOPs to save, each above 0 and below 0.9, the method's own cost included.
        data: a data set of `data.py`, or the path of one; or a folder of pictures without classes. Where there are no
            labels the dense model's first class counts as right, and accuracy means agreement with it. For models of
            videos a folder of them, as `clips.open_clips` takes.
        out: folder for the cells. What is there is not run again; another option, weight or image is another cell.
            None keeps nothing.
        reference: the method that every other one is compared with, image by image; None for none.
        timing: measure times too, each model in turn with its dense one.
        run: False makes rows of the cells in `out` only, and runs nothing.
        progress: called before each cell, and at the end.

    Raises:
        ValueError: nothing to compare, a target out of range, an unknown reference, models and data that do not fit
            together, or a damaged cell.
    """
    _check(models, methods, targets, reference)
    bench = Bench(data, _frames([*models.values(), *methods.values()]), out, timing, run)
    rows: list[Row] = []
    done, total = 0, len(models) * len(_rows_of(methods, targets))
    for name, model in models.items():
        dense, found = None, list[tuple[Row, Cell | None]]()
        for label, target in _rows_of(methods, targets):
            if progress is not None:
                progress(done, total, f"{name}, {label}" + (f" at -{target:.0%}" if target else ""))
            done += 1
            row = Row(name, label, DENSE, target)
            if label == DENSE:
                dense = bench.dense(model)
                found.append((replace(row, **counts(model, model)), dense))
            elif dense is not None:
                found.append(bench.entrant(row, model, methods[label], dense))
        if dense is not None:
            rows += _scored(found, bench.truth(model, dense), dense, reference)
    if progress is not None:
        progress(total, total, "done")
    return Comparison(tuple(rows), reference, bench.labelled)


def _check(
    models: Mapping[str, nn.Module],
    methods: Mapping[str, Entrant],
    targets: Sequence[float],
    reference: str | None,
) -> None:
    if not models or not methods:
        raise ValueError("compare needs at least one model and one method")
    for target in targets:
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 0.9:
            raise ValueError(f"targets must be shares of the FLOPs to save, above 0 and below 0.9, got {target!r}")
    if len(set(targets)) != len(targets):
        raise ValueError(f"targets must differ, got {', '.join(map(str, targets))}")
    for label, entrant in methods.items():
        if label == DENSE or not isinstance(entrant, Method | Entry | nn.Module):
            raise ValueError(
                f"methods must be Methods, Entries or dense models by name, {DENSE!r} being taken, "
                f"got {label!r}: {entrant!r:.80}"
            )
    if not targets and not all(isinstance(entrant, nn.Module) for entrant in methods.values()):
        raise ValueError("compare needs at least one target")
    if reference is not None and not isinstance(methods.get(reference), Method | Entry):
        raise ValueError(f"the reference {reference!r} must be one of the methods: {', '.join(methods)}")


def _frames(models: Sequence[object]) -> int | None:
    """How many frames the models take, all the same; None for pictures."""
    found = {frames_of(spec_of(model)) for model in models if isinstance(model, nn.Module)}
    if len(found) > 1:
        each = ", ".join("pictures" if frames is None else f"{frames} frames" for frames in sorted(found, key=str))
        raise ValueError(f"models that are compared must take the same input, and these take {each}")
    (frames,) = found
    return frames


def _rows_of(methods: Mapping[str, Entrant], targets: Sequence[float]) -> list[tuple[str, float]]:
    """Names and targets of a model's rows, in order: itself, other dense models, then target by target."""
    others = [(label, 0.0) for label, entrant in methods.items() if isinstance(entrant, nn.Module)]
    reduced = [label for label, entrant in methods.items() if not isinstance(entrant, nn.Module)]
    return [(DENSE, 0.0), *others, *((label, target) for target in targets for label in reduced)]


def _scored(found: Sequence[tuple[Row, Cell | None]], truth: Tensor, dense: Cell, reference: str | None) -> list[Row]:
    """The rows of one model with their figures, or with the note that says why they have none."""
    hits = {(row.name, row.target): cell.predictions == truth for row, cell in found if cell is not None}
    full = dense.predictions == truth
    rows = []
    for row, cell in found:
        if cell is None:
            rows += [row] if row.note else []
            continue
        own, other = hits[row.name, row.target], hits.get((str(reference), row.target))
        figures: dict[str, Any] = {
            "images": len(truth),
            "accuracy": _share(own),
            "accuracy_interval": share_interval(own),
            "drop": _share(full) - _share(own),
            "drop_interval": difference_interval(full, own),
            "agreement": _share(cell.predictions == dense.predictions),
            "kl": float(cell.kl.double().mean()),
            "timing": timing_of(cell),
            "cell": key(cell.config),
        }
        if other is not None and row.name != reference:
            figures |= {"ahead": _share(own) - _share(other), "ahead_interval": difference_interval(own, other)}
        rows.append(replace(row, **figures))
    return rows


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
