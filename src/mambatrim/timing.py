"""Timing: functions, such as forward passes, measured against each other in one run, their calls interleaved."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

# what is worth a warning: processors taken by others, and the spread of the repeats (quartiles around the median)
BUSY_SHARE = 0.1
SPREAD = 0.15
# rounds that a limit of time does not take away: fewer have no median worth the name
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """What one function took: median and fastest in milliseconds, spread as the quartiles' distance over the median."""

    median: float
    fastest: float
    spread: float


@dataclass(frozen=True)
class Timings:
    """What a measurement found.

    times: each function's figures, by name.
    repeats: timed calls of each.
    threads: threads that PyTorch used on the CPU.
    disturbance: one sentence on what made the figures uncertain; empty where nothing was noticed.
    """

    times: dict[str, Timing]
    repeats: int
    threads: int
    disturbance: str


def time_functions(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 11,
    per: int = 1,
    keep_memory: bool = True,
    seconds: float | None = None,
) -> Timings:
    """Time functions against each other: one call of each to warm up, then all in turn, `repeats` times.

    The order is reversed from round to round, so that a machine that slows down favours nobody.

    Args:
        functions: by name; what runs on a GPU is waited for.
        repeats: rounds.
        per: units of work in a call, such as images; the times are for one of them.
        keep_memory: let the process keep the memory of large temporaries (from now on), for otherwise the larger of two
            models is charged for fetching it anew at each call.
        seconds: begin no further round after so much time; but there are at least MIN_ROUNDS, or `repeats` if fewer.
    """
    if not functions:
        raise ValueError("there must be at least one function to time")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be above 0, not {seconds}")
    if keep_memory:
        _keep_memory()
    for function in functions.values():
        _seconds(function)
    seconds_of: dict[str, list[float]] = {name: [] for name in functions}
    load, start = _Load(), time.perf_counter()
    for turn in range(repeats):
        if seconds is not None and turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            seconds_of[name].append(_seconds(functions[name]))
    others, cores = load.others()
    times = {name: _summary(values, per) for name, values in seconds_of.items()}
    spread = max(timing.spread for timing in times.values())
    rounds = len(next(iter(seconds_of.values())))
    return Timings(times, rounds, torch.get_num_threads(), describe_disturbance(others, cores, load.own, spread))


@torch.no_grad()
def time_models(models: Mapping[str, nn.Module], images: Tensor, repeats: int = 11) -> Timings:
    """Milliseconds per image of each model on the same batch (B, 3, H, W), as `time_functions` measures them."""
    if not models:
        raise ValueError("time_models needs at least one model")
    if not len(images):
        raise ValueError("time_models needs at least one image")
    return time_functions({name: partial(model, images) for name, model in models.items()}, repeats, len(images))


def run_time(model: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """The model's output and the seconds that it took, a GPU's work included."""
    outputs: list[Tensor] = []
    seconds = _seconds(lambda: outputs.append(model(images)))
    return outputs[0], seconds


def describe_disturbance(others: float, cores: int, own: float, spread: float) -> str:
    """What made a measurement uncertain, in one sentence, or nothing.

    Args:
        others: processors that other processes kept busy, on average.
        cores: processors that this process may use.
        own: processors that it kept busy itself.
        spread: largest spread of a model's repeats.
    """
    # load of others disturbs where no processor was left idle for it
    if others > BUSY_SHARE * cores and own + others > 0.85 * cores:
        return (
            f"other processes kept {others:.1f} of {cores} processors busy during the measurement, "
            "so trust the ratios more than the milliseconds"
        )
    if spread > SPREAD:
        return f"the repeats differ by {spread:.0%}, so the machine was not quiet; trust the ratios more than the times"
    return ""


def _seconds(function: Callable[[], object]) -> float:
    _finish()
    start = time.perf_counter()
    function()
    _finish()
    return time.perf_counter() - start


def _summary(seconds: list[float], per: int) -> Timing:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (median,) * 3
    return Timing(1000 * median / per, 1000 * min(seconds) / per, (high - low) / median if median else 0.0)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _keep_memory() -> None:
    """Ask glibc to keep freed memory for the next call; another C library is left as it is."""
    if os.name != "posix":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


class _Load:
    """Processors that this process and others keep busy from now on; without /proc/stat the others are not seen."""

    def __init__(self) -> None:
        self.own = 0.0
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._start = (time.perf_counter(), time.process_time(), self._busy())

    def others(self) -> tuple[float, int]:
        """Processors taken by others since the start, on average, of how many; `own` is then this process's part."""
        wall, used, busy = self._start
        wall = max(time.perf_counter() - wall, 1e-9)
        self.own = (time.process_time() - used) / wall
        return max(0.0, (self._busy() - busy) / wall - self.own), len(self._cores) or os.cpu_count() or 1

    def _busy(self) -> float:
        """Seconds that the processors in use have worked since the machine started."""
        try:
            with open("/proc/stat") as file:
                lines = [line.split() for line in file if line.startswith("cpu")]
            table = {fields[0]: [int(value) for value in fields[1:9]] for fields in lines}
            # user, nice, system, irq, softirq, steal: all but idle (3) and waiting for a disk (4)
            ticks = sum(sum(table[f"cpu{core}"]) - sum(table[f"cpu{core}"][3:5]) for core in self._cores)
            return ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, KeyError, AttributeError):
            return 0.0
