"""calibrate: where tokens go and how many, chosen on unlabelled images such that a model's answers change least.

No labels and no training: of many schedules that save enough FLOPs the one is taken whose logits diverge least from
those of the same model with all its tokens. First a set of stages is found, the same share of the patches going at
each; then patches are shifted between them. The search is deterministic, and each schedule is measured once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import __version__, methods
from .apply import reduce
from .cells import describe, key, weights_digest
from .evaluate import spec_of
from .flops import Trunk, count_flops, sections, solve
from .hub import is_usual
from .reduction import Method, Schedule, default_stages
from .report import percent, table

FORMAT = "mambatrim-schedule-1"
# schedules that are measured at most, blocks that may become stages, pixels that run at a time
TRIES, STAGES, PIXELS = 100, 12, 128 * 64 * 64
# patches leave within this share of the blocks: behind it few blocks are left to save anything in
EARLY = 0.75

Removed = tuple[int, ...]
# schedules measured, the most that will be, and the least divergence so far
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Calibration:
    """A schedule, and what it was chosen by.

    removed: patches that go after each block, as in `Schedule`.
    method, options: name of the method, and all of its options as plain data.
    usual: whether these are the options that the name alone stands for.
    model, weights: name of the model, and a digest of its weights.
    flops, dense_flops: multiply-adds of one image, reduced and with all tokens.
    kl: mean divergence KL(dense || reduced) of the class probabilities in nats, on the images that chose.
    default, kl_default: the schedule that `solve` gives, and its divergence; None where it has none.
    images: how many images chose.
    tried: how many schedules were measured.
    versions: of mambatrim, torch and Python.
    """

    removed: Removed
    method: str
    options: Any
    usual: bool
    model: str
    weights: str
    flops: int
    dense_flops: int
    kl: float
    default: Removed | None
    kl_default: float | None
    images: int
    tried: int
    versions: Mapping[str, str]

    @property
    def schedule(self) -> Schedule:
        """What `reduce` takes."""
        return Schedule(self.removed)

    def to_json(self) -> str:
        """All of it as JSON text, of which `Schedule.from_json` reads the schedule."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)

    def to_text(self, model: nn.Module) -> str:
        """The schedule beside the one that `solve` gives, for people; `model` is the one with all tokens."""
        found = [("calibrated", self.removed, self.kl)]
        if self.default is not None and self.kl_default is not None:
            found.insert(0, ("default stages", self.default, self.kl_default))
        rows = []
        for name, removed, kl in found:
            counted = count_flops(cast(Trunk, reduce(model, schedule=Schedule(removed), method=self.method)))
            tokens = " > ".join(map(str, dict.fromkeys(counted.lengths)))
            rows.append((name, tokens, percent(1 - counted.ratio, 2), f"{kl:.4f}"))
        return (
            f"{self.model} with {self.method}, {self.images:,} images, {self.tried} schedules measured\n\n"
            f"{table(('schedule', 'tokens', 'FLOPs saved', 'divergence'), rows)}\n\n"
            "divergence: mean KL from the model with all tokens, in nats, on these images."
        )


@dataclass(frozen=True)
class Stored:
    """What a schedule in a file is for; method and model are None where the file does not say."""

    schedule: Schedule
    method: str | None
    model: str | None


def read_schedule(path: str | os.PathLike[str]) -> Stored:
    """Read the file of `Calibration.to_json`, or of `Schedule.to_json`.

    Raises:
        ValueError: the file is missing or holds no schedule, or its method has options that a name does not say.
    """
    try:
        text = Path(path).read_text("utf-8")
        schedule, about = Schedule.from_json(text), json.loads(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        reason = str(error) if len(str(error)) < 200 else "it is no JSON with a list called removed"
        raise ValueError(f"{path} holds no schedule as mambatrim calibrate writes it: {reason}") from error
    if about.get("usual") is False:
        raise ValueError(
            f"the schedule in {path} is for method {about.get('method')!r} with options of its own: "
            "make the method in Python, and give both to mambatrim.reduce"
        )
    words = [about.get(name) for name in ("method", "model")]
    if any(not isinstance(word, str | None) for word in words):
        raise ValueError(f"method and model in {path} must be names, got {words[0]!r} and {words[1]!r}")
    return Stored(schedule, *words)


def calibrate(
    model: nn.Module,
    images: Tensor,
    flops_reduction: float,
    method: str | Method = "vsm",
    journal: str | os.PathLike[str] | None = None,
    tries: int = TRIES,
    progress: Progress | None = None,
) -> Calibration:
    """Choose the stages and the counts that change a model's answers least, at no more than a share of its FLOPs.

    Args:
        model: a model of the zoo in evaluation mode, on any device; its own reducer is not looked at.
        images: inputs (n, 3, H, W), or (n, 3, T, H, W) of a video model; a few hundred, without labels.
        flops_reduction: share of the FLOPs to save at least, the method's own cost included.
        method: a name of `methods.METHODS`, or a Method with options.
        journal: file to which every measured schedule is written at once, one JSON object a line. What it has of the
            same weights, method and images is not measured again, so that a stopped run continues.
        tries: schedules that are measured at most.
        progress: called after each schedule.

    Raises:
        ValueError: an argument out of range, a model or method that does not fit, no schedule that saves so much, or a
            damaged journal.
    """
    share = flops_reduction
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 0.9:
        raise ValueError(f"the share of FLOPs to save must be above 0 and below 0.9, got {share!r}")
    if not isinstance(images, Tensor) or images.dim() < 4 or not len(images):
        raise ValueError("calibrate takes images as the model does, (n, 3, H, W) with n at least 1")
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}")
    if model.training:
        raise ValueError("calibrate takes a model in evaluation mode: call model.eval() first")
    chosen = methods.get(method) if isinstance(method, str) else method
    dense = reduce(model, flops_reduction=0.0)
    reduce(model, schedule=Schedule.none(_depth(model)), method=chosen)  # says at once what does not fit
    bench = _Bench(dense, images, chosen, share, tries, journal, progress)
    default = bench.solved(None)
    best = _shifted(bench, _staged(bench))
    flops = count_flops(cast(Trunk, bench.reduced(best)))
    return Calibration(
        removed=best,
        method=chosen.name,
        options=describe(chosen),
        usual=is_usual(chosen),
        model=spec_of(model).name,
        weights=bench.about["weights"],
        flops=flops.total,
        dense_flops=flops.dense_total,
        kl=bench.measured[best],
        default=default,
        kl_default=None if default is None else bench.measured.get(default),
        images=len(images),
        tried=len(bench.measured),
        versions={**bench.about["versions"], "python": platform.python_version()},
    )


# ----------------------------------------------------------------------------------------------------------- the search


def _staged(bench: _Bench) -> Removed:
    """The best schedule in which the same share goes at every stage: stages are added and left out while that helps."""
    depth, method = _depth(bench.dense), bench.method
    starts = (None, default_stages(depth), methods.early(depth), (0, max(1, depth // 6)), (0,))
    best = bench.best([bench.even(stages) for stages in starts])
    if best is None:
        solve(cast(Trunk, bench.dense), bench.share, method=method)  # says how near one can come
        raise ValueError(f"no schedule with method {method.name!r} saves {bench.share:.1%} of the FLOPs")
    while True:
        stages = _stages(best)
        changed = [stages ^ {block} for block in _blocks(bench.dense)]
        nearest = bench.best([bench.even(sorted(each)) for each in changed if each])
        if nearest is None or bench.kl(nearest) >= bench.kl(best):
            return best
        best = nearest


def _shifted(bench: _Bench, best: Removed) -> Removed:
    """Patches go at one stage rather than at another while that helps; many at first, in the end one by one."""
    step = max(1, sections(cast(Trunk, bench.dense))[0].patches // 16)
    while step:
        before = best
        for more, fewer in itertools.permutations(sorted(_stages(best)), 2):
            counts = list(best)
            counts[more] += step
            moved = bench.fitted(counts, fewer)
            if moved is not None and moved[fewer] < best[fewer] and bench.kl(moved) < bench.kl(best):
                best = moved
        if best == before:
            step //= 2
    return best


def _stages(removed: Removed) -> set[int]:
    return {block for block, count in enumerate(removed) if count}


def _blocks(model: nn.Module) -> list[int]:
    """Blocks that may become stages: the first part of every section, evenly thinned where there are many."""
    first, found = 0, list[int]()
    for part in sections(cast(Trunk, model)):
        found += range(first, first + math.ceil(part.depth * EARLY))
        first += part.depth
    return found[:: math.ceil(len(found) / STAGES)]


def _depth(model: nn.Module) -> int:
    return sum(part.depth for part in sections(cast(Trunk, model)))


# ------------------------------------------------------------------------------------------------------------ measuring


class _Bench:
    """The dense model's answers, computed once, and the divergence from them of each schedule."""

    def __init__(
        self,
        dense: nn.Module,
        images: Tensor,
        method: Method,
        share: float,
        tries: int,
        journal: str | os.PathLike[str] | None,
        progress: Progress | None,
    ) -> None:
        self.dense, self.images, self.method, self.share, self.tries = dense, images, method, share, tries
        self.progress, self.measured = progress, dict[Removed, float]()
        self.about: dict[str, Any] = {
            "weights": weights_digest(dense),
            "method": describe(method),
            "images": hashlib.sha256(images.contiguous().cpu().numpy().data).hexdigest()[:16],
            "shape": list(images.shape),
            "versions": {"mambatrim": __version__, "torch": torch.__version__},
        }
        self.journal = None if journal is None else _Journal(Path(journal), key(self.about))
        self.known = {} if self.journal is None else self.journal.read()
        self._saved: dict[Removed, float | None] = {}
        self._answers: Tensor | None = None

    def reduced(self, removed: Removed) -> nn.Module:
        return reduce(self.dense, schedule=Schedule(removed), method=self.method)

    def saved(self, counts: Sequence[int]) -> float | None:
        """Share of the FLOPs that a schedule saves; None where the model cannot run it."""
        removed = tuple(counts)
        if removed not in self._saved:
            try:
                self._saved[removed] = 1 - count_flops(cast(Trunk, self.reduced(removed))).ratio
            except ValueError:
                self._saved[removed] = None
        return self._saved[removed]

    def kl(self, removed: Removed) -> float:
        """Mean divergence of a schedule in nats; infinite for new ones when no more may be tried."""
        if removed not in self.measured:
            if len(self.measured) >= self.tries:
                return math.inf
            found = self.known.get(removed)
            if found is None:
                found = self._divergence(self.reduced(removed))
                if self.journal is not None:
                    self.journal.keep(removed, found)
            self.measured[removed] = found
            if self.progress is not None:
                self.progress(len(self.measured), self.tries, min(self.measured.values()))
        return self.measured[removed]

    def best(self, candidates: Sequence[Removed | None]) -> Removed | None:
        """Of the schedules that there are the one that diverges least; of equals the first."""
        return min((each for each in candidates if each is not None), key=self.kl, default=None)

    def solved(self, stages: Sequence[int] | None) -> Removed | None:
        """What `solve` gives, and measured; it may miss the share by half a point."""
        try:
            schedule = solve(cast(Trunk, self.dense), self.share, stages, method=self.method)
        except ValueError:
            return None
        if schedule.stem:  # not among the places that are tried
            return None
        removed = schedule.removed
        if stages is None:
            self.kl(removed)
        return removed

    def even(self, stages: Sequence[int] | None) -> Removed | None:
        """The same share goes at every stage, and as little more or less at the last ones that enough is saved."""
        removed = self.solved(stages)
        if removed is None:
            return None
        fitted = (self.fitted(removed, block) for block in sorted(_stages(removed), reverse=True))
        return next((each for each in fitted if each is not None), None)

    def fitted(self, counts: Sequence[int], block: int) -> Removed | None:
        """The same with as few as possible gone after `block` that enough is saved; None where that cannot be."""
        found = list(counts)
        while (saved := self.saved(found)) is not None and saved < self.share:
            found[block] += 1
        while saved is not None and found[block]:
            fewer = [*found[:block], found[block] - 1, *found[block + 1 :]]
            if (self.saved(fewer) or 0.0) < self.share:
                break
            found = fewer
        return None if saved is None else tuple(found)

    @torch.inference_mode()
    def _run(self, model: nn.Module) -> Tensor:
        """Logarithms (n, classes) of the class probabilities in fp64."""
        device, pixels = next(model.parameters()).device, self.images[0, 0].numel()
        parts = self.images.split(max(1, PIXELS // pixels))
        return torch.cat([model(part.to(device)).double().cpu().log_softmax(dim=1) for part in parts])

    def _divergence(self, model: nn.Module) -> float:
        if self._answers is None:
            self._answers = self._run(self.dense)
        return float(F.kl_div(self._run(model), self._answers, log_target=True, reduction="batchmean"))


class _Journal:
    """Schedules and their divergences in a file, one JSON object a line; lines of other runs are left alone."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run

    def read(self) -> dict[Removed, float]:
        """What this run has measured before. The half of a line that a killed run left is cut off."""
        if not self.path.exists():
            return {}
        try:
            content = self.path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        whole, _, half = content.rpartition("\n")
        if half:
            self.path.write_text(f"{whole}\n" if whole else "", "utf-8")
        found: dict[Removed, float] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                if entry["run"] == self.run:
                    found[Schedule(entry["removed"]).removed] = float(entry["kl"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"line {number} of {self.path} is damaged; delete the line, and what it had is measured again"
                ) from error
        return found

    def keep(self, removed: Removed, kl: float) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.run, "removed": removed, "kl": kl}) + "\n")
