"""Parts of the flat families: the norm, the bidirectional mixer, the block, the patch embedding, position tables.

The dtype policy of a model stands here. The residual stream is fp32. `RMSNorm` computes in fp32 and returns the dtype
that the projections compute in. `A_log`, `D` and the step-size bias stay fp32 in `cast`; the scan keeps its time step
and state in fp32.

Letters as in kernels/reference.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .. import kernels
from ..kernels import embedding, reference
from ..reduction import Cost, Layout

EPS = 1e-5
# parameters of the scan itself, as the families name them
_OF_THE_SCAN = re.compile(r"A(_b)?_logs?(_\d)?|Ds?(_b|_\d)?|dt_projs_bias|direction_Bs")
# the parts of a mixer that belong to each direction
DIRECTIONS = (("conv1d", "x_proj", "dt_proj", "A_log", "D"), ("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b"))
# signals that the mixer has without giving up to run as one kernel
AT_ONCE = {"dt_mean", "hidden"}
Captured = dict[str, Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return kernels.rms_norm(x, self.weight, EPS, dtype)


class BiMambaMixer(nn.Module):
    """Two Mamba-1 scans over one projection, forward and backward, with parameters of their own ("bimamba v2" of Vim).

    out_proj(scale (scan(x) + scan_b(x)) silu(z)); scale 0.5 averages the directions (Vim, Mamba-Reg), 1 adds them
    (VideoMamba). Parameter names are those of the official checkpoints.

    Args:
        d_model: D. d_state: N. d_conv: K. expand: E = expand D. scale: factor on the sum of the directions.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, scale: float = 0.5) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank, self.scale = expand * d_model, d_state, math.ceil(d_model / 16), scale
        inner, rank = self.d_inner, self.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(rank, inner)
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        self.D_b = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Mamba's initial values (arXiv 2312.00752, section 3.6): A_n = -n, steps log-uniform in [0.001, 0.1]."""
        for dt_proj, A_log, D in ((self.dt_proj, self.A_log, self.D), (self.dt_proj_b, self.A_b_log, self.D_b)):
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            steps = torch.exp(torch.empty(self.d_inner).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
            dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
            A_log.copy_(torch.arange(1, self.d_state + 1).log().expand(self.d_inner, -1))
            D.fill_(1.0)

    def forward(
        self, x: Tensor, wanted: Sequence[str] = (), layout: Layout | None = None, norm: RMSNorm | None = None
    ) -> tuple[Tensor, Captured]:
        """mixer(x) of x (B, L, D); with a `norm` x + mixer(norm(x)) of x in fp32, which can run as one kernel.

        Also the signals that are `wanted` (reduction.SIGNALS), all tokens in token order. `layout` says what tokens of
        the stem the L rows stand for, where that matters.
        """
        parameters, seen_as = self.parameters_with(norm), over(layout)
        if norm is not None and AT_ONCE.issuperset(wanted):
            x, dt_mean = kernels.mix(x, [parameters], seen_as)
            captured = {"dt_mean": dt_mean} if "dt_mean" in wanted else {}
        else:
            steps = kernels.compose(x, parameters, seen_as)
            captured = _capture(wanted, steps)
            x = steps.update if norm is None else x + steps.update
        if "hidden" in wanted:
            captured["hidden"] = x
        return x, captured

    def parameters_with(self, norm: RMSNorm | None) -> kernels.Mixer:
        """What the kernels take."""
        if not torch.compiler.is_compiling():
            try:  # attributes of modules go a long way round, and a block asks for thirty
                return self._mixer(norm, self._modules, self._parameters, _parameters_of)
            except KeyError:  # what is made when it is asked for, as parametrized weights are
                pass
        own = _Attributes(self)
        return self._mixer(norm, own, own, _Attributes)

    def _mixer(self, norm: RMSNorm | None, parts: Any, own: Any, of: Callable[[Any], Any]) -> kernels.Mixer:
        """From its parts and parameters by name, and `of` what gives the parameters of a part."""
        lines: list[Tensor] = []
        for conv_name, x_proj, dt_name, A_log, D in DIRECTIONS:
            conv, dt_proj = of(parts[conv_name]), of(parts[dt_name])
            lines += (conv["weight"], _given(conv["bias"]), of(parts[x_proj])["weight"])
            lines += (dt_proj["weight"], dt_proj["bias"], own[A_log], own[D])
        in_proj, out_proj = of(parts["in_proj"])["weight"], of(parts["out_proj"])["weight"]
        scale = None if norm is None else of(norm)["weight"]
        return kernels.Mixer(scale, in_proj, out_proj, lines, (False, True), EPS, self.scale)

    def cost(self, length: int, convolved: int | None = None, scanned: int | None = None) -> Cost:
        """MACs for one image of `length` tokens, the scan as 9 E N L as in the literature.

        Args:
            convolved, scanned: positions that the convolution and the scan run over, where these are not the tokens.
        """
        inner, rank, taps = self.d_inner, self.dt_rank, self.conv1d.kernel_size[0]
        conv = taps * inner * length if convolved is None else kernels.virtual_conv_macs(convolved, inner, taps)
        scan = inner * (rank + 2 * self.d_state) * length
        scan += kernels.scan_macs(length, inner, self.d_state, rank, scanned)
        projections = self.in_proj.weight.numel() * length + self.out_proj.weight.numel() * length
        # counters of the papers convolve L + 3 positions
        return Cost(projections, conv, scan, directions=conv + scan, quirks=taps * inner * (taps - 1))


def over(layout: Layout | None) -> kernels.Over:
    """Factors on the time step, and the virtual sequences of the convolution and of the scan."""
    if layout is None:
        return kernels.AS_IT_STANDS
    convolved, scanned = (
        None if source is None else kernels.Virtual(source, layout.share)
        for source in (layout.convolved, layout.scanned)
    )
    return kernels.Over(layout.repeats, convolved, scanned)


def untouched(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a module is of one of these types and runs as it was made, with no hooks of anybody."""
    return type(module) in types and not watched(module)


def linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    """layer(rows), by our own product where nobody watches or replaced the layer: on few rows it has no set-up, and in
    bf16 it rounds no sum."""
    return kernels.project(rows[None], [layer.weight], layer.bias)[0] if untouched(layer, nn.Linear) else layer(rows)


def watched(module: nn.Module) -> bool:
    """Whether somebody has hooks on a module, or gave it another `forward`."""
    own: dict[str, Any] = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own or _module._has_any_global_hook()


_parameters_of = attrgetter("_parameters")


class _Attributes:
    """Attributes of a module as the entries of a dict."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getitem__(self, name: str) -> Any:
        return getattr(self._module, name)


def _given(bias: Tensor | None) -> Tensor:
    if bias is None:
        raise ValueError("the convolutions and patch embeddings of these models have a bias")
    return bias


def _capture(wanted: Sequence[str], steps: kernels.Steps) -> Captured:
    """Only what is asked for is computed; the mean of the time step is there anyway."""
    found: Captured = {"dt_mean": steps.dt_mean, "update": steps.update}
    if "dt" in wanted:
        sizes = [reference.step_size(d.dt, d.dt_bias, d.dt_weight, softplus=True) for d in steps.directions]
        found["dt"] = torch.stack(sizes, dim=1)  # (B, S, L, E)
    if "B" in wanted:
        found["B"] = torch.stack([d.B for d in steps.directions], dim=1)  # (B, S, L, N)
    if "C" in wanted:
        found["C"] = torch.stack([d.C for d in steps.directions], dim=1)
    if "y" in wanted or "y_gated" in wanted:
        scans = [kernels.scan(steps.u[s : s + 1], [d], log_A=True) for s, d in enumerate(steps.directions)]
        found["y"] = torch.stack([one.y for one in scans], dim=1)  # (B, S, L, E)
        found["y_gated"] = found["y"] * F.silu(steps.z)[:, None]  # (B, S, L, E)
    return {name: found[name] for name in wanted if name in found}


class Block(nn.Module):
    """x <- x + mixer(norm(x)): the pre-norm residual block, on one fp32 stream."""

    def __init__(self, d_model: int, mixer: BiMambaMixer) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = mixer

    def forward(self, x: Tensor, wanted: Sequence[str] = (), layout: Layout | None = None) -> tuple[Tensor, Captured]:
        """x (B, L, D) fp32 -> the same, and the `wanted` signals; `layout` as for the mixer."""
        return self.mixer(x, wanted, layout, self.norm)

    def cost(self, length: int, convolved: int | None = None, scanned: int | None = None) -> Cost:
        return self.mixer.cost(length, convolved, scanned)


class PatchEmbed(nn.Module):
    """A convolution that turns patches into tokens: (B, C, H, W) -> (B, M, D), row by row; videos frame by frame.

    Args:
        patch, stride: in pixels; or (frames, rows, columns) of a patch of a video, (B, C, T, H, W) -> (B, M, D).
    """

    def __init__(
        self, in_chans: int, d_model: int, patch: int | tuple[int, ...], stride: int | tuple[int, ...]
    ) -> None:
        super().__init__()
        self.patch = (patch, patch) if isinstance(patch, int) else patch
        self.stride = (stride, stride) if isinstance(stride, int) else stride
        convolution: Callable[..., nn.Conv2d | nn.Conv3d] = nn.Conv3d if len(self.patch) == 3 else nn.Conv2d
        self.proj = convolution(in_chans, d_model, kernel_size=self.patch, stride=self.stride)

    def reset(self) -> None:
        """Outputs of unit variance for inputs of unit variance."""
        nn.init.trunc_normal_(self.proj.weight, std=self.proj.weight[0].numel() ** -0.5)
        nn.init.zeros_(_given(self.proj.bias))

    def grid(self, *sides: int) -> tuple[int, ...]:
        """Patches along each of (height, width) or (frames, height, width); raises ValueError for less than one."""
        if len(sides) != len(self.patch) or any(side < one for side, one in zip(sides, self.patch, strict=True)):
            kind, unit = ("a video", "frames by pixels") if len(self.patch) == 3 else ("an image", "pixels")
            least, given = "x".join(map(str, self.patch)), "x".join(map(str, sides))
            raise ValueError(f"{kind} must have at least {least} {unit}, got {given}")
        return tuple((n - one) // step + 1 for n, one, step in zip(sides, self.patch, self.stride, strict=True))

    def sequence(self, images: Tensor, special: Tensor, at: Sequence[int], positions: Tensor) -> Tensor:
        """Patches of the images with special tokens (1, n, D) at the places `at`, and positions (1, L0, D) added to
        all: (B, L0, D) fp32."""
        weight, bias = self.proj.weight, _given(self.proj.bias)
        plain = untouched(self, PatchEmbed) and untouched(self.proj, nn.Conv2d, nn.Conv3d)
        if plain and self.stride == self.patch and embedding.takes(images, weight, bias, special, positions):
            return embedding.embed(images, weight, bias, special, at, positions)
        x = join_rows(self(images), special.expand(len(images), -1, -1), at) + positions
        return x.to(torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        weight, bias = self.proj.weight, _given(self.proj.bias)
        images = images.to(weight.dtype)
        if self.stride != self.patch:
            return self.proj(images).flatten(2).transpose(1, 2)
        # patches side by side: one matrix product, whose rows are the tokens
        sides, axes = self.grid(*images.shape[2:]), range(len(self.patch))
        for axis in axes:
            images = images.narrow(axis + 2, 0, sides[axis] * self.patch[axis])
        images = images.reshape(*images.shape[:2], *(n for pair in zip(sides, self.patch, strict=True) for n in pair))
        order = (0, *(2 + 2 * axis for axis in axes), 1, *(3 + 2 * axis for axis in axes))
        # (B, M, C patch)
        rows = images.permute(order).reshape(images.shape[0], math.prod(sides), weight[0].numel())
        return kernels.linear(rows, weight.flatten(1), bias)


def resize_positions(table: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Patch position embeddings (1, h w, D) for another grid: bicubic, corners not aligned. The same table for the
    same grid."""
    if old == new:
        return table
    image = table.reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    image = F.interpolate(image.to(torch.float32), size=new, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def resize_frames(table: Tensor, frames: int) -> Tensor:
    """Temporal position embeddings (1, t, D) for another number of frames: linear, ends not aligned. The same table
    for the same number."""
    if table.shape[1] == frames:
        return table
    line = table.transpose(1, 2).to(torch.float32)  # (1, D, t)
    line = F.interpolate(line, size=frames, mode="linear", align_corners=False)
    return line.transpose(1, 2).to(table.dtype)


def join_rows(patches: Tensor, special: Tensor, at: Sequence[int]) -> Tensor:
    """Put special tokens (B, n, D) between the patches (B, M, D), to the ascending positions `at` of (B, M + n, D)."""
    pieces, start = [], 0
    for k, position in enumerate(at):
        pieces += [patches[:, start : position - k], special[:, k : k + 1]]
        start = position - k
    return torch.cat([*pieces, patches[:, start:]], dim=1)


def split_rows(x: Tensor, at: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The inverse of `join_rows`: (B, M + n, D) -> (B, M, D), (B, n, D)."""
    if not at:
        return x, x[:, :0]
    ends = [*at, x.shape[1]]
    patches = [x[:, : at[0]], *(x[:, a + 1 : b] for a, b in pairwise(ends))]
    return torch.cat(patches, dim=1), torch.cat([x[:, a : a + 1] for a in at], dim=1)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Put projections and embeddings in `dtype`, in place; norms, A, D, step-size biases and 1-D convolution taps stay
    fp32."""
    for path, module in model.named_modules():
        if isinstance(module, RMSNorm | nn.LayerNorm | nn.BatchNorm2d):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            step_bias = name == "bias" and path.rpartition(".")[2].startswith("dt_proj")
            fp32 = step_bias or isinstance(module, nn.Conv1d) or _OF_THE_SCAN.fullmatch(name) is not None
            parameter.data = parameter.data.to(torch.float32 if fp32 else dtype)
