"""What a benchmark found, as tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import giga, percent, table
from .timed import Measured, Measurement

MODELS = ("", "tokens", "FLOPs", "ms/image", "spread", "images/s", "speed-up", "ideal", "realised", "memory")
SCANS = ("scan of one block, one direction", "ms", "spread", "against the kernel")


LEGEND = """ms/image: median of interleaved runs; spread: quartiles over the median. ideal: by the FLOPs.
memory: that a forward adds at its peak, weights and images not counted."""


def to_text(measured: Measurement) -> str:
    """All tables of one setting under its name."""
    lines = [str(measured.setting), models_table(measured.found)]
    if scans := scans_table(measured.found):
        lines.append(f"\n{scans}")
    if measured.disturbance:
        lines.append(f"note: {measured.disturbance}.")
    return "\n".join(lines)


def models_table(found: Sequence[Measured]) -> str:
    """A row for each model that was timed."""
    return table(MODELS, [_row(one) for one in found if one.kind != "scan"])


def scans_table(found: Sequence[Measured]) -> str:
    """A row for each way to run the scan; empty where none was timed."""
    rows = [
        (one.name, f"{one.timing.median:.2f}", percent(one.timing.spread, 0), f"{one.versus:.1f}x")
        for one in found
        if one.kind == "scan"
    ]
    return table(SCANS, rows) if rows else ""


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def _row(one: Measured) -> tuple[str, ...]:
    reduced = one.kind == "reduced"
    tokens = list(dict.fromkeys(one.tokens))
    return (
        one.name,
        " > ".join(map(str, tokens)) if len(tokens) <= 4 else f"{tokens[0]} > ... > {tokens[-1]}",
        giga(one.macs),
        f"{one.timing.median:.2f}",
        percent(one.timing.spread, 0),
        f"{1000 / one.timing.median:.1f}",
        f"{one.versus:.2f}x",
        f"{one.ideal:.2f}x" if reduced else "-",
        percent(one.realised or 0, 0) if reduced else "-",
        mebibytes(one.memory),
    )
