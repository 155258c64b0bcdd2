"""The model zoo: names, and how a model is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..names import lookup
from . import localvim, localvmamba, mamba_reg, mambavision, plainmamba, videomamba, vim, vmamba
from .checkpoint import load, read_state_dict, resolve
from .flat import FlatMamba
from .grid import GridModel
from .layers import cast
from .spec import CheckpointFile, ModelSpec, Preprocess

__all__ = [
    "BUNDLED",
    "CONFIGS",
    "MODELS",
    "CheckpointFile",
    "Model",
    "ModelSpec",
    "Preprocess",
    "build",
    "create_model",
    "list_models",
]

# flat models lose tokens for good; grid models have them all again behind a section
Model = FlatMamba | GridModel

MODELS: dict[str, ModelSpec] = {
    **vim.VARIANTS,
    **videomamba.VARIANTS,
    **mamba_reg.VARIANTS,
    **localvim.VARIANTS,
    **plainmamba.VARIANTS,
    **vmamba.VARIANTS,
    **localvmamba.VARIANTS,
    **mambavision.VARIANTS,
}
_BUILD: dict[str, Callable[[ModelSpec], Model]] = {
    "vim": lambda spec: vim.Vim(spec.config, spec),
    "videomamba": lambda spec: videomamba.VideoMamba(spec.config, spec),
    "mamba_reg": lambda spec: mamba_reg.MambaReg(spec.config, spec),
    "local_vim": lambda spec: localvim.LocalVim(spec.config, spec),
    "plain_mamba": lambda spec: plainmamba.PlainMamba(spec.config, spec),
    "vmamba": lambda spec: vmamba.VMamba(spec.config, spec),
    "local_vmamba": lambda spec: localvmamba.LocalVMamba(spec.config, spec),
    "mambavision": lambda spec: mambavision.MambaVision(spec.config, spec),
}
# the record that describes the sizes of a family's models
CONFIGS: dict[str, type] = {spec.family: type(spec.config) for spec in MODELS.values()}
# families whose published files do not all have the names and shapes of the model
_CONVERT: dict[str, Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]] = {
    "videomamba": videomamba.convert,
    "vmamba": vmamba.convert,
    "mambavision": mambavision.convert,
}
# weights that lie in the package, by model
BUNDLED: dict[str, str] = {"vim_cifar10": "vim_cifar10.safetensors"}
_DTYPES = (torch.float32, torch.bfloat16)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo that match a shell pattern such as "vim*"."""
    return [name for name in MODELS if fnmatchcase(name, pattern)]


def build(spec: ModelSpec) -> Model:
    """A model with random weights from a description, which need not be in the zoo.

    Raises:
        ValueError: unknown family, or a configuration of another one.
    """
    make = lookup("family", spec.family, _BUILD)
    if type(spec.config) is not CONFIGS[spec.family]:
        wanted = CONFIGS[spec.family].__name__
        raise ValueError(f"the config of the family {spec.family} is a {wanted}, not a {type(spec.config).__name__}")
    return make(spec)


def create_model(
    name: str,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    in_chans: int | None = None,
    *,
    img_size: int | tuple[int, ...] | None = None,
) -> Model:
    """A model of the zoo, in evaluation mode, with all its tokens.

    Args:
        name: one of `list_models()`.
        weights: a checkpoint file (official .pth, or .safetensors); a Hub id such as hustvl/Vim-small-midclstok,
            downloaded once; "bundled" for the weights that lie in the package; or None for random initial values.
        num_classes: width of the classifier; with weights it must be theirs.
        image_size: another input size for good: a side, (height, width), or (frames, height, width) of a video.
            Position tables are resized, unless the weights have that size already.
        dtype: torch.float32 or torch.bfloat16, of the matrix products; residual stream and scan state stay fp32.
        in_chans: channels of the images, 3 by default; with weights it must be theirs.
        img_size: the same as image_size, by the name that it has in timm; here only, where people bring timm's words.

    Raises:
        ValueError: unknown name, weights that are missing, damaged or of another model, or an argument that does not
            fit.
    """
    spec = lookup("model", name, MODELS)
    if img_size is not None:
        if image_size is not None:
            raise ValueError(f"img_size is another word for image_size: give one of them, got {img_size}, {image_size}")
        image_size = img_size
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    for field, value in (("num_classes", num_classes), ("in_chans", in_chans)):
        if value is not None:
            if value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
            spec = replace(spec, config=replace(spec.config, **{field: value}))
    model = build(spec)
    state = None if weights is None else _read(weights, spec)
    if image_size is not None and (state is None or not _has_tables_of(state, model)):
        model.resize(image_size)
    if state is not None:
        load(model, state, spec)
    if image_size is not None:
        model.resize(image_size)
        preprocess = replace(spec.preprocess, size=model.config.image_size)
        model.spec = replace(spec, config=model.config, preprocess=preprocess)
    cast(model, dtype)
    return model.eval()


def _read(weights: str | Path, spec: ModelSpec) -> Mapping[str, Tensor]:
    """The tensors that `weights` names, under the model's names."""
    if weights == "bundled":
        file = lookup("model with bundled weights", spec.name, BUNDLED)
        with as_file(files("mambatrim") / "assets" / file) as path:
            state = read_state_dict(path, spec=spec)
    else:
        state = read_state_dict(resolve(weights, spec), spec=spec)
    convert = _CONVERT.get(spec.family)
    return state if convert is None else convert(state, spec.config)


def _has_tables_of(state: Mapping[str, Tensor], model: Model) -> bool:
    """Whether position tables have the shapes that the model has now."""
    own = model.state_dict()
    return all(own[name].shape == state[name].shape for name in own if "pos_embed" in name and name in state)
