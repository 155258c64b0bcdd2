"""Tables of Markdown, of times that are taken in turn: what the scripts of this folder share."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mambatrim.report import describe_machine, machine
from mambatrim.timing import time_functions

MOST = 1000  # rounds; the time ends them


class Page:
    """Prints tables of Markdown and keeps their rows."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # for the rounds of one row
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def table(self, title: str, header: Sequence[str], rows: Any) -> None:
        print(f"\n**{title}**\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        kept = self.tables[title] = []
        for row in rows:
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            kept.append(dict(zip(header, map(str, row), strict=True)))

    def times(self, functions: dict[str, Callable[[], object]], **options: Any) -> dict[str, float]:
        """Milliseconds of the fastest call of each, called in turn."""
        with torch.no_grad():
            found = time_functions(functions, MOST, seconds=self.seconds, **options)
        return {name: timing.fastest for name, timing in found.times.items()}


def ratio(value: float, target: float, least: bool = False) -> str:
    """With a star where it misses: more than the target, or less than it where that is the least."""
    return f"{value:.2f}{' *' if (value < target if least else value > target) else ''}"


def parser(description: str, sections: Mapping[str, object], seconds: float) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(sections)} (all)")
    made.add_argument("--seconds", type=float, default=seconds, help="for the rounds of one row, about (%(default)s)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, help="write the tables to this file")
    return made


def chosen(made: argparse.ArgumentParser, sections: Mapping[str, object]) -> argparse.Namespace:
    """The options, with the threads set; exit code 2 for a section that there is not."""
    options = made.parse_args()
    unknown = [name for name in options.sections if name not in sections]
    if unknown:
        made.error(f"unknown section {unknown[0]!r}; known: {', '.join(sections)}")
    if options.threads < 1:
        made.error(f"threads must be at least 1, not {options.threads}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def run(sections: Mapping[str, Callable[[Page], None]], options: argparse.Namespace) -> None:
    """Print the sections that were asked for, or all."""
    print(describe_machine())
    start, page = time.perf_counter(), Page(options.seconds)
    for name in options.sections or sections:
        sections[name](page)
    print(f"\n{time.perf_counter() - start:.0f} seconds")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "tables": page.tables}, indent=2))
