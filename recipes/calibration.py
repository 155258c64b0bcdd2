"""What calibrated schedules gain: chosen on unlabelled training images, compared on held-out ones; resumable.

    python recipes/calibration.py TRAIN.parquet --out runs/calibration

For each method a schedule is calibrated on images of the training file that recipes/train_cifar10.py trains on, without
their labels, and compared with the schedules of its default stages and of every second block from the first to the
middle, on images that the training recipe holds out. Prints a Markdown table. All is kept in --out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from study import HeldOut
from torch import nn
from train_cifar10 import load_split, normalise

from mambatrim import methods
from mambatrim.bootstrap import Interval
from mambatrim.calibrate import Calibration, calibrate
from mambatrim.cells import plain_word
from mambatrim.compare import Entry, compare, in_stages
from mambatrim.comparison import DENSE, Comparison
from mambatrim.data import open_dataset
from mambatrim.evaluate import spec_of
from mambatrim.opening import model_label, open_model
from mambatrim.reduction import Method
from mambatrim.report import describe_machine, markdown_table


def every_second(depth: int) -> tuple[int, ...]:
    return tuple(range(0, depth // 2 + 1, 2))


def entrants(method: Method, found: Calibration) -> dict[str, Entry]:
    return {
        f"{method.name}, default stages": Entry(method),
        f"{method.name}, every second block": Entry(method, in_stages(every_second)),
        f"{method.name}, calibrated": Entry(method, lambda *_: found.schedule),
    }


def table(found: Comparison) -> str:
    def signed(value: float | None, interval: Interval | None) -> str:
        if value is None or interval is None:
            return ""
        return f"{100 * value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"

    header = ["", "patches that go after each block", "FLOPs saved", "accuracy", "KL", "points ahead of default stages"]
    body = [
        [
            row.name,
            " ".join(map(str, row.removed)),
            "" if row.name == DENSE or row.saved is None else f"{100 * row.saved['both']:.2f} %",
            row.note or f"{100 * row.accuracy:.2f}",
            f"{row.kl:.4f}",
            signed(row.ahead, row.ahead_interval),
        ]
        for row in found.rows
    ]
    return markdown_table(header, body)


def run(model: nn.Module, name: str, method: Method, given: argparse.Namespace, seen: HeldOut, held: HeldOut) -> None:
    images = normalise(seen.images, spec_of(model).preprocess)
    share, started = given.flops_reduction, time.process_time()
    found = calibrate(model, images, share, method, given.out / "journal.jsonl", given.tries)
    out = given.out / f"{plain_word(name)}-{method.name}-{100 * share:g}.json"
    out.write_text(found.to_json() + "\n")
    before = "-" if found.kl_default is None else f"{found.kl_default:.4f}"
    print(
        f"\n{name}, {method.name}, -{share:.0%}: on the {found.images} images that chose, KL {before} with the default "
        f"stages, {found.kl:.4f} calibrated; {found.tried} schedules, {time.process_time() - started:.0f} s of a core "
        f"in this run; {out}\n",
        flush=True,
    )
    rows = entrants(method, found)
    compared = compare(
        {name: model}, rows, [share], held, given.out / "cells", reference=next(iter(rows)), timing=False
    )
    print(f"{len(held):,} held-out images:\n\n{table(compared)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what calibrated schedules gain")
    parser.add_argument("data", help="train.parquet")
    parser.add_argument("--model", default="vim_cifar10", help="as mambatrim compare --model (%(default)s)")
    parser.add_argument("--method", nargs="+", default=["vsm", "mtr"], help="methods to calibrate (vsm mtr)")
    parser.add_argument("--flops-reduction", type=float, default=0.4, help="share of the FLOPs to save (%(default)s)")
    parser.add_argument("--images", type=int, default=256, help="images that choose (%(default)s)")
    parser.add_argument("--held-out", type=int, default=2000, help="held-out images that compare (%(default)s)")
    parser.add_argument("--tries", type=int, default=100, help="schedules at most (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"), help="(%(default)s)")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    classes = open_dataset(given.data).classes
    seen, held = (
        HeldOut(images[:count], labels[:count], classes)
        for (images, labels), count in zip(load_split(given.data), (given.images, given.held_out), strict=True)
    )
    model = open_model(given.model)
    print(describe_machine())
    for name in given.method:
        run(model, model_label(given.model), methods.get(name), given, seen, held)


if __name__ == "__main__":
    main()
