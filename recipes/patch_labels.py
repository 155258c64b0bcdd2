"""Dense predictions from reduced tokens: which of ten classes does each patch of a two-part picture belong to?

    python recipes/patch_labels.py

Two of the bundled CIFAR-10 test images, the middle half of each, stand side by side in 32x32 pixels; the label of a
patch is the class of the image that it lies in. The bundled Vim gives maps of 8x8 patches behind three of its blocks,
and a linear probe (ridge regression, in closed form) reads them. Half of the images make the pictures that the probe is
fitted on, the other half those that it is tested on.

Printed is the share of patches that are labelled rightly: with the probe that was fitted on maps of all tokens, which
is what a head that somebody has trained sees when tokens are taken away later, and with one that was fitted on maps of
as few tokens. It is no segmentation benchmark: the border is always the same, the backbone was trained to name whole
pictures, and what its patches say of their own place is little to begin with.
"""

from __future__ import annotations

import time
from importlib.resources import as_file, files

import torch
from torch import Tensor, nn

import mambatrim
from mambatrim.data import Zip, preprocess
from mambatrim.report import describe_machine, percent, table

LAYERS, SAVINGS = (5, 8, 11), (0.2, 0.3, 0.4)
FITTED, TESTED, BATCH = 600, 300, 50
STRENGTH = 1e-2  # of the ridge, as a share of the features' variance


def pictures() -> tuple[Tensor, Tensor]:
    """The bundled images (1000, 3, 32, 32) and their labels."""
    how = mambatrim.create_model("vim_cifar10").spec.preprocess
    with as_file(files("mambatrim") / "assets" / "cifar10_samples.zip") as path:
        images, labels = zip(*((preprocess(image, how), label) for image, label in iter_of(Zip(path))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def iter_of(dataset: Zip):
    """Every sample in order."""
    return (dataset[index] for index in range(len(dataset)))


def side_by_side(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 32, 32) of two halves, and the labels (count, 64) of their 8x8 patches, row by row."""
    left, right = torch.randint(len(images), (2, count), generator=generator)
    halves = [images[chosen][..., 8:24] for chosen in (left, right)]
    columns = torch.stack([labels[left], labels[right]], dim=1).repeat_interleave(4, dim=1)  # (count, 8)
    return torch.cat(halves, dim=3), columns.repeat(1, 8)


@torch.no_grad()
def described(backbone: nn.Module, inputs: Tensor) -> Tensor:
    """(n, h w, F): the maps of all layers side by side, every patch normalised on its own."""
    found = []
    for part in inputs.split(BATCH):
        maps = [nn.functional.layer_norm(m.flatten(2).mT, m.shape[1:2]) for m in backbone(part)]  # (b, h w, D) each
        found.append(torch.cat(maps, dim=2))
    return torch.cat(found)


def fit(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (F, 10) and offsets (10,) of ridge regression on one-hot labels."""
    x, y = features.flatten(0, 1), nn.functional.one_hot(labels.flatten(), 10).to(torch.float32)
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    square = centred.T @ centred
    square += STRENGTH * square.diagonal().mean() * torch.eye(len(square))
    weights = torch.linalg.solve(square, centred.T @ (y - mean_y))
    return weights, mean_y - mean_x @ weights


def accuracy(features: Tensor, labels: Tensor, probe: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Share of patches that are right, and its standard error over pictures, whose patches are not independent."""
    weights, offsets = probe
    right = ((features @ weights + offsets).argmax(2) == labels).to(torch.float32).mean(1)  # (n,)
    return right.mean().item(), right.std().item() / len(right) ** 0.5


def main() -> None:
    start = time.perf_counter()
    images, labels = pictures()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    parts = zip(order.chunk(2), (FITTED, TESTED), strict=True)
    (known, known_labels), (new, new_labels) = (
        side_by_side(images[part], labels[part], count, generator) for part, count in parts
    )
    dense = mambatrim.create_model("vim_cifar10", weights="bundled")
    rows, of_dense, error = [], None, 0.0
    for saving in (0.0, *SAVINGS):
        model = mambatrim.reduce(dense, flops_reduction=saving)
        backbone = mambatrim.features(model, LAYERS)
        own = fit(described(backbone, known), known_labels)
        of_dense = own if of_dense is None else of_dense
        tested = described(backbone, new)
        (kept, error), (refitted, _) = (accuracy(tested, new_labels, probe) for probe in (of_dense, own))
        tokens = " > ".join(map(str, dict.fromkeys(mambatrim.count_flops(model).lengths)))
        rows.append((f"-{saving:.0%}" if saving else "dense", tokens, percent(kept), percent(refitted)))
    print(f"vim_cifar10 with mtr as a backbone, on {TESTED} pictures of two CIFAR-10 test images each")
    print(describe_machine(), end="\n\n")
    print(table(("", "tokens", "probe of the dense maps", "probe of its own"), rows))
    print(f"\npatches labelled rightly; standard error over pictures {100 * error:.1f} points; chance 10 %.")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
