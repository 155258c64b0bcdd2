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
# the class names, parameters and forwards of NVlabs/MambaVision and of its code on the Hub


class ConvBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim)
        self.conv2, self.norm2 = nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)), approximate="tanh")))


class MambaVisionMixer(nn.Module):
    """Half of the channels are scanned, both halves convolved around their middle, and joined."""

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

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
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


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.LayerNorm(dim), mixer, nn.LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Downsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x)


class MambaVisionLayer(nn.Module):
    """A stage (B, C, H, W): convolutions, or blocks on padded windows; on the Hub it also returns its last map."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, conv: bool, last: bool, hub: bool) -> None:
        super().__init__()
        mixed = (MambaVisionMixer(dim) if i < -(-depth // 2) else Attention(dim, heads) for i in range(depth))
        blocks = (ConvBlock(dim) for _ in range(depth)) if conv else (Block(dim, mixer) for mixer in mixed)
        self.blocks, self.window_size, self.conv, self.hub = nn.ModuleList(blocks), window, conv, hub
        self.downsample = None if last else Downsample(dim)

    def run(self, x: Tensor) -> Tensor:
        """The blocks on what each of them sees."""
        for block in self.blocks:
            x = block(x)
        return x

    def windows(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same after `run` on (B windows, side side, C)."""
        (batch, dim, height, width), s = x.shape, self.window_size
        x = F.pad(x, (0, -width % s, 0, -height % s))
        rows, columns = x.shape[2] // s, x.shape[3] // s
        x = x.reshape(batch, dim, rows, s, columns, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, dim)
        x = self.run(x).reshape(batch, rows, columns, s, s, dim).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, dim, rows * s, columns * s)[:, :, :height, :width]

    def forward(self, x: Tensor):
        x = self.run(x) if self.conv else self.windows(x)
        down = x if self.downsample is None else self.downsample(x)
        return (down, x) if self.hub else down


class MambaVision(nn.Module):
    """Two stages of convolutions and two of windows, of the sizes of the golden file."""

    def __init__(self, hub: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.conv_down = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, eps=1e-4), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, eps=1e-4), nn.ReLU()),
        )
        sizes = zip((1, 2, 4, 2), (8, 8, 4, 2), strict=True)
        self.levels = nn.ModuleList(
            MambaVisionLayer(8 * 2**i, depth, 2**i, window, i < 2, i == 3, hub)
            for i, (depth, window) in enumerate(sizes)
        )
        self.norm, self.avgpool, self.head = nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for level in self.levels:
            x = level(x)
            x = x[0] if level.hub else x
        return self.head(self.avgpool(self.norm(x)).flatten(1))


class MambaVisionModelForImageClassification(nn.Module):
    """The outermost class of the code on the Hub."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MambaVision(hub=True)

    def forward(self, tensor: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(tensor)}
