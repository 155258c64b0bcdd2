"""Results as data, in one JSON schema for every command, recipe and benchmark, and as a table of plain text."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from . import __version__
from .evaluate import spec_of
from .flops import ImageSize, Trunk, count_flops
from .kernels import cpu
from .reduction import CONVENTIONS, Reducer, Schedule

SCHEMA = "mambatrim-report-1"


def report(kind: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole of what one run found, ready for JSON.

    Args:
        kind: what was done, such as "demo".
        results: one `result` per model.

    Returns:
        {"schema", "kind", "versions", "machine", "results"}; each result has {"name", "model", "method", "schedule",
        "tokens", "flops", "figures"}. Shares are from 0 to 1, times in milliseconds, FLOPs in multiply-adds.
    """
    return {
        "schema": SCHEMA,
        "kind": kind,
        "versions": {"mambatrim": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
        "results": [dict(entry) for entry in results],
    }


def result(name: str, model: nn.Module, figures: Mapping[str, Any], image_size: ImageSize = None) -> dict[str, Any]:
    """One model of a report: which it is, what its reducer does, and the figures that were found."""
    counts = {convention: count_flops(cast(Trunk, model), image_size, convention) for convention in CONVENTIONS}
    reducer: Reducer | None = getattr(model, "reducer", None)  # models on a grid have none
    schedule = Schedule(()) if reducer is None else reducer.schedule
    if reducer is not None and not schedule.depth:
        schedule = Schedule.none(len(counts["both"].lengths))
    return {
        "name": name,
        "model": spec_of(model).name,
        "method": "dense" if reducer is None else reducer.method.name,
        "schedule": schedule.as_dict(),
        "tokens": list(counts["both"].lengths),
        "flops": {convention: counts[convention].total for convention in counts},
        "figures": dict(figures),
    }


def to_json(content: Mapping[str, Any]) -> str:
    """JSON text, indented; a figure that is no number is an error and not NaN, which is no JSON."""
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def machine() -> dict[str, Any]:
    """What the figures were measured on; instruction_set is None where the kernels were not compiled."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": None if cpu.missing() else cpu.level(),
    }


def describe_machine() -> str:
    """`machine()` in one line."""
    facts = machine()
    kernels = "no compiled kernels" if facts["instruction_set"] is None else f"{facts['instruction_set']} kernels"
    cores, threads = _count(facts["cores"], "core"), _count(facts["threads"], "thread")
    return f"{facts['cpu']}, {cores}, {threads}, {kernels}, torch {torch.__version__}"


def machine_and_kernels() -> str:
    """`describe_machine`, and on a line of its own what is missing where the kernels were not compiled."""
    return "\n".join(filter(None, (describe_machine(), cpu.missing())))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: bool = False) -> str:
    """Columns of plain text under their names; the first is flush left, and so are the others if they hold words."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(n) if words else cell.rjust(n) for cell, n in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join(map(line, lines))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is flush left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def csv_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values with a header; None is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def percent(share: float, digits: int = 1) -> str:
    """0.4 -> 40.0 %."""
    return f"{100 * share:.{digits}f} %"


def giga(flops: float) -> str:
    """FLOPs with four digits and their unit."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if flops >= size:
            value = flops / size
            return f"{value:.{max(0, 4 - len(str(int(value))))}f} {unit}"
    return f"{flops:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cpu_name() -> str:
    """The processor's name for people; where the system has none, its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name" and value.strip():
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"
