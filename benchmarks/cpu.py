"""How fast the CPU kernels and models are, as ratios measured in one run.

    python benchmarks/cpu.py [--threads 2] [--repeats 7] [--json FILE] [--models vim_small ...]

1. The selective scan, one direction, forward: the kernel against the reference loop of `mambatrim.kernels.reference`
and
   against the parallel scan of `mambapy` (where that is installed); and the kernel's backward pass against its forward.
2. A model's forward pass against its lower bound: its matrix products alone, plus the scan's arithmetic at the rate
that the
   kernel reaches when all its inputs lie in the first-level cache. Both are measured here.
3. The model with fewer tokens: measured speed-up against the ideal 1 / (1 - reduction).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mambatrim
from mambatrim import kernels
from mambatrim.kernels import cpu, reference
from mambatrim.report import describe_machine, machine, table
from mambatrim.timing import time_functions

SHAPES = ((8, 197, 768, 16), (1, 197, 384, 16), (8, 197, 1536, 16), (1, 4096, 768, 16))


def scan_arguments(batch: int, length: int, channels: int, states: int) -> dict[str, Tensor]:
    """One direction with full step sizes: softplus, D and gate included."""
    return {
        "u": torch.randn(batch, length, channels),
        "dt": torch.randn(batch, length, channels),
        "A": -torch.rand(channels, states) * 16,
        "B": torch.randn(batch, length, states),
        "C": torch.randn(batch, length, states),
        "D": torch.randn(channels),
        "z": torch.randn(batch, length, channels),
        "dt_bias": torch.randn(channels) - 4,
    }


def mambapy_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """The same by mambapy's parallel scan, composed as in its Mamba block."""
    from mambapy.pscan import pscan

    dt = F.softplus(dt + dt_bias)
    decay = torch.exp(dt[..., None] * A)  # (B, L, E, N)
    inputs = dt[..., None] * B[:, :, None, :] * u[..., None]
    states = pscan(decay, inputs)
    y = (states @ C[..., None]).squeeze(3) + D * u
    return y * F.silu(z)


def scan_figures(shape: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    arguments = scan_arguments(*shape)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    output = kernels.selective_scan(**leaves)[0]
    grad = torch.randn_like(output)

    def slow(function: Any) -> Any:
        return torch.no_grad()(lambda: function(**arguments))

    functions = {
        "kernel": slow(kernels.selective_scan),
        "backward": lambda: torch.autograd.grad(output, list(leaves.values()), grad, retain_graph=True),
        "loop": slow(reference.selective_scan),
    }
    try:
        import mambapy.pscan  # noqa: F401
    except ImportError:
        print("mambapy is not installed: no comparison with it", file=sys.stderr)
    else:
        functions["mambapy"] = slow(mambapy_scan)
        expected, other = functions["kernel"]()[0], functions["mambapy"]()
        if (expected - other).abs().max() > 1e-3 * expected.abs().max():
            raise SystemExit("the scans that are compared disagree")
    return {name: timing.median for name, timing in time_functions(functions, repeats).times.items()}


def scan_limit(states: int, rank: int, repeats: int) -> float:
    """Milliseconds of one direction per (token, channel) when the inputs lie in the first-level cache."""
    batch, length, channels = 512, 16, 32
    one = torch.randn(1, length, channels)

    def same(*shape: int) -> Tensor:  # every image of the batch is the same memory
        return torch.randn(1, *shape).expand(batch, *shape)

    direction = kernels.Direction(
        *(same(length, rank), -torch.rand(channels, states), same(length, states), same(length, states)),
        *(torch.randn(channels), torch.randn(channels) - 4, torch.randn(channels, rank)),
    )
    u, z = one.expand(batch, length, channels)[None], one.expand(batch, length, channels)
    with torch.no_grad():
        timing = time_functions({"scan": lambda: kernels.scan(u, [direction], z)}, 3 * repeats)
    return timing.times["scan"].fastest / (batch * length * channels)


def model_figures(name: str, batch: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    model = mambatrim.create_model(name, dtype=dtype)
    images = torch.randn(batch, 3, *model.spec.preprocess.size)
    length, mixers = model.num_patches() + 1, [layer.mixer for layer in model.blocks()]
    tokens = torch.randn(batch * length, model.d_model, dtype=dtype)
    inner = torch.randn(batch * length, model.d_inner, dtype=dtype)
    patches = torch.randn(batch * (length - 1), model.patch_embed.proj.weight[0].numel(), dtype=dtype)

    def products() -> None:
        F.linear(patches, model.patch_embed.proj.weight.flatten(1))
        for mixer in mixers:
            F.linear(tokens, mixer.in_proj.weight)
            F.linear(inner, mixer.x_proj.weight)
            F.linear(inner, mixer.x_proj_b.weight)
            F.linear(inner, mixer.out_proj.weight)

    reduced = {share: mambatrim.reduce(model, flops_reduction=share) for share in (0.2, 0.3, 0.4)}
    functions: dict[str, Any] = {"dense": lambda: model(images), "products": products}
    functions |= {f"-{share:.0%}": lambda fast=fast: fast(images) for share, fast in reduced.items()}
    with torch.no_grad():
        found = time_functions(functions, repeats).times
    scan = 2 * len(mixers) * scan_limit(mixers[0].d_state, mixers[0].dt_rank, repeats)
    times = {key: timing.median for key, timing in found.items()}
    times["scan limit"] = scan * batch * length * model.d_inner
    times["bound"] = times["products"] + times["scan limit"]
    for share, fast in reduced.items():
        ideal = 1 / mambatrim.count_flops(fast).ratio
        times[f"realised -{share:.0%}"] = times["dense"] / times[f"-{share:.0%}"] / ideal
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="ratios of the CPU kernels and models, in one run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=["vim_tiny", "vim_small"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--bf16", action="store_true", help="bf16 matrix products too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(describe_machine())
    if cpu.missing():
        raise SystemExit(cpu.missing())
    results: dict[str, Any] = {"machine": machine(), "scan": {}, "models": {}}
    rows = []
    for shape in SHAPES:
        ms = results["scan"][str(shape)] = scan_figures(shape, options.repeats)
        others = [f"{ms[other] / ms['kernel']:.0f}x" if other in ms else "-" for other in ("loop", "mambapy")]
        rows.append([str(shape), f"{ms['kernel']:.2f} ms", *others, f"{ms['backward'] / ms['kernel']:.1f}x"])
    print("\nselective scan, one direction, (B, L, E, N), fp32")
    print(table(("shape", "kernel", "reference loop", "mambapy", "backward/forward"), rows))
    rows = []
    for name in options.models:
        for batch in options.batches:
            for dtype in (torch.float32, torch.bfloat16)[: 2 if options.bf16 else 1]:
                label = f"{name} {str(dtype).removeprefix('torch.')} batch {batch}"
                ms = results["models"][label] = model_figures(name, batch, dtype, options.repeats)
                split = [f"{ms[key]:.1f}" for key in ("dense", "products", "scan limit")]
                realised = [f"{ms[f'realised -{share}']:.2f}" for share in ("20%", "30%", "40%")]
                rows.append([label, *split, f"{ms['dense'] / ms['bound']:.2f}", *realised])
    print("\nforward pass in ms, against its bound; and speed-up with fewer tokens as a share of the ideal one")
    header = ("model", "dense", "products", "scan limit", "dense/bound", "-20 %", "-30 %", "-40 %")
    print(table(header, rows))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
