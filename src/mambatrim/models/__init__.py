"""The model zoo: names, and how a model is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.resources import as_file, files
from pathlib import Path

import torch

from ..names import lookup
from . import vim
from .checkpoint import load, read_state_dict, resolve
from .layers import cast
from .spec import CheckpointFile, ModelSpec, Preprocess

__all__ = ["MODELS", "CheckpointFile", "ModelSpec", "Preprocess", "create_model", "list_models"]

MODELS: dict[str, ModelSpec] = {**vim.VARIANTS}
_BUILD: dict[str, Callable[[ModelSpec], vim.Vim]] = {"vim": lambda spec: vim.Vim(spec.config, spec)}
# weights that lie in the package, by model
BUNDLED: dict[str, str] = {"vim_cifar10": "vim_cifar10.safetensors"}
_DTYPES = (torch.float32, torch.bfloat16)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo that match a shell pattern such as "vim*"."""
    return [name for name in MODELS if fnmatchcase(name, pattern)]


def create_model(
    name: str,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> vim.Vim:
    """A model of the zoo, in evaluation mode, with all its tokens.

    Args:
        name: one of `list_models()`.
        weights: a checkpoint file (official .pth, or .safetensors); a Hub id such as hustvl/Vim-small-midclstok,
        downloaded
            once; "bundled" for the weights that lie in the package; or None for random initial values.
        num_classes: width of the classifier; with weights it must be theirs.
        image_size: (height, width) that images are prepared for; position embeddings are resized as the model runs.
        dtype: torch.float32 or torch.bfloat16, of the matrix products; residual stream and scan state stay fp32.

    Raises:
        ValueError: unknown name, weights that are missing, damaged or of another model, or an argument that does not
        fit.
    """
    spec = lookup("model", name, MODELS)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    if num_classes is not None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        spec = replace(spec, config=replace(spec.config, num_classes=num_classes))
    if image_size is not None:
        spec = replace(spec, preprocess=replace(spec.preprocess, size=image_size))
    model = _BUILD[spec.family](spec)
    if weights == "bundled":
        file = lookup("model with bundled weights", name, BUNDLED)
        with as_file(files("mambatrim") / "assets" / file) as path:
            load(model, read_state_dict(path, spec=spec), spec)
    elif weights is not None:
        load(model, read_state_dict(resolve(weights, spec), spec=spec), spec)
    cast(model, dtype)
    return model.eval()
