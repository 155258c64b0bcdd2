"""The study of docs/study.md, from the CIFAR-10 parquet files: every table, every picture, one command; resumable.

    python recipes/study.py TRAIN.parquet TEST.parquet --model vim_cifar10 studies/models/* --page docs/study.md

On the images that recipes/train_cifar10.py holds out, options are chosen: MTR's open choices, and the stages of every
method. On the test images, methods are compared, each at the default stages and at its own best ones, and the released
variants with the correct ones. Cells are kept in --out, so a stopped run continues, and --no-run prints what is there.
The tables go to the standard output, and between the markers of --page, the pictures beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image
from torch import Tensor, nn
from train_cifar10 import load_split

from mambatrim import methods
from mambatrim.cells import plain_word
from mambatrim.compare import Entry, Scheduler, compare, in_stages
from mambatrim.comparison import DENSE, Comparison, Row
from mambatrim.data import Dataset, open_dataset
from mambatrim.evaluate import Part, spread
from mambatrim.methods.virtual import early
from mambatrim.opening import model_label, open_model
from mambatrim.reduction import Method, default_stages
from mambatrim.report import describe_machine, markdown_table

# the saving that everything is chosen at comes first, so that a run that is cut short has it
TARGETS, CHOSEN_AT = (0.4, 0.3, 0.2, 0.5), 0.4
PAGE = Path(__file__).resolve().parents[1] / "docs" / "study.md"


# ----------------------------------------------------------------------------------------------------- what is compared


def mtr_choices() -> dict[str, Method]:
    """MTR with one choice changed at a time; the first is the default."""
    mtr, by_rank = methods.mtr, methods.by_rank
    return {
        "default": mtr(),
        "score: B": mtr(score=methods.scan_score("B")),
        "score: C": mtr(score=methods.scan_score("C")),
        "score: class token": mtr(score=methods.CLASS_TOKEN),
        "score: norm": mtr(score=methods.NORM),
        "score: centrality": mtr(score=methods.CENTRALITY),
        "score: inverse delta": mtr(score=methods.inverse(methods.DELTA)),
        "score: random": methods.random(0),
        "score: random, second draw": methods.random(1),
        "score: random, third draw": methods.random(2),
        "delta: forward": mtr(score=methods.delta(methods.forward)),
        "delta: backward": mtr(score=methods.delta(methods.backward)),
        "groups: all others are targets": mtr(groups=by_rank(methods.all_others)),
        "groups: strongest links of the lowest half": mtr(groups=by_rank(methods.all_others, methods.lowest_half)),
        "groups: even and odd": mtr(groups=methods.EVEN_ODD),
        "feature: mixer's output": mtr(feature="update"),
        "feature: delta": mtr(feature="dt"),
        "feature: B": mtr(feature="B"),
        "feature: C": mtr(feature="C"),
        "mean: plain": mtr(weight=methods.plain),
        "prune, not merge": mtr(combine=methods.pruned),
        "order: not restored": mtr(order=methods.as_grouped),
        "class token: centre": mtr(place=methods.centre),
        "class token: proportional": mtr(place=methods.proportional),
    }


# where patches go, by depth; the default is after 5, 10 and 15 of 24 blocks
STAGES: dict[str, Scheduler] = {
    "default": in_stages(default_stages),
    "early": in_stages(lambda depth: (0, depth // 6, depth // 3)),
    "first half": in_stages(early),
    "every second block": in_stages(lambda depth: tuple(range(1, depth - 1, 2))),
}
# the correct method and what was released in its place
RELEASED = {
    "rmeeto": "rmeeto_released",
    "pumer": "pumer_released",
    "evit": "evit_released",
    "utr": "utr_released",
    "utr_merge": "utr_released_merge",
    "utr_prune": "utr_released_prune",
    "hsa": "hsa_released",
}


def published() -> dict[str, Method]:
    """Every method with its default options, but for the released variants."""
    return {name: methods.get(name) for name in methods.METHODS if name not in RELEASED.values()}


# ------------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class HeldOut:
    """The images that the training recipe holds out."""

    images: Tensor  # (n, 3, 32, 32) uint8
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy()), int(self.labels[index])


def held_out(path: str) -> HeldOut:
    """The held-out images of the training file."""
    _, (images, labels) = load_split(path)
    return HeldOut(images, labels, open_dataset(path).classes)


# ------------------------------------------------------------------------------------------------------------ the parts


class TimeIsUp(Exception):
    """The run has taken as long as it was given."""


@dataclass(frozen=True)
class Study:
    """What all parts have in common; `held` reads the held-out images, which takes a while."""

    models: Mapping[str, nn.Module]
    test: Dataset
    held: Callable[[], Dataset]
    out: Path
    targets: Sequence[float]
    run: bool
    timing: bool
    until: float

    def part(
        self, name: str, entrants: Mapping[str, Method | Entry | nn.Module], data: Dataset, reference: str
    ) -> Comparison:
        """Run a part as far as time allows, model by model, target by target, and give the rows that are there."""

        def progress(done: int, total: int, now: str) -> None:
            print(f"{time.strftime('%H:%M:%S')} {name} {done}/{total} {now}", flush=True)
            if time.monotonic() > self.until:
                raise TimeIsUp

        given = (self.models, entrants, self.targets, data, self.out / "cells", reference)
        if self.run:
            try:
                compare(*given, timing=self.timing, progress=progress)
            except TimeIsUp:
                print("time is up; run again to continue")
        found = compare(*given, timing=False, run=False)
        found.save(self.out / name)
        return found


def best_stages(found: Comparison, model: str) -> dict[str, str]:
    """For each method that ran at all stages, those that lost least on the held-out images; of equals the first."""
    rows = {row.name: row for row in found.rows if row.model == model and row.target == CHOSEN_AT}
    best = {}
    for method in published():
        own = {at: rows[f"{method} @ {at}"] for at in STAGES if f"{method} @ {at}" in rows}
        if len(own) == len(STAGES):
            best[method] = max(own, key=lambda at: -1.0 if own[at].note else own[at].accuracy)
    return best


# --------------------------------------------------------------------------------------------------------------- tables


def pivot(found: Comparison, model: str, write: Callable[[Row], str], first: str = "method") -> str:
    """Methods by savings."""
    rows = {(row.name, row.target): row for row in found.rows if row.model == model}
    names = list(dict.fromkeys(name for name, _ in rows if name != DENSE))
    targets = sorted({target for name, target in rows if target})
    body = [[name, *(_written(rows.get((name, target)), write) for target in targets)] for name in names]
    return markdown_table([first, *(f"-{target:.0%}" for target in targets)], body)


def _written(row: Row | None, write: Callable[[Row], str]) -> str:
    return "" if row is None else "-" if row.note else write(row)


def accuracy(row: Row) -> str:
    return f"{100 * row.accuracy:.1f}"


def ahead(row: Row) -> str:
    """The difference to the reference in points with its interval."""
    if row.ahead is None or row.ahead_interval is None:
        return "0"
    low, high = row.ahead_interval.low, row.ahead_interval.high
    return f"{100 * row.ahead:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def divergence(row: Row) -> str:
    return f"{row.kl:.3f}"


def speed(row: Row) -> str:
    return f"{100 * row.timing.saved:.0f} %" if row.timing else ""


def verdict(found: Comparison, model: str) -> str:
    """Which methods are ahead of the reference, behind it, or not told apart from it, at each saving."""
    lines = []
    for target in sorted({row.target for row in found.rows if row.target}):
        rows = [row for row in found.rows if row.model == model and row.target == target and row.ahead_interval]
        if not rows:  # not run yet
            continue
        rows.sort(key=lambda row: -(row.ahead or 0))
        sides = {
            "ahead": [row.name for row in rows if row.ahead_interval and row.ahead_interval.low > 0],
            "behind": [row.name for row in rows if row.ahead_interval and row.ahead_interval.high < 0],
        }
        rest = [row.name for row in rows if row.name not in sides["ahead"] + sides["behind"]]
        texts = [f"{side}: {', '.join(names) or 'none'}" for side, names in (*sides.items(), ("not told apart", rest))]
        lines.append(f"- -{target:.0%}, {found.reference} against {len(rows)} others. " + "; ".join(texts) + ".")
    return "\n".join(lines)


def heading(found: Comparison, model: str, what: str) -> str:
    dense = next(row for row in found.rows if row.model == model and row.name == DENSE)
    interval = dense.accuracy_interval
    bounds = f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]" if interval else ""
    return f"**{model}**, {dense.images:,} {what}; all tokens: {100 * dense.accuracy:.2f} %{bounds}."


def tables(found: Comparison, what: str, parts: Mapping[str, Callable[[Row], str]], first: str = "method") -> str:
    """For each model a heading and one table per figure."""
    texts = []
    for model in found.models:
        texts.append(heading(found, model, what))
        texts += [f"{title}\n\n{pivot(found, model, write, first)}" for title, write in parts.items()]
    return "\n\n".join(texts)


# ------------------------------------------------------------------------------------------------------------- the page


def write_page(page: Path, name: str, text: str, by: str = "recipes/study.py") -> None:
    """Put a text between the two markers of its name."""
    begin, end = f"<!-- {name}: written by {by} -->", f"<!-- end of {name} -->"
    old = page.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise SystemExit(f"{page} must have the markers {begin} and {end}, once each")
    head, rest = old.split(begin)
    between = f"\n\n{text}\n\n" if text else "\n"
    page.write_text(f"{head}{begin}{between}{end}{rest.split(end)[1]}", encoding="utf-8")


def _unwrapped(text: str) -> str:
    """Paragraphs on one line each, as the pages have them."""
    return "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in text.split("\n\n"))


def arguments(description: str, parts: Iterable[str], targets: Sequence[float], out: str) -> argparse.ArgumentParser:
    """The words that all studies understand."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("train", help="train.parquet, for the held-out images")
    parser.add_argument("test", help="test.parquet")
    parser.add_argument("--model", nargs="+", default=["vim_cifar10"], help="as mambatrim compare --model")
    parser.add_argument("--part", nargs="+", choices=list(parts), default=list(parts), help="which parts (all)")
    parser.add_argument("--target", nargs="+", type=float, default=targets, help="shares of the FLOPs to save")
    parser.add_argument("--images", type=int, help="use only so many of the test images")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; run again to continue")
    parser.add_argument("--no-run", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--no-timing", action="store_true", help="measure no times")
    parser.add_argument("--out", type=Path, default=Path(out), help="cells and tables (%(default)s)")
    parser.add_argument("--page", type=Path, help="page whose marked places the tables are put into")
    return parser


def set_up(options: argparse.Namespace, images: int | None, held: int | None) -> Study:
    """What the words say, with so many test images and held-out images (None: all)."""
    return Study(
        {model_label(text): open_model(text) for text in options.model},
        spread(open_dataset(options.test), images),
        cache(lambda: spread(held_out(options.train), held)),
        options.out,
        tuple(options.target),
        not options.no_run,
        not options.no_timing,
        time.monotonic() + 60 * options.minutes,
    )


def copy_pictures(out: Path, page: Path, names: str) -> None:
    """Put the pictures of a study beside its page."""
    for picture in out.glob(names):
        (page.parent / picture.name).write_bytes(picture.read_bytes())


# ----------------------------------------------------------------------------------------------------------------- main


def mtr_part(study: Study) -> str:
    entrants: dict[str, Method | Entry | nn.Module] = {**mtr_choices()}
    entrants |= {f"stages: {name}": Entry(methods.mtr(), how) for name, how in STAGES.items() if name != "default"}
    found = study.part("choices", entrants, study.held(), "default")
    parts = {"Accuracy in percent:": accuracy, "Points ahead of the default, with 95 % intervals:": ahead}
    return tables(found, "held-out images", parts, "choice")


def stages_part(study: Study) -> str:
    found = study.part("stages", staged(), study.held(), "mtr @ default")
    parts = {"Accuracy in percent:": accuracy}
    return tables(found, "held-out images", parts, "method @ stages")


def staged() -> dict[str, Method | Entry | nn.Module]:
    """Every method at every set of stages."""
    return {f"{name} @ {at}": Entry(method, how) for name, method in published().items() for at, how in STAGES.items()}


def methods_part(study: Study) -> str:
    entrants = {name: Entry(method, STAGES["default"]) for name, method in published().items()}
    found = study.part("methods", entrants, study.test, "mtr")
    parts: dict[str, Callable[[Row], str]] = {
        "Accuracy in percent, all at the default stages:": accuracy,
        "Points ahead of MTR on the same images, with 95 % intervals:": ahead,
        "Mean divergence from the dense model's class probabilities, in nats:": divergence,
    }
    if any(row.timing for row in found.rows):
        parts["Time saved, against the dense model in the same run:"] = speed
    pictures = []
    for model in found.models:
        picture = f"study-{plain_word(model)}.png"
        pictures.append(f"![accuracy against FLOPs and time]({picture})\n\n{verdict(found, model)}")
        found.frontier(model).save(study.out / picture)
    return "\n\n".join([tables(found, "test images", parts), *pictures])


def best_part(study: Study) -> str:
    chosen = replace(study, run=False).part("stages", staged(), study.held(), "mtr @ default")
    texts = []
    for model in study.models:
        best = best_stages(chosen, model)
        if "mtr" not in best:
            continue
        entrants: dict[str, Method | Entry | nn.Module] = {
            name: Entry(method, STAGES[best[name]]) for name, method in published().items() if name in best
        }
        one = replace(study, models={model: study.models[model]})
        found = one.part(f"best-{plain_word(model)}", entrants, study.test, "mtr")
        if found.rows:
            parts = {"Accuracy in percent, each method at its own stages:": accuracy, "Points ahead of MTR:": ahead}
            listed = ", ".join(f"{name}: {at}" for name, at in best.items())
            texts.append(f"{tables(found, 'test images', parts)}\n\n{verdict(found, model)}\n\nStages: {listed}.")
    return "\n\n".join(texts)


def released_part(study: Study) -> str:
    rows: list[Row] = []
    for name, variant in RELEASED.items():
        found = study.part("released", {each: methods.get(each) for each in (name, variant)}, study.test, name)
        rows += [row for row in found.rows if row.name == variant]
    if not rows:
        return ""
    body = Comparison(tuple(rows), None, True)
    text = "test images: accuracy of what was released minus that of the correct method, in points"
    return "\n\n".join(f"**{model}**, {text}.\n\n{pivot(body, model, ahead)}" for model in body.models)


PARTS: dict[str, Callable[[Study], str]] = {
    "methods": methods_part,
    "released": released_part,
    "choices": mtr_part,
    "stages": stages_part,
    "best": best_part,
}
TITLES = {
    "methods": """## All methods, at the same stages

Every method with its default options, on the test images; patches go after blocks 5, 10 and 15 of 24, scaled by depth,
the same share at each, and the method's own cost counts.""",
    "released": """## What the released code costs

What was published as code, bugs included (`*_released`), beside the method as its paper describes it, at the same
stages and savings.""",
    "choices": """## MTR's open choices

On the held-out images, never on the test file. One choice is changed at a time; the first row is the default.""",
    "stages": """## Stages of every method

On the held-out images. *default*: three, after blocks 5, 10 and 15 of 24, scaled by depth; *early*: three in the first
third; *first half*: four, after blocks 1, 5, 9 and 13 of 24; *every second block*. "-": no token counts land within
half a point of the saving.""",
    "best": """## All methods, each at its own best stages

Each method at the stages that lost least for it at -40 % on the held-out images, on the test images.""",
}


def _limits(study: Study) -> str:
    """How to ask for the same images and savings again."""
    images = f"--images {len(study.test)} " if isinstance(study.test, Part) else ""
    return f"`{images}--target {' '.join(f'{target:g}' for target in study.targets)}`"


def main() -> None:
    parser = arguments("the study of docs/study.md", PARTS, TARGETS, "runs/study")
    parser.add_argument("--quick", action="store_true", help="500 images and the saving of 40 % only")
    options = parser.parse_args()
    images = 500 if options.quick and options.images is None else options.images
    options.target = (CHOSEN_AT,) if options.quick else options.target
    study = set_up(options, images, images)  # of either split
    for name in options.part:
        found = PARTS[name](study)
        text = f"{_unwrapped(TITLES[name])}\n\n{found}\n\nOn {describe_machine()}; {_limits(study)}." if found else ""
        print(f"\n{text or f'{name}: nothing was run yet'}\n", flush=True)
        if options.page:
            write_page(options.page, name, text)
            copy_pictures(options.out, options.page, "study-*.png")


if __name__ == "__main__":
    main()
