"""Blocks of MambaVision: stem, convolutions, Mamba mixer, attention, the way down to the next stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels import reference
from ..reduction import Cost
from .grid import BatchNorm2d, Conv2d, LayerNorm, Mlp, capture, linear, reset_scan, total
from .layers import Captured

# the same in every published size
_STATES, _TAPS, _MLP_RATIO = 8, 3, 4


class Stem(nn.Module):
    """Two convolutions of stride 2: (B, C, H, W) -> (B, D, H/4, W/4), rounded up."""

    def __init__(self, in_chans: int, inner: int, d_model: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            Conv2d(in_chans, inner, 3, 2, 1, bias=False),
            BatchNorm2d(inner, eps=1e-4),
            nn.ReLU(),
            Conv2d(inner, d_model, 3, 2, 1, bias=False),
            BatchNorm2d(d_model, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.conv_down(images)


class ConvBlock(nn.Module):
    """x + norm2(conv2(gelu(norm1(conv1(x))))), the GELU in its tanh form."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(d_model, d_model, 3, 1, 1)
        self.norm1 = BatchNorm2d(d_model)
        self.conv2 = Conv2d(d_model, d_model, 3, 1, 1)
        self.norm2 = BatchNorm2d(d_model)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        return x + self.norm2(self.conv2(hidden))

    def cost(self, length: int) -> Cost:
        return Cost(stem=(self.conv1.weight.numel() + self.conv2.weight.numel()) * length)


class MambaVisionMixer(nn.Module):
    """One forward scan over half of the channels, beside the other half: out_proj of both, without a product."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        half, self.dt_rank = d_model // 2, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, _TAPS, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, _TAPS, groups=half, bias=False)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * _STATES, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, half)
        self.A_log = nn.Parameter(torch.empty(half, _STATES))
        self.D = nn.Parameter(torch.empty(half))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset()

    def reset(self) -> None:
        """Initial values of the scan."""
        reset_scan(self.A_log, self.D, self.dt_proj.weight, self.dt_proj.bias)

    def forward(self, x: Tensor, sizes: Tensor | None, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) -> (B, L, D), and the signals that are `wanted`; of the sizes of tokens a scan knows nothing.

        There is no gate, so "y_gated" is "y".
        """
        u, z = kernels.linear(x, self.in_proj.weight).chunk(2, dim=-1)  # (B, L, E) each, E = D / 2
        u, z = _convolve(u, self.conv1d_x.weight), _convolve(z, self.conv1d_z.weight)
        dt, B, C = kernels.linear(u, self.x_proj.weight).split([self.dt_rank, _STATES, _STATES], dim=-1)
        # the official code adds the bias once in dt_proj and once more in the scan
        bias = 2 * self.dt_proj.bias
        direction = kernels.Direction(dt, -torch.exp(self.A_log), B, C, self.D, bias, self.dt_proj.weight)
        scanned = kernels.scan(u[None], [direction])
        update = kernels.linear(torch.cat([scanned.y, z], dim=-1), self.out_proj.weight)
        signals = {
            "update": lambda: update,
            "dt": lambda: reference.step_size(dt, bias, self.dt_proj.weight, softplus=True)[:, None],  # (B, 1, L, E)
            "dt_mean": lambda: scanned.dt_mean,
            "B": lambda: B[:, None],
            "C": lambda: C[:, None],
            "y": lambda: scanned.y[:, None],
            "y_gated": lambda: scanned.y[:, None],
        }
        return update, capture(wanted, signals)

    def cost(self, length: int) -> Cost:
        """MACs of one window of `length` tokens."""
        half = self.D.numel()
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        # without the gate that `scan_macs` counts
        scan = half * (2 * _STATES + self.dt_rank - 1) * length
        scan += kernels.scan_macs(length, half, _STATES, self.dt_rank)
        return Cost(projections * length, conv=2 * _TAPS * half * length, scan=scan)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise and not causal, then SiLU: x (B, L, E), weight (E, 1, K) -> (B, L, E)."""
    taps = weight.to(x.dtype)
    return F.silu(F.conv1d(x.transpose(1, 2), taps, padding="same", groups=len(taps))).transpose(1, 2)


class Attention(nn.Module):
    """Softmax attention among the tokens of a window."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"the number of heads must divide the width {d_model}, got {heads}")
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, sizes: Tensor | None, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) -> (B, L, D), and the update where it is `wanted`: attention has no time step.

        `sizes` (B, 1, 1, L), logarithms added to the logits, make a merged token count as often as it stands for one
        ("proportional attention" of ToMe, arXiv 2210.09461, section 3).
        """
        parts = linear(x, self.qkv).unflatten(2, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, .) each
        bias = None if sizes is None else sizes.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        update = linear(mixed, self.proj)
        return update, capture(wanted, {"update": lambda: update})

    def cost(self, length: int) -> Cost:
        """MACs of one window of `length` tokens."""
        products = 2 * self.proj.in_features * length * length
        linear = (self.qkv.weight.numel() + self.proj.weight.numel()) * length
        # the published counts have the projections and not the products of tokens with tokens
        return Cost(linear + products, quirks=-products)


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)); what is added may be scaled channel by channel."""

    def __init__(self, d_model: int, mixer: MambaVisionMixer | Attention, layer_scale: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(d_model), LayerNorm(d_model)
        self.mixer = mixer
        self.mlp = Mlp(d_model, _MLP_RATIO)
        self.gamma_1 = nn.Parameter(torch.full((d_model,), 1e-5)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((d_model,), 1e-5)) if layer_scale else None

    def forward(self, x: Tensor, sizes: Tensor | None, wanted: Sequence[str] = ()) -> tuple[Tensor, Captured]:
        """x (B, L, D) fp32, `sizes` as in `Attention` -> the same, and the `wanted` signals of the mixer."""
        dtype = self.mlp.fc1.weight.dtype
        update, captured = self.mixer(self.norm1(x, dtype), sizes, wanted)
        x = x + _scaled(update, self.gamma_1)
        x = x + _scaled(self.mlp(self.norm2(x, dtype)), self.gamma_2)
        return x, captured | capture(wanted, {"hidden": lambda: x})

    def cost(self, length: int, windows: int) -> Cost:
        """MACs of `windows` windows of `length` tokens."""
        one = self.mixer.cost(length) + Cost(self.mlp.macs() * length)
        return total([one] * windows)


def _scaled(update: Tensor, gamma: Tensor | None) -> Tensor:
    return update if gamma is None else gamma * update


class Downsample(nn.Module):
    """A bare convolution of stride 2: (B, D, H, W) -> (B, 2 D, H/2, W/2), rounded up."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(Conv2d(d_model, 2 * d_model, 3, 2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)
