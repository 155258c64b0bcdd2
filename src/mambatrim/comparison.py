"""What a comparison found, as rows, and the rows as CSV, JSON, Markdown and a picture of the frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .bootstrap import Interval
from .cells import plain_word
from .frontier import Curve, Panel, Point, draw_frontier
from .reduction import Schedule
from .report import csv_table, markdown_table, percent, report, to_json

DENSE, BESIDE = "dense", "another dense model"
COSTS = {"flops": "FLOPs, % of the dense model's", "time": "time, % of the dense model's"}


@dataclass(frozen=True)
class Timing:
    """Milliseconds per image of a model and of its dense one, calls interleaved; the fastest of the repeats.

    disturbance: one sentence on what made the figures uncertain, or nothing.
    """

    ms: float
    dense_ms: float
    batch: int
    repeats: int
    threads: int
    disturbance: str

    @property
    def saved(self) -> float:
        """Share of the dense model's time."""
        return 1 - self.ms / self.dense_ms


@dataclass(frozen=True)
class Row:
    """One model with one method at one saving. Shares are from 0 to 1, intervals hold 95 % of the resamples.

    model, name: what the caller calls the model and the method. method: the name that the method has itself.
    target: share of the FLOPs that was to be saved. note: why there are no figures, or nothing.
    removed, stem, tokens: patches that go after each block and before block 0, and tokens that enter each.
    flops, saved: multiply-adds of an image, and the share saved, by convention (`reduction.CONVENTIONS`).
    images: how many were seen.
    accuracy: share of images whose label came first; agreement with the dense model where there are no labels.
    drop: accuracy of the dense model minus this one's, on the same images.
    ahead: accuracy minus that of the reference method at the same target, on the same images.
    agreement: share of images with the dense model's first class.
    kl: mean over images of KL(dense || this) of the class probabilities, in nats.
    cell: name of the file that the images' answers are kept in, where they are.
    """

    model: str
    name: str
    method: str
    target: float
    note: str = ""
    removed: tuple[int, ...] = ()
    stem: int = 0
    tokens: tuple[int, ...] = ()
    flops: Mapping[str, int] | None = None
    saved: Mapping[str, float] | None = None
    images: int = 0
    accuracy: float = 0.0
    accuracy_interval: Interval | None = None
    drop: float = 0.0
    drop_interval: Interval | None = None
    ahead: float | None = None
    ahead_interval: Interval | None = None
    agreement: float = 0.0
    kl: float = 0.0
    timing: Timing | None = None
    cell: str = ""

    def flat(self) -> dict[str, Any]:
        """The row for a table of data: no nested values, None where something is not known."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in ("removed", "tokens"):
                flat[name] = " ".join(map(str, value))
            elif name in ("flops", "saved"):
                flat |= {f"{name}_{kind}": (value or {}).get(kind) for kind in ("both", "paper", "projections")}
            elif name.endswith("_interval"):
                flat |= {name.replace("interval", bound): (value or {}).get(bound) for bound in ("low", "high")}
            elif name == "timing":
                fields = ("ms", "dense_ms", "threads", "disturbance")
                flat |= {("time_" + key): (value or {}).get(key) for key in fields}
                flat["time_saved"] = self.timing.saved if self.timing else None
            else:
                flat[name] = None if self.note and name in ("images", "accuracy", "drop", "agreement", "kl") else value
        return flat


@dataclass(frozen=True)
class Comparison:
    """All rows, dense models first in their groups.

    reference: name of the method that `ahead` is counted from, or None.
    labelled: whether accuracy is against labels, or against the dense model's answers.
    """

    rows: tuple[Row, ...]
    reference: str | None
    labelled: bool

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in order."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    def save(self, folder: Path) -> list[Path]:
        """Write comparison.csv, .json and .md, and a picture of the frontier for each model that has figures."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"csv": self.to_csv(), "json": to_json(self.to_report()), "md": self.to_markdown() + "\n"}
        paths = [folder / f"comparison.{ending}" for ending in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
        for model in dict.fromkeys(row.model for row in self.rows if not row.note):
            paths.append(folder / f"frontier-{plain_word(model)}.png")
            self.frontier(model).save(paths[-1])
        return paths

    def to_csv(self) -> str:
        """A line per row under the names of the columns; empty where something is not known."""
        rows = [row.flat() for row in self.rows]
        return csv_table(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""

    def to_report(self) -> dict[str, Any]:
        """The rows in the schema of `report.report`."""
        return report("compare", [self._result(row) for row in self.rows])

    def _result(self, row: Row) -> dict[str, Any]:
        figures = {
            "target": row.target,
            "note": row.note,
            "images": row.images,
            "labelled": self.labelled,
            "reference": self.reference,
            "saved": dict(row.saved or {}),
            **{name: getattr(row, name) for name in ("accuracy", "drop", "ahead", "agreement", "kl")},
            **{
                name: asdict(getattr(row, name)) if getattr(row, name) else None
                for name in ("accuracy_interval", "drop_interval", "ahead_interval", "timing")
            },
            "cell": row.cell,
        }
        return {
            "name": row.name,
            "model": row.model,
            "method": row.method,
            "schedule": Schedule(row.removed, row.stem).as_dict(),
            "tokens": list(row.tokens),
            "flops": dict(row.flops or {}),
            "figures": figures,
        }

    def to_markdown(self) -> str:
        """A table per model."""
        return "\n\n".join(self._model_table(name) for name in self.models)

    def _model_table(self, model: str) -> str:
        rows = [row for row in self.rows if row.model == model]
        what = "accuracy" if self.labelled else "agreement"
        header = ["method", "target", "FLOPs saved", f"{what} %", "drop"]
        header += [f"ahead of {self.reference}"] if self.reference else []
        header += ["KL to dense"]
        timed = any(row.timing for row in rows)
        header += ["time saved"] if timed else []
        body = [self._cells(row, timed) for row in rows]
        dense = next((row for row in rows if row.name == DENSE), rows[0])
        truth = "labels" if self.labelled else "no labels: agreement with the dense model"
        lines = [f"**{model}**, {dense.images:,} images, {truth}", "", markdown_table(header, body)]
        notes = [f"- {row.name}, -{row.target:.0%}: {row.note}" for row in rows if row.note]
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def _cells(self, row: Row, timed: bool) -> list[str]:
        first = [row.name, f"-{row.target:.0%}" if row.target else ""]
        if row.note:
            return [*first, *["-"] * (3 + bool(self.reference) + 1 + timed)]
        saved = (row.saved or {}).get("both", 0.0)
        cells = [*first, percent(saved) if saved else ""]
        cells += [f"{100 * row.accuracy:.2f}", "" if row.name == DENSE else _points(row.drop, row.drop_interval)]
        if self.reference:
            cells.append("" if row.ahead is None else _points(row.ahead, row.ahead_interval, sign="+"))
        cells.append("" if row.name == DENSE else f"{row.kl:.3f}")
        return cells + ([percent(row.timing.saved) if row.timing else ""] if timed else [])

    def frontier(self, model: str) -> Image.Image:
        """Accuracy of one model against its FLOPs, and against its time where that was measured.

        Raises:
            ValueError: there is no such model, or no row of it has figures.
        """
        rows = [row for row in self.rows if row.model == model and not row.note]
        if not rows:
            raise ValueError(f"there are no figures of a model {model!r}; known: {', '.join(self.models)}")
        what = "accuracy, %" if self.labelled else "agreement with the dense model, %"
        panels = [Panel(words, self._curves(rows, cost)) for cost, words in COSTS.items()]
        return draw_frontier(f"{model}: 95 % intervals, {rows[0].images:,} images", what, panels)

    def _curves(self, rows: Sequence[Row], cost: str) -> tuple[Curve, ...]:
        curves = []
        for name in dict.fromkeys(row.name for row in rows):
            own = [row for row in rows if row.name == name]
            points = tuple(point for row in own if (point := _point(row, cost)) is not None)
            # a dense model costs all of its time, measured or not; with no other time there is no plot against time
            curves.append(Curve(name, points, strong=name == self.reference, alone=own[0].method in (DENSE, BESIDE)))
        return tuple(curves) if any(curve.points for curve in curves if curve.name != DENSE) else ()


def _point(row: Row, cost: str) -> Point | None:
    """The place of a row in the plot; costs are in percent of the dense model's."""
    if row.name == DENSE:
        share = 1.0
    elif cost == "time":
        if row.timing is None:
            return None
        share = 1 - row.timing.saved
    else:
        share = 1 - (row.saved or {})["both"]
    interval = row.accuracy_interval or Interval(row.accuracy, row.accuracy)
    return Point(100 * share, 100 * row.accuracy, 100 * interval.low, 100 * interval.high)


def _points(value: float, interval: Interval | None, sign: str = "") -> str:
    """A difference in points with its interval."""
    text = f"{100 * value:{sign}.2f}"
    return text if interval is None else f"{text} [{100 * interval.low:{sign}.2f}, {100 * interval.high:{sign}.2f}]"
