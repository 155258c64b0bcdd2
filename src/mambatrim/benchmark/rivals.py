"""What people would use instead: a plain vision transformer of the same size, and other ways to run the scan.

Weights are random: only the time counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import reference
from ..models.flat import FlatMamba
from ..models.layers import PatchEmbed

DEIT = {192: "DeiT-T", 384: "DeiT-S", 768: "DeiT-B"}  # widths of the sizes that have a name (arXiv 2012.12877)
HEAD = 64  # channels of an attention head, in all of them


# ------------------------------------------------------------------------------------------------- vision transformer


class _VitBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with PyTorch's fused attention."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model, eps=1e-6), nn.LayerNorm(d_model, eps=1e-6)
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind(0))  # (B, heads, L, D / heads)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainVit(nn.Module):
    """A vision transformer as in DeiT: patches, a class token in front, pre-norm blocks, a head on the class token.

    Args:
        embed: the patch embedding whose patches it takes, so that it sees as many tokens.
        patches: how many that makes.
        d_model: D. depth: blocks. num_classes: width of the head.
    """

    def __init__(self, embed: PatchEmbed, patches: int, d_model: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(embed.proj.in_channels, d_model, embed.patch, embed.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, d_model))
        self.blocks = nn.Sequential(*(_VitBlock(d_model, max(1, d_model // HEAD)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d_model, eps=1e-6), nn.Linear(d_model, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x)[:, 0]))


@dataclass(frozen=True)
class Rival:
    """A model to compare with, the dtype that it takes, its tokens in every block, its multiply-adds for one image."""

    name: str
    model: nn.Module
    dtype: torch.dtype
    tokens: tuple[int, ...]
    macs: int

    def run(self, images: Tensor) -> Tensor:
        """Logits of images (B, C, H, W) of any dtype."""
        return self.model(images.to(self.dtype))


def rivals(model: nn.Module, image_size: Any, dtype: torch.dtype, device: torch.device) -> list[Rival]:
    """Transformers of the width of a flat model and half as many blocks, which is the size of DeiT for Vim.

    The plain one is always there; timm's where timm is installed and has that size, and the plain one as Intel's
    extension optimises it, where that is installed. Models that are not flat have no rival here.
    """
    if not isinstance(model, FlatMamba):
        return []
    width, depth, patches = model.d_model, model.depth // 2, model.num_patches(image_size)
    plain = PlainVit(model.patch_embed, patches, width, depth, model.config.num_classes).eval().to(device, dtype)
    tokens = patches + 1
    macs = depth * (12 * width**2 * tokens + 2 * width * tokens**2) + plain.head.weight.numel()
    macs += patches * plain.patch_embed.proj.weight.numel()
    name = DEIT[width] if depth == 12 and width in DEIT else f"ViT {width} x {depth}"

    def rival(suffix: str, other: nn.Module) -> Rival:
        return Rival(name + suffix, other, dtype, (tokens,) * depth, macs)

    found = [rival("", plain)]
    if find_spec("timm") is not None and name in DEIT.values() and len(model.sides(image_size)) == 2:
        size = {"T": "tiny", "S": "small", "B": "base"}[name[-1]]
        other = import_module("timm").create_model(
            f"deit_{size}_patch{model.config.patch}_224",
            img_size=model.sides(image_size),
            num_classes=model.config.num_classes,
        )
        found.append(rival(" (timm)", other.eval().to(device, dtype)))
    if find_spec("intel_extension_for_pytorch") is not None and device.type == "cpu":
        optimised = import_module("intel_extension_for_pytorch").optimize(plain, dtype=dtype)
        found.append(rival(" (Intel's extension)", optimised))
    return found


# --------------------------------------------------------------------------------------------------------------- scan


def scan_arguments(
    batch: int,
    length: int,
    channels: int,
    states: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Random arguments of one direction with full step sizes: softplus, D and gate included. A, D and dt_bias are fp32
    whatever the dtype."""
    values = {
        "u": torch.randn(batch, length, channels).to(dtype),
        "dt": torch.randn(batch, length, channels).to(dtype),
        "A": -torch.rand(channels, states) * 16,
        "B": torch.randn(batch, length, states).to(dtype),
        "C": torch.randn(batch, length, states).to(dtype),
        "D": torch.randn(channels),
        "z": torch.randn(batch, length, channels).to(dtype),
        "dt_bias": torch.randn(channels) - 4,
    }
    return {name: value.to(device) for name, value in values.items()}


def loop_scan(**arguments: Any) -> Tensor:
    """The definition: a lean loop over tokens."""
    return reference.selective_scan(**arguments)[0]


def mambapy_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """mambapy's parallel scan, composed as in its Mamba block."""
    dt = F.softplus(dt + dt_bias)
    decay = torch.exp(dt[..., None] * A)  # (B, L, E, N)
    inputs = dt[..., None] * B[:, :, None, :] * u[..., None]
    states = import_module("mambapy.pscan").pscan(decay, inputs)
    y = (states @ C[..., None]).squeeze(3) + D * u
    return y * F.silu(z)


def mamba_ssm_scan() -> Callable[..., Tensor] | None:
    """The CUDA kernel of mamba_ssm, of `mamba_ssm_arguments`; None where that is not installed."""
    try:
        interface, extension = map(import_module, ("mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda"))
    except ImportError:
        return None
    # the stand-ins of mambatrim.compat are no extensions
    if not (getattr(extension, "__file__", None) or "").endswith((".so", ".pyd")):
        return None
    return partial(interface.selective_scan_fn, delta_softplus=True)


def mamba_ssm_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same as mamba_ssm takes it: channels before tokens, (B, E, L), contiguous."""
    names = {"dt": "delta", "dt_bias": "delta_bias"}
    return {
        names.get(name, name): value.transpose(1, 2).contiguous() if value.dim() == 3 else value
        for name, value in arguments.items()
    }


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


def scans() -> dict[str, Callable[..., Tensor]]:
    """Other ways to run the scan, by name; mambapy's where it is installed."""
    known: dict[str, Callable[..., Tensor]] = {"reference loop": loop_scan, "materialised loop": materialised_scan}
    return known | ({"mambapy": mambapy_scan} if find_spec("mambapy") is not None else {})
