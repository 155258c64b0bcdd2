"""What is to be known of a GPU: whether its kernels are right there, and how fast.

    python benchmarks/gpu.py [SECTION ...] [--seconds 4] [--json FILE]

check   scan, convolution and norm with their gradients against the definitions on the CPU; logits, and the tokens that
        are kept, of whole models against the CPU.
scan    one direction, forward and backward, at shapes of Vim and VideoMamba: against the CUDA kernel of mamba_ssm where
        that is installed.
model   whole models at batch 128, with all tokens and with 40 % fewer FLOPs.

Times are those of the fastest call, ratios have a star where they miss their target. `--device cpu --batch 2` tries the
script where there is no GPU; its figures then say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from page import Page, chosen, parser, ratio, run
from torch import Tensor

import mambatrim
from mambatrim import kernels
from mambatrim.benchmark import DTYPES
from mambatrim.benchmark.rivals import mamba_ssm_arguments, mamba_ssm_scan, scan_arguments
from mambatrim.kernels import reference

# (images, tokens, channels, states) of Vim Tiny, Small and Base at 224, and VideoMamba Tiny and Middle at 8 frames
SCANS = ((128, 197, 384, 16), (128, 197, 768, 16), (64, 197, 1536, 16), (16, 1569, 384, 16), (8, 1569, 1152, 16))
# largest error against the largest value: as good as the dtype allows, after sums over a few hundred tokens
ALLOWED = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}
TYPES = {**DTYPES, "fp16": torch.float16}
SAVING = 0.4


# --------------------------------------------------------------------------------------------------------------- check


def check(page: Page, device: torch.device, batch: int) -> None:
    header = ("what", "dtype", "largest error of the values", "of the gradients", "at most")
    page.table(f"operators on {device} against the definitions on the CPU", header, _operators(device))
    names = ("model", "", "largest difference of the logits", "images whose kept tokens are the same")
    page.table(f"models on {device} against the CPU, fp32", names, _models(device))


def _scan(**arguments: Any) -> Tensor:
    return kernels.selective_scan(**arguments)[0]


def _scan_definition(**arguments: Any) -> Tensor:
    return reference.selective_scan(**arguments)[0]


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.causal_conv1d(x, [weight], [bias])[0]


def _operators(device: torch.device) -> Any:
    for dtype, kind in types(device).items():
        scan_given = scan_arguments(2, 70, 48, 16, kind)
        x, weight, bias, scale = (
            torch.randn(2, 70, 48).to(kind),
            torch.randn(48, 4),
            torch.randn(48),
            torch.rand(48) + 0.5,
        )
        cases: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {
            "scan": (_scan, _scan_definition, scan_given),
            "scan, reverse": (partial(_scan, reverse=True), partial(_scan_definition, reverse=True), scan_given),
            "convolution": (_convolution, reference.causal_conv1d, {"x": x, "weight": weight, "bias": bias}),
            "norm": (
                partial(kernels.rms_norm, eps=1e-5),
                partial(reference.rms_norm, eps=1e-5),
                {"x": x, "weight": scale},
            ),
        }
        for name, (function, definition, arguments) in cases.items():
            found = _with_gradients(function, arguments, device, None)
            wanted = _with_gradients(definition, arguments, torch.device("cpu"), torch.float32)
            errors = [_error(one, other) for one, other in zip(found, wanted, strict=True)]
            cells = (f"{error:.1e}{'' if error <= ALLOWED[dtype] else ' *'}" for error in (errors[0], max(errors[1:])))
            yield name, dtype, *cells, f"{ALLOWED[dtype]:.0e}"


def _with_gradients(
    function: Any, arguments: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None
) -> list[Tensor]:
    """The value, and the gradients of half the sum of its squares by all arguments; on the CPU, in fp32."""
    leaves = {
        name: value.detach().to(device, dtype or value.dtype).requires_grad_() for name, value in arguments.items()
    }
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), y.detach())
    return [one.detach().to("cpu", torch.float32) for one in (y, *gradients)]


def _error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, against the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def _models(device: torch.device) -> Any:
    images = torch.randn(8, 3, 224, 224)
    for name in ("vim_tiny", "vim_small"):
        dense: Any = mambatrim.create_model(name)
        for method in ("dense", "mtr", "vsm"):
            model = dense if method == "dense" else mambatrim.reduce(dense, flops_reduction=SAVING, method=method)
            wanted, kept = model(images), model.forward_features(images).origin.keep
            model.to(device)
            found = model(images.to(device)).cpu()
            same = (model.forward_features(images.to(device)).origin.keep.cpu() == kept).all(dim=1).sum()
            model.cpu()
            yield name, method, f"{(found - wanted).abs().max():.1e}", f"{same} of {len(images)}"


# ---------------------------------------------------------------------------------------------------------------- scan


def scan(page: Page, device: torch.device, batch: int) -> None:
    other = mamba_ssm_scan() if device.type == "cuda" else None

    def rows() -> Any:
        for most, length, channels, states in SCANS:
            for dtype, kind in types(device).items():
                arguments = scan_arguments(min(most, batch), length, channels, states, kind, device)
                calls = _calls("ours", _scan, arguments)
                if other is not None:
                    calls |= _calls("theirs", other, mamba_ssm_arguments(arguments))
                ms, cells = page.times(calls), []
                for way in ("forward", "backward"):
                    ours, theirs = ms[f"ours {way}"], ms.get(f"theirs {way}")
                    cells.append(f"{ours:.2f}")
                    cells += ["-", "-"] if theirs is None else [f"{theirs:.2f}", ratio(ours / theirs, 1)]
                yield (min(most, batch), length, channels, states), dtype, *cells, "1.00"

    header = (
        "(B, L, E, N)",
        "dtype",
        "forward, ms",
        "mamba_ssm",
        "ratio",
        "backward, ms",
        "mamba_ssm",
        "ratio",
        "at most",
    )
    page.table(f"selective scan on {device}, one direction", header, rows())


def _calls(name: str, function: Any, arguments: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """A forward pass, and a backward pass to all arguments."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in arguments.items()}
    with torch.enable_grad():
        y = function(**leaves)
    backward = partial(torch.autograd.grad, y, list(leaves.values()), torch.randn_like(y), retain_graph=True)
    return {f"{name} forward": partial(function, **arguments), f"{name} backward": torch.enable_grad()(backward)}


# --------------------------------------------------------------------------------------------------------------- model


def model(page: Page, device: torch.device, batch: int) -> None:
    # in rounds: one pair after the other is a loop of small calls on a GPU
    methods = {"mtr": mambatrim.methods.mtr(), "vsm": mambatrim.methods.vsm(grouping=mambatrim.methods.IN_ROUNDS)}

    def rows() -> Any:
        for name in ("vim_tiny", "vim_small", "vim_base"):
            for dtype, kind in DTYPES.items():
                dense: Any = mambatrim.create_model(name, dtype=kind).to(device)
                images = torch.randn(batch, 3, 224, 224, device=device)
                runs: dict[str, Callable[[], object]] = {"dense": partial(dense, images)}
                for key, method in methods.items():
                    runs[key] = partial(mambatrim.reduce(dense, flops_reduction=SAVING, method=method), images)
                ms = page.times(runs)
                per_second = (f"{1000 * batch / ms[key]:.0f}" for key in runs)
                shares = (ratio(ms["dense"] / ms[key], 1.5, least=True) for key in methods)
                yield name, dtype, batch, *per_second, *shares, "1.50"

    header = ("model", "dtype", "batch", "dense, images/s", "mtr", "vsm", "mtr/dense", "vsm/dense", "at least")
    page.table(f"whole models on {device} at -{100 * SAVING:.0f} %", header, rows())


SECTIONS: dict[str, Callable[[Page, torch.device, int], None]] = {"check": check, "scan": scan, "model": model}


def types(device: torch.device) -> dict[str, torch.dtype]:
    """That the kernels for a device take."""
    return {name: kind for name, kind in TYPES.items() if device.type == "cuda" or name != "fp16"}


def describe(device: torch.device) -> str:
    """Name, memory and versions."""
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    triton = version("triton") if find_spec("triton") is not None else "not installed"
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, CUDA {torch.version.cuda}, Triton {triton}"


def main() -> None:
    made = parser("kernels and models on a GPU, as ratios measured in one run", SECTIONS, 4)
    made.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu tries the script (%(default)s)")
    made.add_argument("--batch", type=int, default=128, help="images of whole models, and most of a scan (%(default)s)")
    options = chosen(made, SECTIONS)
    if options.batch < 1:
        made.error(f"batch must be at least 1, not {options.batch}")
    kind, _, number = options.device.partition(":")
    if kind not in ("cuda", "cpu") or not (number or "0").isdigit():
        made.error(f"device must be cuda, cuda:N or cpu, not {options.device!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        made.error(f"PyTorch sees no GPU {options.device!r} here; --device cpu --batch 2 only tries the script")
    device = torch.device(options.device)
    if kind == "cuda":
        print(describe(device))

    def on_device(section: Callable[[Page, torch.device, int], None]) -> Callable[[Page], None]:
        return lambda page: section(page, device, options.batch)

    run({name: on_device(section) for name, section in SECTIONS.items()}, options)


if __name__ == "__main__":
    main()
