"""Golden files (small ones in tests/golden, larger ones beside the repository where they exist), the comparison with
official code, and every registered model at tiny size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from mambatrim.kernels import cpu
from mambatrim.models import _BUILD, MODELS, ModelSpec

# workers share the cores, and each would take all of them
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

FOLDERS = (Path(__file__).parent / "golden", Path(__file__).parents[2] / "shared" / "golden")


class Golden(NamedTuple):
    """The tensors of a fixture by name, and what its metadata says (JSON decoded)."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    checks: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def golden_path(name: str) -> Path:
    for folder in FOLDERS:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"golden file {name} is not there (it is not part of the repository)")


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    def read(name: str) -> Golden:
        with safe_open(golden_path(f"{name}.safetensors"), "pt") as file:
            about = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Golden(tensors, json.loads(about["config"]), json.loads(about["checks"]))

    return read


@pytest.fixture
def golden_keys() -> Callable[[str], dict[str, Any]]:
    return lambda name: json.loads(golden_path(f"keys_{name}.json").read_text())


FORMS = ["compiled", "pytorch"] if not cpu.missing() else ["pytorch"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """The compiled kernels, and the PyTorch form that runs without them."""
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "handles", lambda *tensors: False)
    return request.param


@pytest.fixture
def compare_with_official() -> Callable[[nn.Module, Golden], None]:
    """A flat model against every output of a fixture: stream, update and time steps of the layers, tokens, features,
    logits."""

    @torch.no_grad()
    def compare(model: Any, file: Golden) -> None:
        def check(what: str, actual: Tensor, expected: Tensor) -> None:
            own_error = max(file.checks["max_abs_float32_minus_float64"].values())
            allowed = max(4 * own_error, 1e-5 * expected.abs().max().item())
            error = (actual - expected).abs().max().item()
            assert error <= allowed, f"{what}: {error:.2e} > {allowed:.2e}"

        tokens = model.embed(file.tensors["input"])
        for i, layer in enumerate(model.layers):
            stored = file.part(f"layers.{i}.")
            if "residual" in stored:
                check(f"residual {i}", tokens.x, stored["residual"])
            x, captured = layer(tokens.x, ("update", "dt", "dt_mean"))
            if "hidden" in stored:
                check(f"hidden {i}", captured["update"], stored["hidden"])
            if "delta_f" in stored:
                dt = captured["dt"]  # (B, S, L, E)
                check(f"delta_f {i}", dt[:, 0].transpose(1, 2), stored["delta_f"])
                check(f"delta_b {i}", dt[:, 1].flip(1).transpose(1, 2), stored["delta_b"])
                check(f"mean of delta {i}", captured["dt_mean"], dt.mean(-1))
            tokens = tokens.with_x(x)
        check("tokens", model.norm_f(tokens.x), file.tensors["tokens"])
        check("features", model.pool(tokens), file.tensors["features"])
        check("logits", model(file.tensors["input"]), file.tensors["logits"])

    return compare


# sizes that make any model of a family tiny, whatever else its configuration says; a new family adds a row
_FLAT = {"image_size": (32, 40), "patch": 8, "d_model": 32, "depth": 4, "d_state": 4, "num_classes": 10}
TINY: dict[str, Callable[[Any], Any]] = {
    "vim": lambda c: replace(c, **_FLAT, stride=8 * c.stride // c.patch),
    "videomamba": lambda c: replace(c, **_FLAT, stride=8, frames=c.frames and 3),
    "mamba_reg": lambda c: replace(c, **_FLAT, stride=8),
    "local_vim": lambda c: replace(c, **_FLAT, stride=8, directions=c.directions[:4]),
}


def tiny_specs() -> dict[str, ModelSpec]:
    """Every registered model at tiny size, by the name of the first one that looks like it."""
    specs: dict[Any, ModelSpec] = {}
    for spec in MODELS.values():
        if spec.family not in TINY:  # models on a grid have no reducer; tests/test_grid_models.py asks them
            continue
        config = TINY[spec.family](spec.config)
        specs.setdefault((spec.family, config), replace(spec, config=config))
    return {spec.name: spec for spec in specs.values()}


@pytest.fixture(params=tiny_specs())
def tiny_model(request):
    """Every registered model in turn, at tiny size, with random weights."""
    spec = tiny_specs()[request.param]
    torch.manual_seed(0)
    return _BUILD[spec.family](spec).eval()
