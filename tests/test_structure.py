"""The house rules that a machine can check: which way imports point, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mambatrim

PACKAGE = Path(mambatrim.__file__).parent
# from the ground floor up: a room may import from those below it
FLOORS = (
    {"names", "kernels", "reduction", "bootstrap", "cells", "frontier"},
    {"methods", "models"},
    {"flops", "data", "clips", "timing", "compat"},
    {"apply", "evaluate", "adapters", "convert"},
    {"visualize", "report", "hub", "features", "prepared"},
    {"comparison", "entries", "opening"},
    {"measuring"},
    {"demo", "benchmark", "compare", "calibrate", "info", "timm_models"},
    {"arguments"},
    {"cli", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# rooms of one floor that may use each other, in this direction only
BESIDE = {
    ("reduction", "kernels"),
    ("models", "names"),
    ("report", "evaluate"),
    ("visualize", "evaluate"),
    ("evaluate", "timing"),
    ("clips", "data"),
    ("__main__", "cli"),
}


def rooms_imported(path: Path) -> set[str]:
    """The rooms of the package that a file imports from, anywhere in it."""
    package = ("mambatrim", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        found |= {parts[1] for parts in names if parts[0] == "mambatrim" and len(parts) > 1}
    return found & set(LEVEL)


def test_every_room_has_its_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms == set(LEVEL)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in rooms_imported(path) - {room}:
        assert LEVEL[other] < LEVEL[room] or (room, other) in BESIDE, f"{room} may not import {other}"


def test_the_public_names_are_there_and_no_others():
    assert sorted(mambatrim.__all__) == sorted(
        [
            *("Method", "Reducer", "Schedule", "adapters", "attach", "convert", "count_flops", "create_model"),
            *("evaluate", "features", "from_pretrained", "save_pretrained"),
            *("list_methods", "list_models", "load_images", "methods", "pack", "reduce", "solve", "visualize"),
        ]
    )
    for name in mambatrim.__all__:
        assert getattr(mambatrim, name).__doc__, name


def test_importing_needs_torch_only():
    """No optional library is imported: not timm, torchvision, pyarrow, huggingface_hub, matplotlib."""
    script = "import sys, mambatrim; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"timm", "torchvision", "pyarrow", "huggingface_hub", "matplotlib", "mambapy"} & set(loaded)


def test_methods_know_no_model():
    for path in (PACKAGE / "methods").glob("*.py"):
        assert rooms_imported(path) <= {"methods", "reduction", "names", "kernels"}, path.name
    for path in (*(PACKAGE / "kernels").glob("*.py"), *(PACKAGE / "reduction").glob("*.py")):
        assert len(rooms_imported(path) - {"kernels", "reduction"}) == 0, path.name
