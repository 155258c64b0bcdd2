"""All figures of docs/benchmarks.md for a CPU, as ratios measured in one run, in tables of Markdown.

    python benchmarks/cpu.py [SECTION ...] [--seconds 6] [--threads 2] [--json FILE]

scan       one direction, forward: the kernel against other ways to run it; its backward pass against its forward.
bound      a forward pass against its lower bound: its matrix products alone, by the fastest of two libraries that
           PyTorch ships and our kernel, and the scan's arithmetic at the rate that its kernel reaches in the cache.
speedup    the model with fewer tokens: measured speed-up as a share of the ideal 1 / (1 - reduction); at one image
           packed models too.
packed     models packed for inference against the same as they are; no targets.
deit       the model with 40 % fewer FLOPs against a plain vision transformer of its size with fused attention.
step       one reduction (score, sort, match, merge, reorder) as a share of the block before it.
memory     what a forward adds at its peak, against what its largest operator, the scan, reads and writes.
product    the kernel of matrix products against the libraries, every weight as it lies in a model; no targets.
cluster    the grouping of vsm, one pair after the other and in rounds; no targets.
compile    the model under torch.compile(fullgraph=True) against the model as it is.

Times are those of the fastest call: on a machine that others share too, seconds at a time are slower by up to half, for
everything alike and for no reason of ours. A ratio that misses its target has a star. `mambatrim benchmark` measures
any model of the zoo in the same way, with medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product as product_of
from typing import Any

import torch
import torch.nn.functional as F
from page import MOST, Page, chosen, parser, ratio, run
from torch import Tensor

import mambatrim
from mambatrim import kernels
from mambatrim.benchmark import DTYPES, Setting, forward_memory, measure, mebibytes
from mambatrim.benchmark.rivals import rivals, scan_arguments
from mambatrim.benchmark.timed import time_scans
from mambatrim.kernels import cpu
from mambatrim.timing import time_functions

SCANS = ((8, 197, 768, 16), (1, 197, 384, 16), (8, 197, 1536, 16), (1, 4096, 768, 16))
SIZES = ("vim_tiny", "vim_small", "vim_base")
METHODS = ("mtr", "vsm")
PACKED = ("as it is", "packed")


# ---------------------------------------------------------------------------------------------------------------- scan


def scan(page: Page) -> None:
    def rows() -> Any:
        for shape in SCANS:
            arguments = scan_arguments(*shape)
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
            output = kernels.selective_scan(**leaves)[0]
            grad = torch.randn_like(output)
            inputs = list(leaves.values())
            forward = torch.no_grad()(partial(kernels.selective_scan, **arguments))
            backward = torch.enable_grad()(partial(torch.autograd.grad, output, inputs, grad, retain_graph=True))
            both = page.times({"forward": forward, "backward": backward})
            with torch.no_grad():
                found = time_scans(arguments, MOST, page.seconds)
            kernel = found["scan: kernel"].median
            others = {name.removeprefix("scan: "): timing.median / kernel for name, timing in found.items()}
            names = ("reference loop", "materialised loop", "mambapy")
            cells = [f"{others[name]:.0f}x" if name in others else "-" for name in names]
            yield shape, f"{kernel:.2f} ms", *cells, f"{both['backward'] / both['forward']:.1f}x"

    header = ("shape", "kernel", "reference loop", "materialised loop", "mambapy", "backward/forward")
    page.table("selective scan, one direction, (B, L, E, N), fp32", header, rows())


# --------------------------------------------------------------------------------------------------------------- bound


@cache
def scan_limit(states: int, rank: int) -> float:
    """Milliseconds of one direction per (token, channel) when the inputs lie in the cache: the best of small shapes."""
    functions, work = {}, {}
    for length, channels in ((64, 32), (64, 64), (128, 64), (128, 128)):
        batch = 2**19 // (length * channels)

        def same(*shape: int, batch: int = batch) -> Tensor:  # every image of the batch is the same memory
            return torch.randn(1, *shape).expand(batch, *shape)

        direction = kernels.Direction(
            *(same(length, rank), -torch.rand(channels, states), same(length, states), same(length, states)),
            *(torch.randn(channels), torch.randn(channels) - 4, torch.randn(channels, rank)),
        )
        u, z = same(length, channels)[None], same(length, channels)
        functions[f"{length} {channels}"] = partial(kernels.scan, u, [direction], z)
        work[f"{length} {channels}"] = batch * length * channels
    with torch.no_grad():
        times = time_functions(functions, 15).times
    return min(times[name].fastest / work[name] for name in times)


def by_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """A product by the kernel that the mixer uses."""
    return kernels.project(x[None, None], [weight])[0]


def by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """A product by oneDNN, which PyTorch itself calls in bf16 but not in fp32."""
    if x.dtype != torch.float32 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return F.linear(x, weight)
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return found


PRODUCTS: dict[str, Any] = {"F.linear": F.linear, "oneDNN": by_onednn, "kernel": by_kernel}


def products(model: Any, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The matrix products of a forward pass alone, by each library and by the kernel."""
    length, mixers = model.num_patches() + 1, [layer.mixer for layer in model.blocks()]
    tokens = torch.randn(batch * length, model.d_model, dtype=dtype)
    inner = torch.randn(batch * length, model.d_inner, dtype=dtype)
    patches = torch.randn(batch * (length - 1), model.patch_embed.proj.weight[0].numel(), dtype=dtype)

    def run(linear: Any) -> None:
        linear(patches, model.patch_embed.proj.weight.flatten(1))
        for mixer in mixers:
            linear(tokens, mixer.in_proj.weight)
            linear(inner, mixer.x_proj.weight)
            linear(inner, mixer.x_proj_b.weight)
            linear(inner, mixer.out_proj.weight)

    return {name: partial(run, linear) for name, linear in PRODUCTS.items()}


def bound(page: Page) -> None:
    def rows() -> Any:
        for name in SIZES:
            for dtype, limit in (
                ("fp32", 1.25 if name == "vim_tiny" else 1.15),
                ("bf16", 1.4 if name == "vim_tiny" else 1.3),
            ):
                model: Any = mambatrim.create_model(name, dtype=DTYPES[dtype])
                mixer = model.blocks()[0].mixer
                for batch in (1, 8):
                    images = torch.randn(batch, 3, *model.spec.preprocess.size)
                    runs = {"dense": partial(model, images), **products(model, batch, DTYPES[dtype])}
                    ms = page.times(runs)
                    best = min(ms[library] for library in PRODUCTS)
                    work = 2 * model.depth * batch * (model.num_patches() + 1) * model.d_inner
                    arithmetic = scan_limit(mixer.d_state, mixer.dt_rank) * work
                    target = limit + (0.1 if batch == 1 else 0)
                    found = ratio(ms["dense"] / (best + arithmetic), target)
                    cells = [f"{value:.1f}" for value in (*ms.values(), arithmetic)]
                    yield name, dtype, batch, *cells, found, f"{target:.2f}"

    header = (
        "model",
        "dtype",
        "batch",
        "forward, ms",
        *PRODUCTS,
        "scan limit",
        "forward/bound",
        "at most",
    )
    page.table("forward pass against its lower bound", header, rows())


# ---------------------------------------------------------------------------------------- fewer tokens, transformers


def speedup(page: Page) -> None:
    def rows() -> Any:
        for name in SIZES:
            for batch, packed in ((1, False), (1, True), (8, False), (32, False)):
                setting = Setting(name, batch, packed=packed)
                found = measure(setting, against=False, repeats=MOST, seconds=page.seconds).found
                target = 0.9 if batch == 1 else 0.95
                dense, *fewer = found
                realised = [dense.timing.fastest / one.timing.fastest / (one.ideal or 1) for one in fewer]
                shares = [ratio(share, target, least=True) for share in realised]
                yield name, batch, PACKED[packed], f"{dense.timing.fastest:.2f}", *shares, f"{target:.2f}"

    header = ("model", "batch", "", "dense, ms/image", "-20 %", "-30 %", "-40 %", "at least")
    page.table("realised share of the ideal speed-up, MTR, fp32", header, rows())


def packed(page: Page) -> None:
    def rows() -> Any:
        for name, batch, dtype in product_of(("vim_cifar10", *SIZES), (1, 8), ("fp32", "bf16")):
            if DTYPES[dtype] is torch.bfloat16 and not cpu.multiplies_bf16():
                continue
            model = mambatrim.create_model(name, dtype=DTYPES[dtype])
            images, runs = torch.randn(batch, 3, *model.spec.preprocess.size), {}
            for label in ("dense", *METHODS):
                as_it_is = model if label == "dense" else mambatrim.reduce(model, flops_reduction=0.4, method=label)
                for state, each in zip(PACKED, (as_it_is, mambatrim.pack(as_it_is)), strict=True):
                    runs[f"{label} {state}"] = partial(each, images)
            ms = page.times(runs)
            pairs = [[ms[f"{label} {state}"] / batch for state in PACKED] for label in ("dense", *METHODS)]
            yield name, dtype, batch, *(cell for one in pairs for cell in (f"{one[1]:.2f}", f"{one[1] / one[0]:.2f}"))

    names = (f"{label} {what}" for label in ("dense", *METHODS) for what in ("ms/image", "share"))
    page.table(
        "packed models, and their share of the time of those that are not", ("model", "dtype", "batch", *names), rows()
    )


def deit(page: Page) -> None:
    targets = {("vim_tiny", 8): 0.9, ("vim_small", 1): 0.9, ("vim_small", 8): 0.75, ("vim_small", 32): 0.75}

    def rows() -> Any:
        for (name, batch), target in targets.items():
            model = mambatrim.create_model(name)
            images = torch.randn(batch, 3, 224, 224)
            other = rivals(model, None, torch.float32, torch.device("cpu"))[0]
            runs = {"dense": partial(model, images), "deit": partial(other.run, images)}
            for method in METHODS:
                runs[method] = partial(mambatrim.reduce(model, flops_reduction=0.4, method=method), images)
            ms = {key: value / batch for key, value in page.times(runs).items()}
            cells = [f"{ms[key]:.2f}" for key in ("dense", "mtr", "vsm", "deit")]
            shares = [ratio(ms[key] / ms["deit"], target) for key in METHODS]
            yield name, other.name, batch, *cells, *shares, f"{target:.2f}"

    header = ("model", "against", "batch", "dense, ms/image", "mtr", "vsm", "DeiT", "mtr/DeiT", "vsm/DeiT", "at most")
    page.table("-40 % of the FLOPs against a plain vision transformer, fp32", header, rows())


# ------------------------------------------------------------------------------------------------------- reduction step


def step(page: Page) -> None:
    def rows() -> Any:
        for name in SIZES:
            for side, target in ((224, 0.06), (1024, 0.12)):
                model: Any = mambatrim.create_model(name, image_size=side)
                for batch in (1, 8) if (name, side) != ("vim_base", 1024) else (1,):
                    images, block = torch.randn(batch, 3, side, side), model.blocks()[4]
                    ms = page.times({"block": partial(block, model.embed(images).x)} | steps(model, images))
                    shares = [ms[method] / ms["block"] for method in METHODS]
                    cells = (f"{100 * share:.1f} %{' *' if share > target else ''}" for share in shares)
                    times = (f"{ms[key]:.2f}" for key in ("block", "mtr", "vsm"))
                    yield name, model.num_patches() + 1, batch, *times, *cells, f"{100 * target:.0f} %"

    header = ("model", "tokens", "batch", "block, ms", "mtr, ms", "vsm, ms", "mtr/block", "vsm/block", "at most")
    page.table("one reduction step against one block, random images, fp32", header, rows())


@torch.no_grad()
def steps(model: Any, images: Tensor) -> dict[str, Callable[[], object]]:
    """The first reduction of each method at -40 %, on what the block before it leaves."""
    found: dict[str, Callable[[], object]] = {}
    for method in METHODS:
        reducer = mambatrim.reduce(model, flops_reduction=0.4, method=method).reducer
        at = next(block for block, removed in enumerate(reducer.schedule.removed) if removed)
        tokens = model.embed(images)
        x, captured = model.blocks()[at](tokens.x, reducer.needs(at))
        found[method] = partial(reducer, at, tokens.with_x(x), captured)
    return found


# -------------------------------------------------------------------------------------------------------------- memory


def memory(page: Page) -> None:
    def rows() -> Any:
        for name, batch in (
            ("vim_small", 8),
            ("vim_small", 32),
            ("videomamba_tiny_f64", 1),
            ("videomamba_small_f64", 1),
        ):
            model: Any = mambatrim.create_model(name)
            images = torch.randn(batch, 3, *model.sides())
            mixer, tokens = model.blocks()[0].mixer, batch * (model.num_patches() + 1)
            # both u, the gate and y, and dt, B and C of both directions
            scan_size = 4 * tokens * (4 * mixer.d_inner + 2 * (mixer.dt_rank + 2 * mixer.d_state))
            fast = mambatrim.reduce(model, flops_reduction=0.4)
            for label, each in (("dense", model), ("-40 %", fast)):
                with torch.no_grad():
                    peak = forward_memory(partial(each, images))
                share = "-" if peak is None else ratio(peak / scan_size, 1.5)
                yield name, label, batch, tokens // batch, mebibytes(peak), mebibytes(scan_size), share, "1.50"

    header = ("model", "", "batch", "tokens", "peak of a forward", "scan's inputs and outputs", "peak/scan", "at most")
    page.table("memory of a forward pass beyond weights and images, fp32", header, rows())


# ------------------------------------------------------------------------------------------------------------- product


def product(page: Page) -> None:
    def run(linear: Any, x: Tensor, weights: Sequence[Tensor]) -> None:
        for weight in weights:
            linear(x, weight)

    def rows() -> Any:
        # in_proj, out_proj and x_proj of Vim Tiny, Small and Base
        for inputs, outputs in ((192, 768), (384, 192), (384, 44), (384, 1536), (768, 384), (768, 56), (1536, 80)):
            for count in (64, 197, 1576):
                x, weights = torch.randn(count, inputs), [torch.randn(outputs, inputs) for _ in range(24)]
                ms = page.times({name: partial(run, linear, x, weights) for name, linear in PRODUCTS.items()})
                cells = (f"{1000 * ms[name] / len(weights):.0f}" for name in PRODUCTS)
                best = min(ms[name] for name in PRODUCTS if name != "kernel")
                yield f"{count} x {inputs} -> {outputs}", *cells, f"{ms['kernel'] / best:.2f}"

    header = ("rows x inputs -> outputs", *(f"{name}, us" for name in PRODUCTS), "kernel/best library")
    page.table("matrix products, 24 weights in turn, fp32", header, rows())


# -------------------------------------------------------------------------------------------------------------- cluster


def cluster(page: Page) -> None:
    def rows() -> Any:
        for many in (196, 784, 3136):
            x, weight = torch.randn(1, many, 192), torch.ones(1, many)
            given = (x, weight, 0.02 * torch.arange(many, dtype=torch.float32)[None, :, None], many // 4)
            ms = page.times(
                {
                    "one by one": partial(kernels.agglomerate, *given),
                    "rounds": partial(kernels.agglomerate_rounds, *given),
                }
            )
            found = (f"{ms['one by one']:.2f}", f"{ms['rounds']:.2f}", f"{ms['rounds'] / ms['one by one']:.0f}x")
            yield many, many // 4, *found

    header = ("rows", "pairs joined", "one by one, ms", "in rounds, ms", "rounds/one by one")
    page.table("grouping of vsm, 192 features, random, fp32", header, rows())


# ------------------------------------------------------------------------------------------------------- torch.compile


def compile_(page: Page) -> None:
    def rows() -> Any:
        model = mambatrim.create_model("vim_tiny")
        reduced = {
            f"{method}, -40 %": mambatrim.reduce(model, flops_reduction=0.4, method=method) for method in METHODS
        }
        for label, each in {"dense": model, **reduced}.items():
            for batch in (1, 8):
                images = torch.randn(batch, 3, 224, 224)
                torch._dynamo.reset()
                compiled = torch.compile(each, fullgraph=True)
                start = time.perf_counter()
                with torch.no_grad():
                    compiled(images)
                seconds = time.perf_counter() - start
                ms = page.times({"eager": partial(each, images), "compiled": partial(compiled, images)})
                share = ratio(ms["compiled"] / ms["eager"], 1.0)
                yield "vim_tiny", label, batch, f"{ms['eager']:.1f}", share, "1.00", f"{seconds:.1f}"

    header = ("model", "", "batch", "eager, ms", "compiled/eager", "at most", "compiling, s")
    page.table("torch.compile(fullgraph=True) against eager, fp32", header, rows())


# memory first: what others leave in the heap would be seen in it
SECTIONS = {
    "memory": memory,
    "scan": scan,
    "bound": bound,
    "speedup": speedup,
    "packed": packed,
    "deit": deit,
    "step": step,
    "product": product,
    "cluster": cluster,
    "compile": compile_,
}


def main() -> None:
    options = chosen(parser("figures of docs/benchmarks.md, as ratios measured in one run", SECTIONS, 6), SECTIONS)
    if cpu.missing():
        raise SystemExit(cpu.missing())
    run(SECTIONS, options)


if __name__ == "__main__":
    main()
