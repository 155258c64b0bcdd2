"""The words of the command `mambatrim`: what may be given, and what it means if it is not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, benchmark, methods
from .calibrate import TRIES
from .demo import MODEL

BAD_INPUT = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's words; `command` is its name, and `computes` whether it runs a model.

    Raises:
        SystemExit: --help or --version, or a wrong word, which has been reported.
    """
    return _parser().parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, where argparse would print its whole usage before it."""
        self.exit(BAD_INPUT, f"mambatrim: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mambatrim",
        description="Vision Mamba models that run faster without retraining, by merging tokens that matter little.",
        epilog="mambatrim COMMAND --help says more. Exit codes: 0 done, 1 some images failed, 2 bad usage or input.",
    )
    parser.add_argument("--version", action="version", version=f"mambatrim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "bundled model and images: accuracy and time, with all tokens and fewer")
    demo.add_argument(
        "--out", type=Path, default="mambatrim_demo.png", metavar="FILE", help="the picture (%(default)s)"
    )
    demo.add_argument("--limit", type=_at_least_one, metavar="N", help="use only N of the images")
    _add_json(demo)

    classify = _command(commands, "classify", "say what is in images, or in videos")
    classify.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a file; for a video model a folder of frames or an animated GIF"
    )
    classify.add_argument(
        "--model",
        default=MODEL,
        metavar="NAME",
        help="as in mambatrim info, or the folder of a saved model (%(default)s)",
    )
    classify.add_argument(
        "--weights", metavar="FILE", help="a checkpoint file or Hub id (those in the package, if any)"
    )
    _add_reduction(classify)
    classify.add_argument("--method", help="what chooses the tokens (vsm, or mtr where the model has no place for it)")
    classify.add_argument("--schedule", type=Path, metavar="FILE", help="a schedule that mambatrim calibrate wrote")
    classify.add_argument("--top", type=_at_least_one, default=5, metavar="N", help="classes to print (%(default)s)")
    _add_json(classify)

    info = _command(commands, "info", "list the models, or tell all about one", computes=False)
    info.add_argument("name", nargs="?", metavar="NAME")
    _add_reduction(info)
    info.add_argument("--image-size", type=_at_least_one, metavar="N", help="side of the input (the model's own)")
    _add_json(info)
    _add_benchmark(commands)
    _add_compare(commands)
    _add_calibrate(commands)
    return parser


def _add_benchmark(commands: Any) -> None:
    bench = _command(commands, "benchmark", "time models with all tokens, with fewer, and what others would use")
    bench.add_argument("models", nargs="*", default=["vim_small"], metavar="MODEL", help="of the zoo (vim_small)")
    many: Any = {"nargs": "+", "metavar": "N", "type": _at_least_one}
    bench.add_argument("--batch", **many, default=[8], help="images at a time (8)")
    dtypes = list(benchmark.DTYPES)
    bench.add_argument("--dtype", nargs="+", default=["fp32"], choices=dtypes, help="of the matrix products (fp32)")
    bench.add_argument("--image-size", type=_at_least_one, metavar="N", help="side of the input (the model's own)")
    bench.add_argument(
        "--flops-reduction",
        nargs="*",
        type=_share,
        default=[0.2, 0.3, 0.4],
        metavar="SHARE",
        help="shares of the FLOPs to save (0.2 0.3 0.4)",
    )
    bench.add_argument("--method", nargs="+", default=["mtr"], help="what chooses the tokens (mtr)")
    bench.add_argument("--alone", action="store_true", help="without transformers and other scans to compare with")
    bench.add_argument("--packed", action="store_true", help="pack the models for inference on this processor first")
    bench.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    bench.add_argument("--threads", type=_at_least_one, metavar="N", help="threads of PyTorch (one per core)")
    bench.add_argument("--repeats", type=_at_least_one, default=11, metavar="N", help="rounds, at most (%(default)s)")
    bench.add_argument(
        "--seconds", type=float, default=30, metavar="S", help="time for the rounds of one table, about (%(default)s)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write a report in JSON to this file")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="write a picture to this file")


def _add_compare(commands: Any) -> None:
    compare = _command(commands, "compare", "accuracy, FLOPs and time of models, methods and savings")
    compare.add_argument("data", metavar="DATA", help="a parquet or zip file, or a folder; with or without classes")
    compare.add_argument(
        "--model",
        nargs="+",
        default=[MODEL],
        metavar="MODEL",
        help="name with weights in the package, NAME=FILE with a checkpoint, or folder of a saved model (%(default)s)",
    )
    compare.add_argument(
        "--method", nargs="+", default=list(methods.METHODS), metavar="NAME", help="what to compare (all)"
    )
    compare.add_argument(
        "--flops-reduction",
        nargs="+",
        type=_share,
        default=[0.2, 0.3, 0.4, 0.5],
        metavar="SHARE",
        help="shares of the FLOPs to save (0.2 0.3 0.4 0.5)",
    )
    compare.add_argument(
        "--stages",
        nargs="+",
        type=int,
        metavar="BLOCK",
        help="patches go after these blocks, from 0; -1: before block 0 (three blocks)",
    )
    compare.add_argument("--reference", default="mtr", metavar="NAME", help="what others are compared with (mtr)")
    compare.add_argument(
        "--also-dense", nargs="+", default=[], metavar="MODEL", help="smaller models to stand beside, as --model"
    )
    compare.add_argument("--no-labels", action="store_true", help="agreement with the dense model, not accuracy")
    compare.add_argument("--no-timing", action="store_true", help="measure no times")
    compare.add_argument("--no-run", action="store_true", help="tables of the cells that are there; run nothing")
    compare.add_argument("--limit", type=_at_least_one, metavar="N", help="use only N of the images, evenly spread")
    compare.add_argument(
        "--out", type=Path, default=Path("comparison"), metavar="FOLDER", help="cells and tables (%(default)s)"
    )


def _add_calibrate(commands: Any) -> None:
    calibrate = _command(commands, "calibrate", "choose where tokens go by a few hundred unlabelled images")
    calibrate.add_argument(
        "model",
        metavar="MODEL",
        help="name with weights in the package, NAME=FILE with a checkpoint, or folder of a saved model",
    )
    calibrate.add_argument(
        "--images", required=True, metavar="DATA", help="a parquet or zip file, or a folder of images or videos"
    )
    calibrate.add_argument(
        "--flops-reduction", type=_share, default=0.4, metavar="SHARE", help="share of the FLOPs to save (%(default)s)"
    )
    calibrate.add_argument("--method", default="vsm", help="what chooses the tokens (%(default)s)")
    calibrate.add_argument(
        "--limit", type=_at_least_one, default=256, metavar="N", help="use N of the images, evenly spread (%(default)s)"
    )
    calibrate.add_argument(
        "--tries", type=_at_least_one, default=TRIES, metavar="N", help="schedules to measure at most (%(default)s)"
    )
    calibrate.add_argument(
        "--out", type=Path, metavar="FILE", help="the schedule; beside it a .jsonl to continue from (named by the rest)"
    )
    calibrate.add_argument("--save", type=Path, metavar="FOLDER", help="save the model too, with this schedule")


def _command(commands: Any, name: str, text: str, computes: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=name, computes=computes)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a report in JSON")


def _add_reduction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flops-reduction",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of the FLOPs to save, such as 0.4 (0)",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 0.9:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up to below 0.9, not {text}")
    return value


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not {text}")
    return int(text)
