"""The cells of a comparison: what one model with one method at one saving did with each image, kept in a file.

A cell is found by its configuration, and by all of it: another option, schedule, weight or image makes another cell.
A file is written at once or not at all, so that a killed run leaves nothing half done.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

FORMAT = "mambatrim-cell-1"


@dataclass(frozen=True)
class Cell:
    """What was measured.

    config: all that decides the predictions, as plain data.
    predictions: (n,) int32, the class put first.
    kl: (n,) fp32, divergence KL(dense || this) of the class probabilities in nats; zero for the dense model itself.
    logits: (n, classes) fp32 of the dense model, which later cells are compared with; empty otherwise.
    timing: what `compare` measured, or None.
    about: what does not decide anything: label, versions, machine, path of the data.
    """

    config: Mapping[str, Any]
    predictions: Tensor
    kl: Tensor
    logits: Tensor
    timing: Mapping[str, Any] | None
    about: Mapping[str, Any]


def key(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Cells in a folder, a file each; the folder is made when the first one is kept."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"cells are kept in a folder, but {self.root} is a file")

    def path(self, config: Mapping[str, Any]) -> Path:
        """Where the cell of a configuration lies: model, method, saving, key."""
        words = (config["model"]["name"], config["method"]["name"], f"{100 * config['target']:g}", key(config))
        return self.root / ("-".join(plain_word(str(word)) for word in words) + ".safetensors")

    def find(self, config: Mapping[str, Any]) -> Cell | None:
        """The cell of this configuration, or None where there is no such file.

        Raises:
            ValueError: the file is damaged, or holds another cell.
        """
        path = self.path(config)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["cell"])
                tensors = {name: file.get_tensor(name) for name in ("predictions", "kl", "logits")}
            cell = Cell(about["config"], **tensors, timing=about["timing"], about=about["about"])
            same = about["format"] == FORMAT and json.dumps(cell.config, sort_keys=True) == json.dumps(
                config, sort_keys=True
            )
            sizes = {len(cell.predictions), len(cell.kl)} == {config["data"]["images"]}
        except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} is damaged ({reason}); delete it, and the cell is run anew") from error
        if not (same and sizes):
            raise ValueError(f"{path} holds another cell than its name says; delete it, and the cell is run anew")
        return cell

    def keep(self, cell: Cell) -> None:
        """Write a cell, over an older one if there is one."""
        path = self.path(cell.config)
        self.root.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "config": cell.config, "timing": cell.timing, "about": cell.about}
        tensors = {"predictions": cell.predictions, "kl": cell.kl, "logits": cell.logits}
        new = path.with_suffix(f".{os.getpid()}.new")
        try:
            safetensors.torch.save_file(tensors, new, {"cell": json.dumps(about)})
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def plain_word(word: str) -> str:
    """A word for the name of a file: letters, digits, points and underscores."""
    return "".join(letter if letter.isalnum() or letter in "_." else "_" for letter in word)


# ------------------------------------------------------------------------------------------------- what decides a cell


def weights_digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that stand for all weights of a model, names and dtypes included."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def describe(value: object) -> Any:
    """A method, or any part of one, as plain data that differs where two of them differ.

    Functions are described by name, by a digest of their compiled code, and by what they hold: defaults, and variables
    of the function around them. What a function calls by its global name is not followed; the version of the package
    in the configuration stands for that.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [describe(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): describe(each) for name, each in value.items()}
    if isinstance(value, partial):
        return {"partial": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"function": describe(value.__func__), "of": describe(value.__self__)}
    if isinstance(value, types.FunctionType):
        return _function(value)
    if is_dataclass(value) and not isinstance(value, type):
        # a field that a later version adds with a default leaves the description as it was
        own = {
            f.name: describe(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) is not f.default
        }
        return {"class": type(value).__qualname__, **own}
    if isinstance(value, Tensor):
        return {"tensor": weights_digest(nn.ParameterList([nn.Parameter(value, requires_grad=False)]))}
    name = getattr(value, "__qualname__", None)  # classes, and functions that are not written in Python
    if name is None:
        raise ValueError(
            f"a method holds an object of type {type(value).__name__}, which cannot be told from others of its kind; "
            "use numbers, text, functions and dataclasses"
        )
    return f"{getattr(value, '__module__', '')}.{name}"


def _function(function: types.FunctionType) -> dict[str, Any]:
    held = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    own = {name: describe(cell.cell_contents) for name, cell in held if cell.cell_contents is not function}
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    code = hashlib.sha256(repr(_code(function.__code__, function.__doc__)).encode()).hexdigest()[:8]
    found: dict[str, Any] = {"function": f"{function.__module__}.{function.__qualname__}", "code": code}
    return {**found, **({"holds": own} if own else {}), **({"defaults": describe(defaults)} if defaults else {})}


def _code(code: types.CodeType, doc: str | None) -> tuple[Any, ...]:
    """What a function does, without its documentation and line numbers."""

    def constant(value: object) -> object:
        if isinstance(value, types.CodeType):
            return _code(value, None)
        return sorted(map(repr, value)) if isinstance(value, frozenset) else value

    constants = tuple(constant(value) for value in code.co_consts if doc is None or value != doc)
    return code.co_code.hex(), constants, code.co_names
