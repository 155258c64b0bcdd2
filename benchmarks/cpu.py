"""How fast the CPU kernels and models are, as ratios measured in one run.

    python benchmarks/cpu.py [--threads 2] [--repeats 7] [--json FILE] [--models vim_small ...]

1. The selective scan, one direction, forward: the kernel against the reference loop of `mambatrim.kernels.reference`,
   against the same loop as research code has it (decays and inputs of all tokens in memory first), and against the
   parallel scan of `mambapy` (where that is installed); and the kernel's backward pass against its forward.
2. A model's forward pass against its lower bound: its matrix products alone, by the faster library that PyTorch ships
   (beside `torch.nn.functional.linear`), plus the scan's arithmetic at the rate that the kernel reaches when all its
   inputs lie in the cache. Both are measured here.
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


def materialised_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """The loop as research code has it: decays and inputs of all tokens in memory first, channels before tokens."""
    u, dt, B, C, z = (x.transpose(1, 2) for x in (u, dt, B, C, z))
    dt = F.softplus(dt + dt_bias[:, None])
    decay = torch.exp(torch.einsum("bel,en->beln", dt, A))
    inputs = torch.einsum("bel,bnl,bel->beln", dt, B, u)
    state, outputs = torch.zeros_like(inputs[:, :, 0]), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + inputs[:, :, t]
        outputs.append(torch.einsum("ben,bn->be", state, C[:, :, t]))
    return ((torch.stack(outputs, dim=2) + u * D[:, None]) * F.silu(z)).transpose(1, 2)


def scan_figures(shape: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    arguments = scan_arguments(*shape)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
    output = kernels.selective_scan(**leaves)[0]
    grad = torch.randn_like(output)
    calls = 10  # of the fast ones in a row: the slow ones have emptied the caches before

    def forward() -> Tensor:
        outputs = [kernels.selective_scan(**arguments)[0] for _ in range(calls)]
        return outputs[-1]

    def backward() -> None:
        for _ in range(calls):
            torch.autograd.grad(output, list(leaves.values()), grad, retain_graph=True)

    fast = {"kernel": torch.no_grad()(forward), "backward": backward}
    slow = {
        "loop": torch.no_grad()(lambda: reference.selective_scan(**arguments)[0]),
        "materialised": torch.no_grad()(lambda: materialised_scan(**arguments)),
    }
    try:
        import mambapy.pscan  # noqa: F401
    except ImportError:
        print("mambapy is not installed: no comparison with it", file=sys.stderr)
    else:
        slow["mambapy"] = torch.no_grad()(lambda: mambapy_scan(**arguments))
    expected = fast["kernel"]()
    for name, function in slow.items():
        if (expected - function()).abs().max() > 1e-3 * expected.abs().max():
            raise SystemExit(f"{name} computes something else than the kernel")
    # memory as it comes: who runs the others pays for their large temporaries too
    times = time_functions({**fast, **slow}, repeats, keep_memory=False).times
    return {name: timing.median / (calls if name in fast else 1) for name, timing in times.items()}


def scan_limit(states: int, rank: int, repeats: int) -> float:
    """Milliseconds of one direction per (token, channel) when the inputs lie in the cache: the best of some small
    shapes."""
    functions, work = {}, {}
    for length, channels in ((64, 32), (64, 64), (128, 64), (128, 128)):
        batch = 2**20 // (length * channels)

        def same(*shape: int, batch: int = batch) -> Tensor:  # every image of the batch is the same memory
            return torch.randn(1, *shape).expand(batch, *shape)

        direction = kernels.Direction(
            *(same(length, rank), -torch.rand(channels, states), same(length, states), same(length, states)),
            *(torch.randn(channels), torch.randn(channels) - 4, torch.randn(channels, rank)),
        )
        u, z = same(length, channels)[None], same(length, channels)
        name = f"{length} {channels}"
        functions[name] = lambda u=u, direction=direction, z=z: kernels.scan(u, [direction], z)
        work[name] = batch * length * channels
    with torch.no_grad():
        times = time_functions(functions, 3 * repeats).times
    return min(times[name].fastest / work[name] for name in times)


def model_figures(name: str, batch: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    model = mambatrim.create_model(name, dtype=dtype)
    images = torch.randn(batch, 3, *model.spec.preprocess.size)
    length, mixers = model.num_patches() + 1, [layer.mixer for layer in model.blocks()]
    tokens = torch.randn(batch * length, model.d_model, dtype=dtype)
    inner = torch.randn(batch * length, model.d_inner, dtype=dtype)
    patches = torch.randn(batch * (length - 1), model.patch_embed.proj.weight[0].numel(), dtype=dtype)

    def products(linear: Any) -> None:
        linear(patches, model.patch_embed.proj.weight.flatten(1))
        for mixer in mixers:
            linear(tokens, mixer.in_proj.weight)
            linear(inner, mixer.x_proj.weight)
            linear(inner, mixer.x_proj_b.weight)
            linear(inner, mixer.out_proj.weight)

    reduced = {share: mambatrim.reduce(model, flops_reduction=share) for share in (0.2, 0.3, 0.4)}
    functions: dict[str, Any] = {
        "dense": lambda: model(images),
        "products": lambda: products(kernels.linear),
        "products by torch": lambda: products(F.linear),
    }
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
        names = ("loop", "materialised", "mambapy")
        others = [f"{ms[other] / ms['kernel']:.0f}x" if other in ms else "-" for other in names]
        rows.append([str(shape), f"{ms['kernel']:.2f} ms", *others, f"{ms['backward'] / ms['kernel']:.1f}x"])
    print("\nselective scan, one direction, (B, L, E, N), fp32")
    print(table(("shape", "kernel", "reference loop", "materialised loop", "mambapy", "backward/forward"), rows))
    rows = []
    for name in options.models:
        for batch in options.batches:
            for dtype in (torch.float32, torch.bfloat16)[: 2 if options.bf16 else 1]:
                label = f"{name} {str(dtype).removeprefix('torch.')} batch {batch}"
                ms = results["models"][label] = model_figures(name, batch, dtype, options.repeats)
                split = [f"{ms[key]:.1f}" for key in ("dense", "products by torch", "products", "scan limit")]
                realised = [f"{ms[f'realised -{share}']:.2f}" for share in ("20%", "30%", "40%")]
                rows.append([label, *split, f"{ms['dense'] / ms['bound']:.2f}", *realised])
    print("\nforward pass in ms, against its bound; and speed-up with fewer tokens as a share of the ideal one")
    header = ("model", "dense", "F.linear", "products", "scan limit", "dense/bound", "-20 %", "-30 %", "-40 %")
    print(table(header, rows))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
