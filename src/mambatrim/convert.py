"""convert: a Vim, VideoMamba or Mamba-Reg of the official code, or its weights, as a model of this library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .models import MODELS, ModelSpec, mamba_reg, videomamba, vim
from .models.checkpoint import PREFIXES, WRAPPERS, detect_family, load
from .models.flat import FlatConfig, FlatMamba, ImageSize
from .names import lookup

# largest difference of logits that passes, as a share of the largest logit: in fp32, and in less
EXACT, ROUNDED = 1e-4, 0.05


@dataclass(frozen=True)
class _Family:
    """config: (weights, common sizes by name) -> its record. model: its class. entry: what is known of its images."""

    config: Callable[[Mapping[str, Tensor], dict[str, Any]], FlatConfig]
    model: Callable[[Any, ModelSpec], FlatMamba]
    entry: ModelSpec


def _videomamba(state: Mapping[str, Tensor], sizes: dict[str, Any]) -> FlatConfig:
    kernel, times = state["patch_embed.proj.weight"], state.get("temporal_pos_embedding")
    if times is None:
        return videomamba.VideoMambaConfig(**sizes)
    tubelet = kernel.shape[2]
    return videomamba.VideoMambaConfig(**sizes, frames=times.shape[1] * tubelet, tubelet=tubelet)


def _mamba_reg(state: Mapping[str, Tensor], sizes: dict[str, Any]) -> FlatConfig:
    neck = state.get("neck.weight")
    narrow = 1 if neck is None else neck.shape[1] // neck.shape[0]
    return mamba_reg.MambaRegConfig(**sizes, registers=state["cls_token"].shape[1], narrow=narrow)


_FAMILIES: dict[str, _Family] = {
    "vim": _Family(lambda state, sizes: vim.VimConfig(**sizes), vim.Vim, MODELS["vim_tiny"]),
    "videomamba": _Family(_videomamba, videomamba.VideoMamba, MODELS["videomamba_tiny"]),
    "mamba_reg": _Family(_mamba_reg, mamba_reg.MambaReg, MODELS["mambar_tiny"]),
}


def convert(
    source: nn.Module | Mapping[str, Any],
    family: str | None = None,
    image_size: ImageSize = None,
    check: bool = True,
) -> FlatMamba:
    """A model of this library with the weights of an official one, in evaluation mode, with weights of its own.

    All sizes are read off the shapes. Keys do not tell Vim (which averages its two directions) from an image model of
    VideoMamba (which adds them); a comparison of logits does, if the official model can run.

    Args:
        source: an instance of the official Vim, VideoMamba or Mamba-Reg class, or its state dict, also inside a
            checkpoint under "model", "module" or "state_dict". Files are read by `create_model` (or `torch.load`).
        family: "vim", "videomamba" or "mamba_reg"; None reads it off the keys where they tell.
        image_size: side, or (height, width), of the input that the position table is for: needed where it is not
            square, and where a state dict is of a model whose patches overlap (else they are taken side by side).
        check: compare the logits of both models on random images, where the source is a module.

    Raises:
        ValueError: the family is not known or not clear; an entry is missing, too many, or of another shape; the
            logits differ; or the module cannot run (then `check=False` converts it unseen).
    """
    state = _weights(source)
    name = _family(state, family)
    entry = _FAMILIES[name]
    config = entry.config(state, _sizes(state, source, image_size, special=name != "mamba_reg"))
    preprocess = replace(entry.entry.preprocess, size=config.image_size)
    spec = replace(
        entry.entry, name=f"converted {name}", config=config, preprocess=preprocess, checkpoint=None, licence="its own"
    )
    model = entry.model(config, spec).eval()
    load(model, state, spec)
    model.to(state["head.weight"].device)
    if check and isinstance(source, nn.Module):
        _compare(source, model)
    return model


def _weights(source: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by name, without wrappers."""
    content: Any = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(content, Mapping):
        raise ValueError(f"convert takes a module or its state dict, got a {type(source).__name__}")
    inside = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    state = {}
    for key, value in inside.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"entry {key!r} of the weights is of type {type(value).__name__}, not a tensor")
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        state[key] = value.detach()
    return state


def _family(state: Mapping[str, Tensor], named: str | None) -> str:
    """The family that is named, or the only one that the keys allow."""
    found = detect_family(state)
    if named is not None:
        lookup("family to convert", named, _FAMILIES)
        if named not in found:
            like = " or ".join(found) or "no family known here"
            raise ValueError(f"by their names the weights are of {like}, not of {named}")
        return named
    if len(found) > 1:
        raise ValueError(f"the names of the weights do not tell {' from '.join(found)}: say which with family=")
    if not found or found[0] not in _FAMILIES:
        like = found[0] if found else "no family known here"
        raise ValueError(f"by their names the weights are of {like}; what can be converted: {', '.join(_FAMILIES)}")
    return found[0]


def _sizes(
    state: Mapping[str, Tensor], source: nn.Module | Mapping[str, Any], image_size: ImageSize, special: bool
) -> dict[str, Any]:
    """The fields that all configurations share; `special`: whether the position table has a row for a class token."""
    for needed in ("patch_embed.proj.weight", "pos_embed", "norm_f.weight", "head.weight", "layers.0.mixer.A_log"):
        if needed not in state:
            raise ValueError(f"{needed} is missing from the weights, so that sizes cannot be read off them")
    kernel, patches = state["patch_embed.proj.weight"], state["pos_embed"].shape[1] - special
    patch = kernel.shape[-1]
    if kernel.shape[-2] != patch:
        raise ValueError(f"patches must be square, got {kernel.shape[-2]}x{patch}")
    stride = _stride(source)
    if image_size is None:
        side = math.isqrt(patches)
        if side**2 != patches:
            raise ValueError(f"a position table of {patches} patches is not that of a square image: give image_size=")
        size = ((side - 1) * (stride or patch) + patch,) * 2
    else:
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        size = sides[-2], sides[-1]
    strides = (stride,) if stride else range(patch, 0, -1)
    fits = [s for s in strides if math.prod(max(0, (n - patch) // s + 1) for n in size) == patches]
    if not fits:
        raise ValueError(f"an image of {size[0]}x{size[1]} pixels does not make the {patches} patches of the weights")
    return {
        "image_size": size,
        "patch": patch,
        "stride": fits[0],
        "d_model": state["norm_f.weight"].shape[0],
        "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers.")),
        "d_state": state["layers.0.mixer.A_log"].shape[1],
        "num_classes": state["head.weight"].shape[0],
        "in_chans": kernel.shape[1],
    }


def _stride(source: object) -> int | None:
    """Of the patches, where the source is a module and says it."""
    stem = getattr(source, "patch_embed", None)
    return (
        stem.proj.stride[-1] if isinstance(stem, nn.Module) and isinstance(stem.proj, nn.Conv2d | nn.Conv3d) else None
    )


# ---------------------------------------------------------------------------------------------------------------- check


@torch.no_grad()
def _compare(source: nn.Module, model: FlatMamba) -> None:
    """Raise ValueError where logits on two random images differ by more than rounding."""
    weight = next(iter(source.parameters()))
    shape = (2, model.config.in_chans, *model.config.sides)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(weight.device) * 2 - 1
    own = model(images)
    with _evaluating(source):
        try:
            theirs = source(images.to(weight.dtype))
        except (RuntimeError, ImportError, TypeError, ValueError, AttributeError, NameError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{type(source).__name__} could not run, so that logits were not compared ({reason}); without CUDA, "
                "import it after mambatrim.compat.install(), or convert it with check=False"
            ) from error
    if not isinstance(theirs, Tensor) or theirs.shape != own.shape:
        raise ValueError(
            f"{type(source).__name__} was to return logits {tuple(own.shape)}; convert it with check=False"
        )
    difference, largest = (theirs.to(own.dtype) - own).abs().max().item(), own.abs().max().item()
    allowed = EXACT if weight.dtype == torch.float32 else ROUNDED
    if not difference <= allowed * largest:
        raise ValueError(
            f"the converted {type(model).__name__} computes other logits than the given {type(source).__name__}: they "
            f"differ by {difference:.2g}, and the largest is {largest:.2g}; an option is not that of the published "
            "models, or the family is another one"
        )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
