"""Golden files: small ones lie in tests/golden, larger ones beside the repository where they exist."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from torch import Tensor

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
