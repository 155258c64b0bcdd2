"""The command `mambatrim`: parse, call the library, print. Its words are those of the API."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from . import benchmark, info, methods
from .apply import reduce
from .arguments import BAD_INPUT, parse
from .calibrate import calibrate, read_schedule
from .clips import frames_of
from .compare import Entrant, Entry, compare, in_stages
from .data import load_input
from .demo import MODEL, demo
from .evaluate import spec_of, spread
from .hub import from_pretrained, save_pretrained
from .models import Model, create_model
from .opening import model_label, open_model, own_weights
from .prepared import Unlabelled, open_data, read_inputs
from .report import describe_machine, machine_and_kernels, percent, report, result, to_json

# images that are classified at a time
BATCH = 50

OK, SOME_FAILED, INTERRUPTED = 0, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 (some images could not be read), 2 (bad usage or input), 130.

    Args:
        argv: the words after `mambatrim`; None takes those of the process, which is then taken to be the command's own.
    """
    try:
        options = parse(argv)
        if argv is None:
            _settle(restart=options.computes)
        code = COMMANDS[options.command](options)
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


# ---------------------------------------------------------------------------------------------------------------- demo


def _demo(options: argparse.Namespace) -> int:
    _check_output(options.out)
    with _counter() as say:

        def progress(done: int, total: int) -> None:
            say(f"classified {done:,} of {total:,} images ..." if done < total else "measuring times ...")

        found = demo(options.limit, progress)
    found.picture.save(options.out)
    print(to_json(found.report) if options.json else f"{found.to_text()}\n\npicture of the tokens: {options.out}")
    return OK


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
        model = create_model(options.model, weights=options.weights or own_weights(options.model))
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
    kinds = (options.models, options.batch, options.dtype, options.image_size, options.device, options.packed)
    todo = benchmark.settings(*kinds)
    print(machine_and_kernels())
    done = []
    for setting in todo:
        measured = benchmark.measure(
            setting, reductions, options.method, not options.alone, options.repeats, options.seconds
        )
        print(f"\n{benchmark.to_text(measured)}", flush=True)
        done.append(measured)
    print(f"\n{benchmark.LEGEND}")
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
    frames = frames_of(spec_of(next(iter(models.values()))))
    data = spread(open_data(options.data, frames), options.limit)
    with _counter() as say:

        def progress(done: int, total: int, now: str) -> None:
            say(f"{done} of {total}: {now}")

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
    images = read_inputs(options.images, spec_of(model), options.limit)
    with _counter() as say:

        def progress(done: int, most: int, least: float) -> None:
            say(f"{done} of {most}: divergence {least:.4f}")

        found = calibrate(model, images, share, method, out.with_suffix(".jsonl"), options.tries, progress)
    out.write_text(found.to_json() + "\n", encoding="utf-8")
    print(f"{found.to_text(model)}\nschedule: {out}")
    if options.save is not None:
        save_pretrained(reduce(model, schedule=found.schedule, method=method), options.save)
        print(f"model with it: {options.save}")
    return OK


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "classify": _classify,
    "info": _info,
    "benchmark": _benchmark,
    "compare": _compare,
    "calibrate": _calibrate,
}


# ------------------------------------------------------------------------------------------------------------ terminal


def _complain(error: Exception) -> None:
    print(f"mambatrim: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)


@contextlib.contextmanager
def _counter() -> Iterator[Callable[[str], None]]:
    """A line that is written over and over, on a terminal only; it is gone at the end."""
    shown = sys.stderr.isatty()

    def say(text: str) -> None:
        if shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# how threads wait: for microseconds in a loop and then asleep, which only libgomp has
WAITING = {"GOMP_SPINCOUNT": "1000"} if sys.platform == "linux" else {"OMP_WAIT_POLICY": "passive"}


def _settle(restart: bool) -> None:
    """Make the process a good citizen of its machine and its terminal."""
    for stream in (sys.stdout, sys.stderr):
        # file names and arrows that the terminal has no letters for are no reason to fail
        getattr(stream, "reconfigure", lambda errors: None)(errors="backslashreplace")
    # Threads of libgomp spin while they wait for each other, for milliseconds. Beside another busy process that makes a
    # forward several times slower, up to a hundred times (measured), and this command may run anywhere. Threads that do
    # not spin at all lose half as much again at one image of a narrow model, which has more than a hundred short waits.
    # The variable is read when torch is loaded, which the package has done by now: the process starts itself once more.
    mine = Path(sys.argv[0]).name in ("mambatrim", "__main__.py")
    unset = {"OMP_WAIT_POLICY", *WAITING}.isdisjoint(os.environ)
    if restart and mine and unset and os.name == "posix" and sys.executable:
        os.environ.update(WAITING)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
