"""A dense model, the same with fewer tokens, and its rivals, timed in turn in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..apply import pack, reduce
from ..flops import Trunk, count_flops
from ..kernels import selective_scan
from ..models import MODELS, create_model
from ..names import lookup
from ..report import report, result
from ..timing import Timing, time_functions
from .memory import forward_memory
from .rivals import rivals, scan_arguments, scans

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# calls of the fast scan in a row: the slow ones have emptied the caches before
SCANS = 10
# what `Measured.kind` says
MEASURED = ("dense", "reduced", "rival", "scan")


@dataclass(frozen=True)
class Setting:
    """One thing to measure: a model of the zoo on a batch. dtype: a name of DTYPES. image_size: None is its own.
    packed: whether the models are packed first (`mambatrim.pack`)."""

    model: str
    batch: int = 8
    dtype: str = "fp32"
    image_size: int | tuple[int, ...] | None = None
    device: str = "cpu"
    packed: bool = False

    def __post_init__(self) -> None:
        lookup("model", self.model, MODELS)
        lookup("dtype", self.dtype, DTYPES)
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, not {self.batch}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {self.device}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"there is no device {self.device}: PyTorch sees no GPU")
        if self.packed and self.device != "cpu":
            raise ValueError(f"only models on a CPU can be packed, not on {self.device}")

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.dtype}{', packed' if self.packed else ''}"


@dataclass(frozen=True)
class Measured:
    """What was found for one of the things that ran.

    name, kind: what it is; kind is one of MEASURED.
    timing: of one image, in milliseconds; of a scan, of one call.
    versus: time of the dense model over its own; of a scan, its own over the kernel's.
    ideal: 1 / (1 - reduction), by the FLOPs; 1 for a dense model, None for a rival or a scan.
    tokens: that enter each block.
    macs: multiply-adds of one image; 0 for a scan.
    memory: bytes of the forward pass at its peak, without weights and input; None where it was not measured.
    entry: what a report says about it.
    """

    name: str
    kind: str
    timing: Timing
    versus: float
    ideal: float | None
    tokens: tuple[int, ...]
    macs: int
    memory: int | None
    entry: dict[str, Any]

    @property
    def realised(self) -> float | None:
        """Measured speed-up as a share of the ideal one."""
        return None if self.ideal is None else self.versus / self.ideal


@dataclass(frozen=True)
class Measurement:
    """What was found for a setting, the dense model first; `disturbance` says what made it uncertain, or nothing."""

    setting: Setting
    found: tuple[Measured, ...]
    disturbance: str


@dataclass(frozen=True)
class _Entrant:
    """Something that will be timed on the images."""

    name: str
    kind: str
    run: Callable[[Tensor], Tensor]
    tokens: tuple[int, ...]
    macs: int
    entry: dict[str, Any]


def settings(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    image_size: int | None,
    device: str,
    packed: bool = False,
) -> list[Setting]:
    """All combinations, models outermost."""
    return [
        Setting(model, batch, dtype, image_size, device, packed)
        for model, dtype, batch in product(models, dtypes, batches)
    ]


@torch.no_grad()
def measure(
    setting: Setting,
    reductions: Sequence[float] = (0.2, 0.3, 0.4),
    methods: Sequence[str] = ("mtr",),
    against: bool = True,
    repeats: int = 11,
    seconds: float | None = None,
) -> Measurement:
    """Time one setting: the dense model first, then every method at every reduction, then what others would use.

    All are called in turn, so that a machine that slows down favours nobody. Memory is measured before the times.

    Args:
        setting: model, batch, dtype, size of the images, device.
        reductions: shares of the FLOPs to save, above 0.
        methods: names of `methods.METHODS`.
        against: time the rivals too: plain vision transformers, and other ways to run the scan of one block.
        repeats, seconds: as in `timing.time_functions`.
    """
    dtype, device = DTYPES[setting.dtype], torch.device(setting.device)
    model = cast(nn.Module, create_model(setting.model, image_size=setting.image_size, dtype=dtype)).to(device)
    if setting.packed:
        model = pack(model)
    entrants = [_entrant("dense", "dense", model, setting)]
    for method, share in product(methods, reductions):
        fast = reduce(model, flops_reduction=share, method=method)
        entrants.append(_entrant(f"{method} -{100 * share:.0f} %", "reduced", fast, setting))
    if against:
        for rival in rivals(model, None, dtype, device):
            entry = _rival_entry(rival.name, rival.tokens, rival.macs)
            entrants.append(_Entrant(rival.name, "rival", rival.run, rival.tokens, rival.macs, entry))
    images = torch.randn(setting.batch, *_input_shape(model), device=device, dtype=torch.float32)
    memory = [forward_memory(partial(entrant.run, images)) for entrant in entrants]
    functions = {entrant.name: partial(entrant.run, images) for entrant in entrants}
    timed = time_functions(functions, repeats, setting.batch, seconds=seconds)
    dense = timed.times["dense"].median
    found = [
        _measured(entrant, timed.times[entrant.name], dense, entrants[0].macs, peak)
        for entrant, peak in zip(entrants, memory, strict=True)
    ]
    if against and device.type == "cpu" and hasattr(model, "d_inner"):
        found += _scans(setting.batch, entrants[0].tokens[0], cast(Any, model), repeats, seconds)
    return Measurement(setting, tuple(found), timed.disturbance)


def to_report(measured: Sequence[Measurement]) -> dict[str, Any]:
    """The report (report.py) of what `measure` found for some settings."""
    results = []
    for measurement in measured:
        setting = measurement.setting
        for one in measurement.found:
            figures = {
                "kind": one.kind,
                "batch": setting.batch,
                "dtype": setting.dtype if one.kind != "scan" else "fp32",
                "device": setting.device,
                "packed": setting.packed and one.kind in ("dense", "reduced"),
                "ms": one.timing.median,
                "fastest_ms": one.timing.fastest,
                "spread": one.timing.spread,
                "versus": one.versus,
                "ideal": one.ideal,
                "realised": one.realised,
                "forward_memory": one.memory,
                "disturbance": measurement.disturbance,
            }
            results.append(one.entry | {"figures": figures})
    return report("benchmark", results)


def _entrant(name: str, kind: str, model: nn.Module, setting: Setting) -> _Entrant:
    counted = count_flops(cast(Trunk, model))
    return _Entrant(name, kind, model, counted.lengths, counted.total, result(name, model, {}))


def _rival_entry(name: str, tokens: tuple[int, ...], macs: int) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "method": "dense",
        "schedule": {"removed": [0] * len(tokens)},
        "tokens": list(tokens),
        "flops": {"both": macs},
    }


def _measured(entrant: _Entrant, timing: Timing, dense: float, dense_macs: int, memory: int | None) -> Measured:
    ideal = dense_macs / entrant.macs if entrant.kind in ("dense", "reduced") else None
    versus = dense / timing.median
    return Measured(
        entrant.name, entrant.kind, timing, versus, ideal, entrant.tokens, entrant.macs, memory, entrant.entry
    )


def _input_shape(model: Any) -> tuple[int, ...]:
    return (model.config.in_chans, *model.sides())


def _scans(batch: int, length: int, model: Any, repeats: int, seconds: float | None) -> list[Measured]:
    """The scan of one block in one direction: the kernel, then other ways to run it."""
    states = model.blocks()[0].mixer.d_state
    arguments = scan_arguments(batch, length, model.d_inner, states)
    times = time_scans(arguments, repeats, seconds)
    kernel = times["scan: kernel"].median
    return [
        Measured(
            name, "scan", timing, timing.median / kernel, None, (length,), 0, None, _rival_entry(name, (length,), 0)
        )
        for name, timing in times.items()
    ]


def time_scans(arguments: dict[str, Any], repeats: int, seconds: float | None = None) -> dict[str, Timing]:
    """Milliseconds of one call of the kernel and of the others.

    Raises:
        ValueError: one of them computes something else.
    """

    def kernel() -> Tensor:
        for _ in range(SCANS - 1):
            selective_scan(**arguments)
        return selective_scan(**arguments)[0]

    functions: dict[str, Callable[[], Tensor]] = {"scan: kernel": kernel}
    functions |= {f"scan: {name}": partial(other, **arguments) for name, other in scans().items()}
    expected = kernel()
    for name, function in functions.items():
        if (expected - function()).abs().max() > 1e-3 * expected.abs().max():
            raise ValueError(f"{name} computes something else than the kernel")
    # memory as it comes: who runs the others pays for fetching their large temporaries too
    times = time_functions(functions, repeats, keep_memory=False, seconds=seconds).times
    fast = times["scan: kernel"]
    return times | {"scan: kernel": Timing(fast.median / SCANS, fast.fastest / SCANS, fast.spread)}
