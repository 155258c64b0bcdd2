"""The command `mambatrim`: parse, call the library, print. Its words are those of the API."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor, nn

from . import __version__, benchmark, info, methods
from .apply import reduce
from .calibrate import TRIES, Calibration, calibrate, read_schedule
from .compare import Entrant, Entry, compare, in_stages
from .data import load_images, load_input
from .demo import MODEL, demo
from .evaluate import spec_of, spread
from .flops import count_flops
from .hub import from_pretrained, save_pretrained
from .kernels import cpu
from .models import BUNDLED, MODELS, Model, create_model
from .names import lookup
from .opening import model_label, open_model
from .prepared import Unlabelled, open_data, prepare
from .reduction import Schedule
from .report import describe_machine, giga, percent, report, result, table, to_json

# images that are classified at a time
BATCH = 50

OK, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (some images could not be read), 2 (bad usage or input), 130.

    Args:
        argv: the words after `mambatrim`; None takes those of the process, which is then taken to be the command's own.
    """
    try:
        options = _parser().parse_args(argv)
        if argv is None:
            _settle(restart=options.computes)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except SystemExit as leaving:  # argparse: --help, or a wrong word, which it has reported
        return int(leaving.code or 0)
    except BrokenPipeError:
        # who reads has enough; what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError) as error:
        _complain(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


# --------------------------------------------------------------------------------------------------------------- words


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

    demo = _command(commands, "demo", _demo, "bundled model and images: accuracy and time, with all tokens and fewer")
    demo.add_argument(
        "--out", type=Path, default="mambatrim_demo.png", metavar="FILE", help="the picture (%(default)s)"
    )
    demo.add_argument("--limit", type=_at_least_one, metavar="N", help="use only N of the images")
    _add_json(demo)

    classify = _command(commands, "classify", _classify, "say what is in images, or in videos")
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

    info = _command(commands, "info", _info, "list the models, or tell all about one", computes=False)
    info.add_argument("name", nargs="?", metavar="NAME")
    _add_reduction(info)
    info.add_argument("--image-size", type=_at_least_one, metavar="N", help="side of the input (the model's own)")
    _add_json(info)
    _add_benchmark(commands)
    _add_compare(commands)
    _add_calibrate(commands)
    return parser


def _add_benchmark(commands: Any) -> None:
    bench = _command(
        commands, "benchmark", _benchmark, "time models with all tokens, with fewer, and what others would use"
    )
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
    bench.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    bench.add_argument("--threads", type=_at_least_one, metavar="N", help="threads of PyTorch (one per core)")
    bench.add_argument("--repeats", type=_at_least_one, default=11, metavar="N", help="rounds, at most (%(default)s)")
    bench.add_argument(
        "--seconds", type=float, default=30, metavar="S", help="time for the rounds of one table, about (%(default)s)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write a report in JSON to this file")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="write a picture to this file")


def _add_compare(commands: Any) -> None:
    compare = _command(commands, "compare", _compare, "accuracy, FLOPs and time of models, methods and savings")
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
    calibrate = _command(commands, "calibrate", _calibrate, "choose where tokens go by a few hundred unlabelled images")
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


def _command(commands: Any, name: str, run: Any, text: str, computes: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(run=run, computes=computes)
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


# ---------------------------------------------------------------------------------------------------------------- demo


def _demo(options: argparse.Namespace) -> int:
    _check_output(options.out)
    with _progress() as progress:
        found = demo(options.limit, progress)
    found.picture.save(options.out)
    if options.json:
        print(to_json(found.report))
        return OK
    dense, *_, fewest = found.report["results"]
    figures = dense["figures"]
    error = 100 * math.sqrt(figures["top1"] * (1 - figures["top1"]) / figures["images"])
    print(f"{dense['model']} on {figures['images']:,} CIFAR-10 test images")
    print(describe_machine())
    if cpu.missing():
        print(cpu.missing())
    print(f"\n{table(DEMO_HEADER, [_demo_row(entry, dense) for entry in found.report['results']])}\n")
    print(f"top-1: standard error {error:.1f} points. as dense: same first class as with all tokens.")
    print("FLOPs: multiply-adds, both scan directions. ms/image: median of interleaved runs,", end=" ")
    print(f"{figures['batch']} images at a time.")
    if figures["disturbance"]:
        print(f"note: {figures['disturbance']}.")
    rows = [(name, full, less + ("" if less == full else " *")) for name, full, less in found.examples]
    print(f"\n{table(('image (class/row)', 'dense', fewest['name']), rows, words=True)}")
    if any(full != less for _, full, less in found.examples):
        print("* another class than with all tokens")
    print(f"\npicture of the tokens: {options.out}")
    return OK


DEMO_HEADER = ("", "tokens", "FLOPs", "saved", "top-1", "as dense", "ms/image", "saved")


def _demo_row(entry: dict[str, Any], dense: dict[str, Any]) -> tuple[str, ...]:
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


def _check_output(path: Path) -> None:
    """Say before the work, and not after it, that the picture cannot be written."""
    Image.init()
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path} must end as a picture does, for example in .png")
    _check_folder(path)


def _check_folder(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder that one may write to")


# ------------------------------------------------------------------------------------------------------------ classify


def _classify(options: argparse.Namespace) -> int:
    model = _chosen_model(options)
    spec = spec_of(model)
    inputs: dict[int, Tensor] = {}
    failed = []
    for index, path in enumerate(options.images):
        try:
            inputs[index] = load_input(path, spec)
        except ValueError as error:
            _complain(error)
            failed.append({"path": path, "reason": str(error)})
    if not inputs:
        return BAD_INPUT
    answers = []
    frames = math.prod(model.sides()[:-2])
    for part in torch.stack(list(inputs.values())).split(max(1, BATCH // frames)):  # (B, 3, H, W) or (B, 3, T, H, W)
        answers += _ranked(model, part, options.top)
    paths = [options.images[index] for index in inputs]
    if options.json:
        listed = [
            {"path": path, "classes": [{"class": name, "probability": share} for name, share in answer]}
            for path, answer in zip(paths, answers, strict=True)
        ]
        figures = {"images": listed, "failed": failed}
        print(to_json(report("classify", [result(options.model, model, figures)])))
    else:
        for path, answer in zip(paths, answers, strict=True):
            print(path)
            for name, share in answer:
                print(f"  {percent(share):>7}  {name}")
    return SOME_FAILED if failed else OK


def _chosen_model(options: argparse.Namespace) -> Model:
    """The model by its name, or a saved one by its folder or Hub id, which brings its own reducer unless one is asked
    for."""
    saved = "/" in options.model or Path(options.model).is_dir()
    if saved and options.weights:
        raise ValueError(f"{options.model} brings its own weights: leave out --weights, or name a model of the zoo")
    if saved:
        model = from_pretrained(options.model)
    else:
        model = create_model(options.model, weights=options.weights or _own_weights(options.model))
    if options.schedule is not None:
        return _scheduled(model, options)
    if saved and not options.flops_reduction:
        return model
    return reduce(model, flops_reduction=options.flops_reduction, method=options.method)


def _scheduled(model: Model, options: argparse.Namespace) -> Model:
    """The model with the schedule of a file, and the method that the file names."""
    if options.flops_reduction:
        raise ValueError("give --schedule or --flops-reduction, not both")
    stored, own = read_schedule(options.schedule), spec_of(model).name
    for word, given, wanted in (("model", own, stored.model), ("method", options.method, stored.method)):
        if None not in (given, wanted) and given != wanted:
            raise ValueError(f"the schedule in {options.schedule} is for {word} {wanted}, not {given}")
    return reduce(model, schedule=stored.schedule, method=options.method or stored.method)


def _own_weights(name: str) -> str:
    """The weights that lie in the package, for a model that has some."""
    spec = lookup("model", name, MODELS)
    if name in BUNDLED:
        return "bundled"
    if spec.checkpoint is None:
        raise ValueError(f"{name} needs --weights FILE: a checkpoint from {spec.source}")
    if not spec.checkpoint.repo:
        raise ValueError(f"{name} needs --weights FILE: {spec.checkpoint.file or 'a checkpoint'} from {spec.source}")
    raise ValueError(
        f"{name} needs --weights: a checkpoint file, or {spec.checkpoint.repo} to download one from the Hub"
    )


@torch.no_grad()
def _ranked(model: nn.Module, images: Tensor, top: int) -> list[list[tuple[str, float]]]:
    """For each image or video the first classes with their probabilities."""
    shares, indices = model(images).softmax(1).sort(dim=1, descending=True, stable=True)  # (B, classes)
    names = spec_of(model).classes
    return [
        [(names[index] if names else f"class {index}", share) for share, index in zip(*row, strict=True)][:top]
        for row in zip(shares.tolist(), indices.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------- info


def _info(options: argparse.Namespace) -> int:
    if options.name is None:
        if options.flops_reduction or options.image_size:
            raise ValueError(f"name a model, for example: mambatrim info {MODEL} --flops-reduction 0.4")
        print(info.report_of_all() if options.json else info.text_of_all())
        return OK
    tell = info.report_of if options.json else info.text_of
    print(tell(options.name, options.flops_reduction, options.image_size))
    return OK


# ----------------------------------------------------------------------------------------------------------- benchmark


def _benchmark(options: argparse.Namespace) -> int:
    if options.plot is not None:
        _check_output(options.plot)
    if options.json is not None:
        _check_folder(options.json)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    reductions = [share for share in options.flops_reduction if share > 0]
    todo = benchmark.settings(options.models, options.batch, options.dtype, options.image_size, options.device)
    print(describe_machine())
    if cpu.missing():
        print(cpu.missing())
    done = []
    for setting in todo:
        measured = benchmark.measure(
            setting, reductions, options.method, not options.alone, options.repeats, options.seconds
        )
        print(f"\n{setting.model}, batch {setting.batch}, {setting.dtype}")
        print(benchmark.models_table(measured.found))
        if scans := benchmark.scans_table(measured.found):
            print(f"\n{scans}")
        if measured.disturbance:
            print(f"note: {measured.disturbance}.")
        sys.stdout.flush()
        done.append(measured)
    print("\nms/image: median of interleaved runs; spread: quartiles over the median. ideal: by the FLOPs.")
    print("memory: that a forward adds at its peak, weights and images not counted.")
    if options.json is not None:
        options.json.write_text(to_json(benchmark.to_report(done)) + "\n")
    if options.plot is not None:
        benchmark.draw(done, describe_machine()).save(options.plot)
    return OK


# ------------------------------------------------------------------------------------------------------------- compare


def _compare(options: argparse.Namespace) -> int:
    names = list(dict.fromkeys([options.reference, *options.method]))
    schedule = in_stages(options.stages)
    entrants: dict[str, Entrant] = {name: Entry(methods.get(name), schedule) for name in names}
    models = {model_label(text): open_model(text) for text in options.model}
    entrants |= {f"{model_label(text)}, all tokens": open_model(text) for text in options.also_dense}
    data = spread(open_data(options.data), options.limit)
    with _counter() as progress:
        found = compare(
            models,
            entrants,
            [share for share in options.flops_reduction if share],
            Unlabelled(data) if options.no_labels else data,
            options.out / "cells",
            options.reference,
            timing=not options.no_timing,
            run=not options.no_run,
            progress=progress,
        )
    print(describe_machine())
    print(f"\n{found.to_markdown()}\n")
    print(", ".join(str(path) for path in found.save(options.out)))
    return OK


# ----------------------------------------------------------------------------------------------------------- calibrate


def _calibrate(options: argparse.Namespace) -> int:
    method = methods.get(options.method)
    model, share = open_model(options.model), options.flops_reduction
    out = options.out or Path(f"{model_label(options.model)}-{method.name}-{100 * share:g}.json")
    if out.suffix == ".jsonl":
        raise ValueError(f"{out} is the name of the file to continue from: let --out end in .json")
    _check_folder(out)
    images = _calibration_images(options.images, model, options.limit)
    with _counter() as progress:

        def say(done: int, most: int, least: float) -> None:
            progress(done, most, f"divergence {least:.4f}")

        found = calibrate(model, images, share, method, out.with_suffix(".jsonl"), options.tries, say)
    out.write_text(found.to_json() + "\n", encoding="utf-8")
    rows = [_calibration_row("calibrated", model, found, found.removed, found.kl)]
    if found.default is not None and found.kl_default is not None:
        rows.insert(0, _calibration_row("default stages", model, found, found.default, found.kl_default))
    print(f"{found.model} with {found.method}, {found.images:,} images, {found.tried} schedules measured\n")
    print(table(("schedule", "tokens", "FLOPs saved", "divergence"), rows))
    print(f"\ndivergence: mean KL from the model with all tokens, in nats, on these images.\nschedule: {out}")
    if options.save is not None:
        save_pretrained(reduce(model, schedule=found.schedule, method=method), options.save)
        print(f"model with it: {options.save}")
    return OK


def _calibration_row(name: str, model: Model, found: Calibration, removed: tuple[int, ...], kl: float) -> list[str]:
    counted = count_flops(reduce(model, schedule=Schedule(removed), method=found.method))
    tokens = " > ".join(map(str, dict.fromkeys(counted.lengths)))
    return [name, tokens, percent(1 - counted.ratio, 2), f"{kl:.4f}"]


def _calibration_images(path: str, model: Model, limit: int) -> Tensor:
    """Inputs (n, 3, H, W), or (n, 3, T, H, W) of a video model, from a folder with a folder or file for each video."""
    spec = spec_of(model)
    if len(model.sides()) == 2:
        prepared = prepare(Unlabelled(spread(open_data(path), limit)), spec.preprocess)
        return prepared.inputs(spec.preprocess, 0, len(prepared))
    if not Path(path).is_dir():
        raise ValueError(f"{path} is no folder of videos, each a folder of frames or a file")
    videos = sorted(Path(path).iterdir())
    count = min(limit, len(videos))
    return load_images([videos[index * len(videos) // count] for index in range(count)], spec)


@contextlib.contextmanager
def _counter() -> Iterator[Any]:
    """A line that counts cells, on a terminal only; it is gone at the end."""
    shown = sys.stderr.isatty()

    def progress(done: int, total: int, now: str) -> None:
        if shown:
            print(f"\r\033[K{done} of {total}: {now}", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ terminal


def _complain(error: Exception) -> None:
    print(f"mambatrim: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A line that counts images, on a terminal only; it is gone at the end."""
    shown = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if shown:
            text = f"classified {done:,} of {total:,} images" if done < total else "measuring times"
            print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _settle(restart: bool) -> None:
    """Make the process a good citizen of its machine and its terminal."""
    for stream in (sys.stdout, sys.stderr):
        # file names and arrows that the terminal has no letters for are no reason to fail
        getattr(stream, "reconfigure", lambda errors: None)(errors="backslashreplace")
    # Threads of libgomp spin while they wait for each other. Beside another busy process that makes a forward several
    # times slower, up to a hundred times (measured), and this command may run anywhere. The variable is read when torch
    # is loaded, which the package has done by now: so the process starts itself once more.
    mine = Path(sys.argv[0]).name in ("mambatrim", "__main__.py")
    if restart and mine and os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ and sys.executable:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
