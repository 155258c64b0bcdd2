"""Mamba-Reg (Mamba®, arXiv 2405.14858): Vim's blocks, with register tokens spread evenly over the sequence.

The registers have position embeddings of their own; at the end they are narrowed ("neck"), joined in their order, and
classified. State-dict keys are those of the official checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..reduction import Cost, Tokens
from .flat import FlatConfig, FlatMamba
from .layers import RMSNorm, join_rows, linear
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess


@dataclass(frozen=True)
class MambaRegConfig(FlatConfig):
    """Besides the common sizes: n registers, and the factor r by which each is narrowed for the classifier."""

    registers: int = 12
    narrow: int = 1

    def __post_init__(self) -> None:
        if self.registers < 1:
            raise ValueError(f"registers must be at least 1, got {self.registers}")
        if self.narrow < 1 or self.d_model % self.narrow:
            raise ValueError(f"narrow must be a divisor of the width {self.d_model}, got {self.narrow}")

    @property
    def special(self) -> int:
        return self.registers

    @property
    def features(self) -> int:
        return self.registers * (self.d_model // self.narrow)


class MambaReg(FlatMamba):
    """Mamba with registers: one after every M // (n + 1) patches, what is left of the patches last."""

    config: MambaRegConfig

    def __init__(self, config: MambaRegConfig, spec: ModelSpec | None = None) -> None:
        super().__init__(config, spec)
        self.pos_embed_cls = nn.Parameter(torch.zeros(1, config.registers, config.d_model))
        if config.narrow > 1:
            self.neck = nn.Linear(config.d_model, config.d_model // config.narrow, bias=False)
            self.norm_neck = RMSNorm(config.features)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        super().reset()
        nn.init.trunc_normal_(self.pos_embed_cls, std=0.02)
        if self.config.narrow > 1:
            nn.init.trunc_normal_(self.neck.weight, std=0.02)

    def special_at(self, patches: int) -> tuple[int, ...]:
        segment = patches // (self.config.registers + 1)
        return tuple((k + 1) * segment + k for k in range(self.config.registers))

    def table_rows(self, patches: int) -> tuple[int, ...]:
        """None: the registers have a table of their own."""
        return ()

    def positions(self, grid: tuple[int, ...]) -> Tensor:
        table = self.table(grid)  # (1, M, D)
        return join_rows(table, self.pos_embed_cls, self.special_at(table.shape[1]))

    def pool(self, tokens: Tokens) -> Tensor:
        """(B, n D / r): the registers in their order, each after the final norm, narrowed, and normalised together."""
        registers = super().pool(tokens)  # (B, n D)
        if self.config.narrow == 1:
            return registers
        narrowed = linear(self.neck, registers.unflatten(1, (self.config.registers, -1))).flatten(1)  # (B, n D / r)
        return self.norm_neck(narrowed, self.head.weight.dtype)

    def head_cost(self) -> Cost:
        narrowing = self.config.registers * self.neck.weight.numel() if self.config.narrow > 1 else 0
        return Cost(head=self.head.weight.numel() + narrowing)


def _entry(
    size: str, d_model: int, depth: int, registers: int, narrow: int, entries: int, parameters: int, top1: float | None
) -> ModelSpec:
    file = f"mambar_{size}_patch16_224.pth"
    published = CheckpointFile("Wangf3014/Mamba-Reg", file, "model", entries, parameters, top1)
    return ModelSpec(
        name=f"mambar_{size}",
        family="mamba_reg",
        config=MambaRegConfig(d_model=d_model, depth=depth, registers=registers, narrow=narrow),
        preprocess=Preprocess((224, 224), 1.0, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        checkpoint=published if top1 else None,
        licence="none stated",
        source="https://github.com/wangf3014/Mamba-Reg",
    )


VARIANTS: dict[str, ModelSpec] = {
    # the smallest is in the official code, and its weights were not published
    "mambar_tiny": _entry("tiny", 192, 24, 12, 1, 416, 9_264_232, None),
    "mambar_small": _entry("small", 384, 24, 12, 2, 418, 27_801_064, 81.4),
    "mambar_base": _entry("base", 768, 24, 12, 4, 418, 99_301_096, 83.0),
    "mambar_large": _entry("large", 1024, 48, 16, 8, 826, 341_222_376, 83.6),
}
