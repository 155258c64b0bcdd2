"""Recovery without labels: a few minutes of distillation with the reduction in place; resumable.

    python recipes/recover.py TRAIN.parquet --method vsm --flops-reduction 0.4 --minutes 6 --out runs/recover

The reduced model learns to give the dense model's class probabilities on augmented training images; no label of them is
looked at. OUT/last.pt is written every --every steps, to continue from, and OUT/model.safetensors (fp32) at the end,
with all lines of OUT/log.jsonl. Labels of the held-out images measure accuracy before and after, reduced as it was
trained and with all tokens. These weights are fine-tuned: keep their figures apart from those without training.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from train_cifar10 import augment, load_split, normalise

import mambatrim
from mambatrim.cells import describe, key, weights_digest
from mambatrim.evaluate import spec_of
from mambatrim.flops import Trunk, count_flops
from mambatrim.opening import open_model
from mambatrim.report import describe_machine

TEACHER_BATCH = 250


@dataclass
class Progress:
    """What has been done so far, in all runs together: steps, images seen, seconds by the clock and of a core."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0


def loss_of(student: nn.Module, teacher: nn.Module, inputs: Tensor) -> Tensor:
    """KL(dense || reduced) of the class probabilities, in nats."""
    with torch.no_grad():
        wanted = teacher(inputs).float().log_softmax(1)
    return F.kl_div(student(inputs).float().log_softmax(1), wanted, log_target=True, reduction="batchmean")


def learning_rate(share: float, peak: float) -> float:
    """A short linear warm-up, then a cosine down to zero; `share` of the time has passed."""
    return peak * min(1.0, share / 0.05 + 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@torch.inference_mode()
def figures(model: nn.Module, dense: Tensor | None, images: Tensor, labels: Tensor) -> tuple[dict[str, float], Tensor]:
    """Accuracy and, where dense logarithms (n, classes) are given, divergence from them; and the model's own."""
    model.eval()
    how = spec_of(model).preprocess
    found = torch.cat([model(normalise(part, how)).float().log_softmax(1) for part in images.split(TEACHER_BATCH)])
    result = {"accuracy": round(float((found.argmax(1) == labels).float().mean()), 4)}
    if dense is not None:
        result["kl"] = round(float(F.kl_div(found, dense, log_target=True, reduction="batchmean")), 4)
    return result, found


def train(student: nn.Module, teacher: nn.Module, images: Tensor, given: argparse.Namespace) -> Progress:
    """Distil until the time is used up, from the last checkpoint on if there is one."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=given.lr, weight_decay=0.0)
    done, last, run = Progress(), given.out / "last.pt", identity(student, given)
    if last.exists():
        saved = torch.load(last, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{last} is of a run with other weights or options; choose another --out")
        student.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = Progress(**saved["progress"])
        print(f"continuing after step {done.step}, {done.seconds / 60:.1f} of {given.minutes:g} minutes", flush=True)

    def keep() -> None:
        state = {"model": student.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(done)}
        torch.save({**state, "run": run}, given.out / "new.pt")
        (given.out / "new.pt").rename(last)

    how, total = spec_of(student).preprocess, 60 * given.minutes
    student.train()
    while done.seconds < total:
        clock, core = time.monotonic(), time.process_time()
        # each step draws by its number, so that a run that continues sees other images than before
        generator = torch.Generator().manual_seed(given.seed * 1_000_000 + done.step)
        chosen = torch.randint(0, len(images), (given.batch,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done.seconds / total, given.lr)
        loss = loss_of(student, teacher, normalise(augment(images[chosen], 32, generator), how))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done.step, done.images = done.step + 1, done.images + given.batch
        done.seconds += time.monotonic() - clock
        done.core_seconds += time.process_time() - core
        line = {"step": done.step, "kl": round(loss.item(), 4), "seconds": round(done.seconds, 1)}
        with (given.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        if done.step % given.every == 0:
            keep()
            print(json.dumps(line), flush=True)
    keep()
    return done


def identity(student: nn.Module, given: argparse.Namespace) -> str:
    """Digits that stand for what is trained, and how."""
    model = cast(Any, student)
    options = [given.minutes, given.lr, given.batch, given.seed]
    return key({"weights": given.weights, "method": describe(model.reducer.method), "options": options})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="label-free recovery of a reduced model")
    parser.add_argument("data", help="train.parquet")
    parser.add_argument("--model", default="vim_cifar10", help="as mambatrim compare --model (%(default)s)")
    parser.add_argument("--method", default="vsm", help="what chooses the tokens (%(default)s)")
    parser.add_argument("--flops-reduction", type=float, default=0.4, help="share of the FLOPs to save (%(default)s)")
    parser.add_argument("--minutes", type=float, default=6, help="of training by the clock, in all (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of AdamW (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=5000, help="held-out images that measure (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/recover"), help="(%(default)s)")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(given.seed)
    teacher = open_model(given.model)
    given.weights = weights_digest(teacher)
    reduced = mambatrim.reduce(teacher, flops_reduction=given.flops_reduction, method=given.method)
    student = copy.deepcopy(reduced)
    (images, _), (held, labels) = load_split(given.data)
    held, labels = held[: given.held_out], labels[: given.held_out]
    done = train(student, teacher, images, given)
    weights = {name: value.contiguous() for name, value in student.state_dict().items()}
    save_file(weights, given.out / "model.safetensors")
    dense, answers = figures(teacher, None, held, labels)
    before, _ = figures(reduced, answers, held, labels)
    after, _ = figures(student, answers, held, labels)
    full, _ = figures(mambatrim.reduce(student, flops_reduction=0.0), answers, held, labels)
    saved = 1 - count_flops(cast(Trunk, student)).ratio
    print(f"\n{describe_machine()}")
    print(
        f"{given.method}, {saved:.1%} of the FLOPs saved: {done.step} steps of {given.batch} images in "
        f"{done.seconds / 60:.1f} minutes, {done.core_seconds / 60:.1f} of them on a core\n"
    )
    print(f"{len(labels):,} held-out images | accuracy | KL to the dense model\n---|---|---")
    for name, row in (
        ("all tokens", dense),
        ("reduced, before (no training)", before),
        ("reduced, after distillation", after),
        ("the fine-tuned weights with all tokens", full),
    ):
        print(f"{name} | {100 * row['accuracy']:.2f} | {row.get('kl', 0.0):.4f}")


if __name__ == "__main__":
    main()
