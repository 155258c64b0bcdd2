"""Vim (Vision Mamba, arXiv 2401.09417): bidirectional Mamba blocks, a class token in the middle of the sequence.

Keys of the state dict are those of the official checkpoints; the two-stream blocks of the official code are one fp32
stream here (the adds are the same). The architecture: patch embedding, class token inserted at M // 2 before the
position embedding is added, blocks, norm of the class token, linear head.
"""

from __future__ import annotations

from dataclasses import dataclass

from .flat import FlatConfig, FlatMamba
from .spec import IMAGENET_MEAN, IMAGENET_STD, CheckpointFile, ModelSpec, Preprocess


@dataclass(frozen=True)
class VimConfig(FlatConfig):
    """The common sizes, and nothing else."""


class Vim(FlatMamba):
    """Vision Mamba: the class token stands in the middle, and the directions are averaged."""

    def __init__(self, config: VimConfig, spec: ModelSpec | None = None) -> None:
        super().__init__(config, spec)
        self.reset()

    def special_at(self, patches: int) -> tuple[int, ...]:
        return (patches // 2,)


def _entry(
    name: str, d_model: int, stride: int, parameters: int, top1: float, file: str, key: str = "model"
) -> ModelSpec:
    size = name.removeprefix("vim_").removesuffix("_plus")
    checkpoint = CheckpointFile(f"hustvl/Vim-{size}-midclstok", file, key, 415, parameters, top1)
    return ModelSpec(
        name=name,
        family="vim",
        config=VimConfig(d_model=d_model, stride=stride),
        preprocess=Preprocess((224, 224), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD),
        checkpoint=checkpoint,
        licence="Apache-2.0",
        source="https://github.com/hustvl/Vim",
    )


VARIANTS: dict[str, ModelSpec] = {
    "vim_tiny": _entry("vim_tiny", 192, 16, 7_148_008, 76.1, "vim_t_midclstok_76p1acc.pth"),
    "vim_small": _entry("vim_small", 384, 16, 25_796_584, 80.5, "vim_s_midclstok_80p5acc.pth"),
    # the published accuracy of Base belongs to the averaged weights
    "vim_base": _entry("vim_base", 768, 16, 97_598_440, 81.9, "vim_b_midclstok_81p9acc.pth", "model_ema"),
    # in the repositories of the stride-16 models, under file names that were not known when this was written
    "vim_tiny_plus": _entry("vim_tiny_plus", 192, 8, 7_250_344, 78.3, ""),
    "vim_small_plus": _entry("vim_small_plus", 384, 8, 26_001_256, 81.6, ""),
    "vim_cifar10": ModelSpec(
        name="vim_cifar10",
        family="vim",
        config=VimConfig((32, 32), patch=4, stride=4, d_model=160, depth=12, d_state=8, num_classes=10),
        preprocess=Preprocess((32, 32), 1.0, "bicubic", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        checkpoint=None,
        licence="Apache-2.0",
        source="recipes/train_cifar10.py",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}
