"""What the paper leaves open in MTR, measured on the held-out images of CIFAR-10 (never on the test file).

    python recipes/mtr_options.py TRAIN.parquet [--weights runs/cifar10/model.safetensors] [--limit 5000]

Prints a Markdown table: top-1 on the 5,000 images that recipes/train_cifar10.py holds out, for each choice, at three
savings of FLOPs. One choice is changed at a time; the first row is the default.
"""

from __future__ import annotations

import argparse

import torch
from train_cifar10 import accuracy, load_split

import mambatrim
from mambatrim import methods
from mambatrim.reduction import NORM, centre, inverse, plain
from mambatrim.reduction.scores import DELTA

SAVINGS = (0.2, 0.3, 0.4)
CHOICES = {
    "default: delta, next in rank, matched on the residual stream, weighted by size": methods.mtr(),
    "targets: all that are not sources": methods.mtr(groups=methods.by_rank(targets=methods.all_others)),
    "matched on the mixer's output": methods.mtr(feature="update"),
    "targets: all others; the r strongest links of the lowest half": methods.mtr(
        groups=methods.by_rank(targets=methods.all_others, candidates=methods.lowest_half)
    ),
    "symmetric groups (even and odd)": methods.mtr(groups=methods.EVEN_ODD),
    "without reordering": methods.mtr(order=methods.as_grouped),
    "plain mean": methods.mtr(weight=plain),
    "class token re-centred": methods.mtr(place=centre),
    "score: inverse delta": methods.mtr(score=inverse(DELTA)),
    "score: norm of the residual stream": methods.mtr(score=NORM),
    "score: random": methods.random(),
    "prune instead of merge": methods.prune(),
}
# 0-based blocks after which patches go; the default is three stages
STAGES = {"one stage after block 1": (1,), "two stages": (2, 6), "stages after 0, 2, 4": (0, 2, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description="the open choices of MTR on held-out images")
    parser.add_argument("data", help="train.parquet")
    parser.add_argument("--weights", default="bundled")
    parser.add_argument("--limit", type=int, default=5000)
    options = parser.parse_args()
    model = mambatrim.create_model("vim_cifar10", weights=options.weights)
    _, (images, labels) = load_split(options.data)
    images, labels, cpu = images[: options.limit], labels[: options.limit], torch.device("cpu")
    dense = accuracy(model, images, labels, cpu)
    error = 100 * (dense * (1 - dense) / len(labels)) ** 0.5
    print(f"{len(labels)} held-out images; all tokens: {100 * dense:.1f} % (standard error {error:.1f})\n")
    print("| choice | " + " | ".join(f"-{s:.0%}" for s in SAVINGS) + " |\n|---|" + "---|" * len(SAVINGS))
    for name, method in CHOICES.items():
        found = [
            accuracy(mambatrim.reduce(model, flops_reduction=saving, method=method), images, labels, cpu)
            for saving in SAVINGS
        ]
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in found) + " |", flush=True)
    for name, stages in STAGES.items():
        found = []
        for saving in SAVINGS:
            try:
                schedule = mambatrim.solve(model, saving, stages)
            except ValueError:  # few tokens and few stages: no count lands near enough
                found.append("-")
                continue
            found.append(f"{100 * accuracy(mambatrim.reduce(model, schedule=schedule), images, labels, cpu):.1f}")
        print(f"| {name} | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
