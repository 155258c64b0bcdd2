"""Train the small Vim that mambatrim ships (`vim_cifar10`) on CIFAR-10, on a CPU or a GPU; resumable.

    python recipes/train_cifar10.py TRAIN.parquet --out runs/cifar10

Reads the training file only. 5,000 of its 50,000 images, chosen by a fixed seed whatever --seed is, are held out: every
choice of method or option is made on them (--validate-only prints the accuracy), and the test file gives the last
figure. Each epoch writes OUT/last.pt (to continue from) and a line of OUT/log.jsonl; the end writes
OUT/model.safetensors (fp16). The first part of the epochs runs on smaller images, which costs less and is made up for
by the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mambatrim.data import open_dataset
from mambatrim.models import MODELS, Preprocess
from mambatrim.models.layers import join_rows, resize_positions, split_rows
from mambatrim.models.vim import Vim

HELD_OUT, SPLIT_SEED = 5000, 0


def load_split(path: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((images, labels) to train on, (images, labels) held out); images (n, 3, 32, 32) uint8."""
    images, labels = decode(path)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    return (images[rest], labels[rest]), (images[held], labels[held])


def decode(path: str) -> tuple[Tensor, Tensor]:
    """All images (n, 3, 32, 32) uint8 and labels (n) of a file."""
    dataset = open_dataset(path)
    rows = [dataset[i] for i in range(len(dataset))]
    images = torch.stack([torch.from_numpy(np.array(image)) for image, _ in rows]).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label for _, label in rows])


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random shift by up to 4 pixels with reflection, random mirror image, then `size` x `size` pixels."""
    n = len(images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    top, left = (torch.randint(0, 9, (n, 1), generator=generator) for _ in range(2))
    mirror = torch.rand(n, 1, generator=generator) < 0.5
    span = torch.arange(32)
    rows = top + span  # (n, 32)
    columns = left + torch.where(mirror, span.flip(0), span)
    moved = padded[
        torch.arange(n)[:, None, None, None],
        torch.arange(3)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    return moved if size == 32 else F.interpolate(moved, size=(size, size), mode="bilinear", antialias=True)


def normalise(images: Tensor, how: Preprocess) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (how.mean, how.std))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def accuracy(model: Vim, images: Tensor, labels: Tensor, device: torch.device, batch: int = 250) -> float:
    model.eval()
    right = 0
    for start in range(0, len(labels), batch):
        x = normalise(images[start : start + batch], model.spec.preprocess).to(device)
        right += int((model(x).argmax(1).cpu() == labels[start : start + batch]).sum())
    model.train()
    return right / len(labels)


def begin_from(model: Vim, path: str) -> None:
    """Weights of the same model at another stride: the patches are the same, their positions are interpolated."""
    state = {name: value.float() for name, value in load_file(path).items()}
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    special = model.special_at(side * side)
    patches, own = split_rows(state["pos_embed"], special)
    grid = model.patch_embed.grid(*model.config.sides)
    state["pos_embed"] = join_rows(
        resize_positions(patches, (side, side), grid), own, model.special_at(math.prod(grid))
    )
    model.load_state_dict(state)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train the bundled Vim on CIFAR-10")
    parser.add_argument("data", help="train.parquet")
    parser.add_argument("--out", default="runs/cifar10")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--small", type=float, default=0.4, help="share of the epochs on 24x24 images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=1.0, help="epochs of linear warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--d-model", type=int, help="another width than the bundled model's")
    parser.add_argument("--depth", type=int, help="another number of blocks")
    parser.add_argument("--stride", type=int, help="another stride of the 4x4 patches: 2 makes 225 tokens")
    parser.add_argument("--start", help="model.safetensors to begin from, of any stride; positions are interpolated")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; run again to continue")
    parser.add_argument(
        "--validate-only", action="store_true", help="print the accuracy on the held-out images and stop"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    spec = MODELS["vim_cifar10"]
    chosen = {name: getattr(options, name) for name in ("d_model", "depth", "stride") if getattr(options, name)}
    spec = replace(spec, config=replace(spec.config, **chosen))
    model = Vim(spec.config, spec).to(device)
    if options.start:
        begin_from(model, options.start)
    (images, labels), held = load_split(options.data)
    decayed = [p for p in model.parameters() if p.dim() >= 2 and p.shape[-1] > 8]
    rest = [p for p in model.parameters() if not (p.dim() >= 2 and p.shape[-1] > 8)]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
    per_epoch = len(labels) // options.batch
    steps, first = per_epoch * options.epochs, 0
    last = out / "last.pt"
    if last.exists():
        saved = torch.load(last, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
        print(f"continuing after epoch {first} of {options.epochs}")
    if options.validate_only:
        print(f"held-out accuracy {accuracy(model, *held, device):.4f}")
        return
    begin = time.monotonic()
    for epoch in range(first, options.epochs):
        generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
        order = torch.randperm(len(labels), generator=generator)
        size = 24 if epoch < options.small * options.epochs else 32
        total, started = 0.0, time.monotonic()
        for i in range(per_epoch):
            step = epoch * per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, options.lr, warmup=max(1, round(options.warmup * per_epoch)))
            chosen = order[i * options.batch : (i + 1) * options.batch]
            x = normalise(augment(images[chosen], size, generator), spec.preprocess).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            if i % 10 == 9:
                share, spent = (i + 1) / per_epoch, time.monotonic() - started
                bar = "#" * int(30 * share)
                line = f"epoch {epoch + 1}/{options.epochs} [{bar:<30}] loss {total / (i + 1):.3f} {spent:.0f} s"
                print(f"\r{line}", end="", flush=True, file=sys.stderr)
        figures = {
            "epoch": epoch + 1,
            "loss": round(total / per_epoch, 4),
            "held_out_accuracy": accuracy(model, *held, device),
            "seconds": round(time.monotonic() - started, 1),
            "image_size": size,
        }
        print("\r" + json.dumps(figures), flush=True)
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps(figures) + "\n")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, out / "new.pt"
        )
        (out / "new.pt").rename(last)
        if time.monotonic() - begin > 60 * options.minutes:
            print("time is up; run again to continue")
            return
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out / "model.safetensors")


if __name__ == "__main__":
    main()
