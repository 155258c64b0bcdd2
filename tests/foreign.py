"""Test-only stand-ins of other people's models: the interfaces of their classes, with little inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambatrim.compat.mamba import Mamba
from mambatrim.compat.norm import RMSNorm, rms_norm_fn
from mambatrim.compat.scan import selective_scan_fn


class TwoStreamBlock(nn.Module):
    """Block(hidden, residual) -> (hidden, residual) of Vim, VideoMamba and Mamba-Reg: add, norm, mixer."""

    def __init__(self, mixer: nn.Module, d_model: int) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, RMSNorm(d_model, eps=1e-5)

    def forward(self, hidden: Tensor, residual: Tensor | None = None, inference_params=None):
        hidden, residual = rms_norm_fn(
            hidden, self.norm.weight, None, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True
        )
        return self.mixer(hidden, inference_params=inference_params), residual


class PatchEmbed(nn.Module):
    def __init__(self, d_model: int, patch: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, d_model, patch, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class OfficialVim(nn.Module):
    """The official Vim class as its published models use it: class token in the middle or at the head, or a mean.

    `divide=False, place="first"` makes an image model of VideoMamba of it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch: int = 8,
        stride: int = 8,
        d_model: int = 32,
        depth: int = 6,
        d_state: int = 4,
        num_classes: int = 10,
        divide: bool = True,
        place: str = "middle",
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        patches = ((height - patch) // stride + 1) * ((width - patch) // stride + 1)
        self.if_cls_token, self.use_middle_cls_token = place != "none", place == "middle"
        self.use_double_cls_token = self.if_rope = self.if_bidirectional = False
        self.patch_embed = PatchEmbed(d_model, patch, stride)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.randn(1, patches + self.if_cls_token, d_model))
        mixers = (Mamba(d_model, d_state, bimamba_type="v2", if_divide_out=divide) for _ in range(depth))
        self.layers = nn.ModuleList(TwoStreamBlock(mixer, d_model) for mixer in mixers)
        self.norm_f = RMSNorm(d_model, eps=1e-5)
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        at = x.shape[1] // 2 if self.use_middle_cls_token else 0
        if self.if_cls_token:
            x = torch.cat([x[:, :at], self.cls_token.expand(len(x), -1, -1), x[:, at:]], dim=1)
        hidden, residual = x + self.pos_embed, None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        x = rms_norm_fn(hidden, self.norm_f.weight, None, residual=residual, eps=1e-5)
        return self.head(x[:, at] if self.if_cls_token else x.mean(dim=1))


class Classifier(nn.Module):
    """A trunk of plain Mamba blocks as an image classifier with a class token in the middle."""

    def __init__(self, trunk: nn.Module, blocks: nn.ModuleList, norm: nn.Module, d_model: int) -> None:
        super().__init__()
        self.patch_embed, self.trunk, self.head = PatchEmbed(d_model, 8, 8), trunk, nn.Linear(d_model, 10)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, d_model))
        self.parts = (blocks, norm)  # in a tuple: they are not registered twice

    def embed(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        middle = x.shape[1] // 2
        return torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1), x[:, middle:]], dim=1) + self.pos_embed

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        x = self.run(self.embed(images))
        return self.head(x[:, (x.shape[1] - 1) // 2])


# ---------------------------------------------------------------------------------------------------------- MambaVision


class VisionMixer(nn.Module):
    """MambaVisionMixer: half of the channels are scanned, both halves convolved around their middle, and joined."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half, rank = dim // 2, -(-dim // 16)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.x_proj = nn.Linear(half, rank + 16, bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log, self.D = nn.Parameter(torch.zeros(half, 8)), nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 3, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, groups=half, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x, z = (
            F.silu(F.conv1d(part, conv.weight, None, padding="same", groups=conv.groups))
            for part, conv in ((x, self.conv1d_x), (z, self.conv1d_z))
        )
        rank = self.dt_proj.weight.shape[1]
        dt, B, C = self.x_proj(x.transpose(1, 2)).transpose(1, 2).split([rank, 8, 8], dim=1)
        dt = self.dt_proj(dt.transpose(1, 2)).transpose(1, 2)
        A = -torch.exp(self.A_log)
        y = selective_scan_fn(x, dt, A, B, C, self.D, delta_bias=self.dt_proj.bias, delta_softplus=True)
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))


class VisionAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.LayerNorm(dim), mixer, nn.LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionStage(nn.Module):
    """A stage of MambaVision with windows: (B, C, H, W) -> blocks on (B windows, side side, C) -> (B, C, H, W)."""

    def __init__(self, dim: int, depth: int, heads: int, side: int) -> None:
        super().__init__()
        scanned = -(-depth // 2)
        self.side = side
        self.blocks = nn.ModuleList(
            VisionBlock(dim, VisionMixer(dim) if i < scanned else VisionAttention(dim, heads)) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        s, rows, columns = self.side, height // self.side, width // self.side
        x = x.reshape(batch, dim, rows, s, columns, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, dim)
        for block in self.blocks:
            x = block(x)
        x = x.reshape(batch, rows, columns, s, s, dim).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, dim, height, width)


class VisionStages(nn.Module):
    """The two stages of MambaVision that scan, and the convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([VisionStage(32, 4, 4, 4), VisionStage(64, 2, 8, 2)])
        self.downsample = nn.Conv2d(32, 64, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.levels[1](self.downsample(self.levels[0](x)))
