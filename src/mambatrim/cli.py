"""The command `mambatrim`: parse, call the library, print. Its words are those of the API."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from PIL import Image
from torch import Tensor, nn

from . import __version__
from .apply import reduce
from .data import preprocess, read_image
from .demo import MODEL, demo
from .evaluate import spec_of
from .flops import Trunk, count_flops
from .kernels import cpu
from .models import BUNDLED, MODELS, Model, create_model
from .models.grid import GridModel
from .names import lookup
from .report import describe_machine, giga, percent, report, result, table, to_json

# images that are classified at a time
BATCH = 50
CONVENTIONS = {
    "both": "both scan directions, which is what runs",
    "paper": "one direction, as R-MeeTo and DyVM count",
    "projections": "without the scan, as tracers count",
}

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

    classify = _command(commands, "classify", _classify, "say what is in images")
    classify.add_argument("images", nargs="+", metavar="IMAGE")
    classify.add_argument("--model", default=MODEL, metavar="NAME", help="as in mambatrim info (%(default)s)")
    classify.add_argument(
        "--weights", metavar="FILE", help="a checkpoint file or Hub id (those in the package, if any)"
    )
    _add_reduction(classify)
    classify.add_argument("--method", default="mtr", help="what chooses the tokens (%(default)s)")
    classify.add_argument("--top", type=_at_least_one, default=5, metavar="N", help="classes to print (%(default)s)")
    _add_json(classify)

    info = _command(commands, "info", _info, "list the models, or tell all about one", computes=False)
    info.add_argument("name", nargs="?", metavar="NAME")
    _add_reduction(info)
    info.add_argument("--image-size", type=_at_least_one, metavar="N", help="side of the input (the model's own)")
    _add_json(info)
    return parser


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
    print(f"{dense['model']} with {fewest['method']}, on {figures['images']:,} CIFAR-10 test images")
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
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder that one may write to")


# ------------------------------------------------------------------------------------------------------------ classify


def _classify(options: argparse.Namespace) -> int:
    model = create_model(options.model, weights=options.weights or _own_weights(options.model))
    model = reduce(model, flops_reduction=options.flops_reduction, method=options.method)
    spec = spec_of(model)
    inputs: dict[int, Tensor] = {}
    failed = []
    for index, path in enumerate(options.images):
        try:
            inputs[index] = preprocess(read_image(path), spec.preprocess)
        except ValueError as error:
            _complain(error)
            failed.append({"path": path, "reason": str(error)})
    if not inputs:
        return BAD_INPUT
    answers = []
    for part in torch.stack(list(inputs.values())).split(BATCH):  # (B, 3, H, W)
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
    """For each of (B, 3, H, W) the first classes with their probabilities."""
    shares, indices = model(images).softmax(1).sort(dim=1, descending=True, stable=True)  # (B, classes)
    names = spec_of(model).classes
    return [
        [(names[index] if names else f"class {index}", share) for share, index in zip(*row, strict=True)][:top]
        for row in zip(shares.tolist(), indices.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------- info


def _info(options: argparse.Namespace) -> int:
    if options.name is None:
        return _list_models(options)
    lookup("model", options.name, MODELS)
    model = _blueprint(options.name)
    spec, size = spec_of(model), options.image_size
    fast = reduce(model, flops_reduction=options.flops_reduction, image_size=size) if options.flops_reduction else model
    if options.json:
        figures = _published(options.name, model)
        names = ["dense", "reduced"] if options.flops_reduction else ["dense"]
        entries = [result(name, each, figures, size) for name, each in zip(names, (model, fast), strict=False)]
        print(to_json(report("info", entries)))
        return OK
    how = spec.preprocess
    *frames, height, width = model.sides(size)
    crop = f"{height} x {width} pixels, short side resized to {min(how.resize)} ({how.interpolation}), centre crop"
    published = spec.checkpoint
    top1 = f"{published.top1} % on {published.dataset}, as published" if published else "not published"
    facts = [
        ("parameters", f"{_parameters(model):,}"),
        ("input", f"{frames[0]} frames of {crop}" if frames else crop),
        *_sequence(model, size),
        ("top-1", top1),
        ("weights", _weights_source(options.name)),
        ("licence", spec.licence),
        ("source", spec.source),
    ]
    print(spec.name)
    for name, value in facts:
        print(f"  {name:<12}{value}")
    print(f"\n{_flops_table(model, fast, size, bool(options.flops_reduction))}")
    if options.flops_reduction:
        reducer = cast(Trunk, fast).reducer
        removed = list(reducer.schedule.removed)
        print(f"\nschedule for {percent(options.flops_reduction)} fewer FLOPs with mtr: {reducer.extra_repr()}")
        print(f"patches removed after each block, counted from 0: {removed}")
    return OK


def _sequence(model: Model, size: int | None) -> list[tuple[str, str]]:
    """Tokens and blocks of a model that has a sequence of them; why tokens stay in one that has a grid."""
    if isinstance(model, GridModel):
        return [("tokens", f"all stay: {model.why_dense}")]
    patches, special = model.num_patches(size), len(model.special_tokens(size))
    return [
        ("tokens", f"{patches + special}: {patches} patches, {special} special"),
        ("blocks", f"{model.depth}, d_model {model.d_model}, d_inner {model.d_inner}"),
    ]


def _flops_table(model: Model, fast: Model, size: int | None, reduced: bool) -> str:
    rows = []
    for convention, text in CONVENTIONS.items():
        counted = count_flops(fast, size, convention)
        row = [f"{convention} ({text})", giga(counted.dense_total)]
        rows.append([*row, giga(counted.total), percent(1 - counted.ratio)] if reduced else row)
    return table(["FLOPs (multiply-adds)", "dense", "reduced", "saved"][: len(rows[0])], rows)


def _list_models(options: argparse.Namespace) -> int:
    if options.flops_reduction or options.image_size:
        raise ValueError(f"name a model, for example: mambatrim info {MODEL} --flops-reduction 0.4")
    models = {name: _blueprint(name) for name in MODELS}
    if options.json:
        entries = [result(name, model, _published(name, model)) for name, model in models.items()]
        print(to_json(report("info", entries)))
        return OK
    header = ("model", "parameters", "input", "tokens", "FLOPs", "published top-1", "on", "licence", "weights")
    print(table(header, [_model_row(name, model) for name, model in models.items()]))
    return OK


def _model_row(name: str, model: Model) -> tuple[str, ...]:
    spec, counted = spec_of(model), count_flops(model)
    published = spec.checkpoint
    return (
        name,
        f"{_parameters(model) / 1e6:.1f} M",
        "x".join(map(str, model.sides())),
        str(counted.lengths[0]) if counted.lengths else "-",
        giga(counted.total),
        f"{published.top1} %" if published and published.top1 else "-",
        published.dataset if published else "-",
        spec.licence,
        _weights_source(name),
    )


def _published(name: str, model: Model) -> dict[str, Any]:
    """What is known about a model's weights, for a report."""
    spec = spec_of(model)
    return {
        "parameters": _parameters(model),
        "licence": spec.licence,
        "source": spec.source,
        "published_top1": spec.checkpoint.top1 if spec.checkpoint else None,
        "dataset": spec.checkpoint.dataset if spec.checkpoint else None,
        "weights": _weights_source(name),
    }


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _blueprint(name: str) -> Model:
    """A model without values, which takes no time and no memory."""
    with torch.device("meta"):
        return create_model(name)


def _weights_source(name: str) -> str:
    checkpoint = MODELS[name].checkpoint
    if name in BUNDLED:
        return "in the package"
    if checkpoint is None:
        return f"a file from {MODELS[name].source}"
    file = checkpoint.file or "a file"
    return f"{file} of {checkpoint.repo} on the Hub" if checkpoint.repo else f"{file} from {MODELS[name].source}"


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
