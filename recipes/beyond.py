"""The measurements of docs/beyond.md: what token reduction breaks in a Vision Mamba, and what mends it; resumable.

    python recipes/beyond.py TRAIN.parquet TEST.parquet --model vim_cifar10 studies/models/* --page docs/beyond.md

Everything is chosen on the images that recipes/train_cifar10.py holds out; only the part `test` sees the test images.
All savings have the whole cost counted: grouping, convolution and scan of the virtual sequence too. Cells are kept in
--out, so a stopped run continues, and --no-run prints what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import beyond_ideas as ideas
import torch
from study import (
    STAGES,
    Row,
    Study,
    accuracy,
    ahead,
    arguments,
    copy_pictures,
    divergence,
    heading,
    pivot,
    set_up,
    speed,
    write_page,
)
from torch import Tensor, nn

import mambatrim
from mambatrim import kernels, methods
from mambatrim.cells import plain_word
from mambatrim.compare import Entry, in_stages
from mambatrim.comparison import Comparison
from mambatrim.data import Dataset
from mambatrim.evaluate import spread
from mambatrim.methods import early, running, vsm
from mambatrim.models.flat import FlatMamba
from mambatrim.prepared import prepare
from mambatrim.reduction import (
    AS_IT_STANDS,
    GATHERED,
    NORM,
    OUTPUT,
    POLICIES,
    RUNNING,
    STEPPED,
    Assignment,
    Method,
    Schedule,
    Score,
    Signals,
    default_stages,
    delta,
)
from mambatrim.report import describe_machine, markdown_table

TARGETS = (0.4, 0.2, 0.3, 0.5, 0.6)
Entrants = dict[str, Method | Entry | nn.Module]
EARLY = in_stages(early)


# ----------------------------------------------------------------------------------------------------- what is compared


def broken() -> Entrants:
    """Four groupings, each under every sequence policy, all at the early stages."""
    groupings = {
        "vsm's groups": vsm(),
        "tome": methods.tome(),
        "mtr": methods.mtr(),
        "random pairs": methods.random(),
    }
    return {
        f"{name}, {policy.name}": Entry(running(method, policy), EARLY)
        for name, method in groupings.items()
        for policy in POLICIES
    }


def options() -> Entrants:
    """vsm with one option changed at a time; the first is the default."""
    changed = {
        "default": vsm(),
        "no distance": vsm(distance=0, rows=0),
        "distance in the sequence only": vsm(rows=0),
        "distance in the grid only": vsm(distance=0, rows=0.04),
        "half the distance": vsm(distance=0.01, rows=0.01),
        "twice the distance": vsm(distance=0.04, rows=0.04),
        "sizes free (no Ward)": vsm(exponent=0),
        "Ward, exponent 0.5": vsm(exponent=0.5),
        "Ward, exponent 1.5": vsm(exponent=1.5),
        **{f"feature: {name}": vsm(feature=name) for name in ("update", "dt", "B", "C", "y")},
    }
    found: Entrants = {**changed}
    stages: dict[str, Callable[[int], tuple[int, ...]]] = {
        "after the first block": lambda depth: (0,),
        "two, early": lambda depth: (0, depth // 6),
        "as MTR": default_stages,
        "six, to the last quarter": lambda depth: tuple(sorted({depth * k // 8 for k in range(6)})),
        "after every block": lambda depth: tuple(range(depth - 1)),
    }
    return found | {f"stages: {name}": Entry(vsm(), in_stages(which)) for name, which in stages.items()}


def mtr_variants() -> Entrants:
    """MTR as the paper has it, and with the options that did best in docs/study.md, at several stages."""
    pool = methods.mtr(groups=methods.by_rank(methods.all_others, methods.lowest_half))
    kinds = {"mtr": methods.mtr(), "mtr, larger pools": pool, "mtr, norm, even and odd": even_odd()}
    return {f"{name} @ {at}": Entry(method, how) for name, method in kinds.items() for at, how in STAGES.items()}


def even_odd() -> Method:
    return methods.mtr(score=NORM, groups=methods.EVEN_ODD)


def finalists(best_mtr: str) -> Entrants:
    """What the test images decide between."""
    return {
        "mtr": methods.mtr(),
        "mtr at its best": mtr_variants()[best_mtr],
        "tome": methods.tome(),
        "utr": methods.utr(),
        "stm": methods.stm(),
        "evit": methods.evit(),
        "random pairs": methods.random(),
        "mtr, clock running": running(methods.mtr(), STEPPED),
        "tome, clock running": Entry(running(methods.tome(), STEPPED), EARLY),
        "vsm's groups, as they stand": Entry(running(vsm(), AS_IT_STANDS), EARLY),
        "vsm, exact": vsm(sequence=RUNNING),
        "vsm, gathered": vsm(sequence=GATHERED),
        "vsm": vsm(),
    }


# ------------------------------------------------------------------------------------------------------------ the parts


def broken_part(study: Study) -> str:
    found = replace(study, targets=(0.4,)).part("broken", broken(), study.held(), "mtr, as it stands")
    texts = []
    for model in found.models:
        rows = {row.name: row for row in found.rows if row.model == model}
        names = dict.fromkeys(name.rsplit(", ", 1)[0] for name in rows if name != "dense")
        grouped = dict.fromkeys(name.partition(", ")[0] for name in names)
        body = [
            [policy.name, *(_figure(rows.get(f"{group}, {policy.name}")) for group in grouped)] for policy in POLICIES
        ]
        texts.append(heading(found, model, "held-out images"))
        texts.append(markdown_table(["-40 %: accuracy (divergence)", *grouped], body))
    return "\n\n".join(texts)


def _figure(row: Row | None) -> str:
    return "-" if row is None or row.note else f"{100 * row.accuracy:.1f} ({row.kl:.3f})"


def options_part(study: Study) -> str:
    found = replace(study, targets=(0.4, 0.5)).part("options", options(), study.held(), "default")
    return _tables(found, "held-out images", {"Accuracy in percent:": accuracy, "Divergence:": divergence})


def rounds_part(study: Study) -> str:
    """vsm's groups made one pair after the other, and in rounds."""
    entrants: Entrants = {"one by one": vsm(), "in rounds": vsm(grouping=methods.IN_ROUNDS)}
    found = replace(study, targets=(0.2, 0.4, 0.6)).part("rounds", entrants, study.held(), "one by one")
    parts = {"Accuracy in percent:": accuracy, "Points ahead:": ahead, "Divergence:": divergence}
    texts = [_tables(found, "held-out images", parts)]
    for name, model in study.models.items():
        body = [[f"-{target:.0%}", *_agreement(model, study.held(), target)] for target in (0.2, 0.4, 0.6)]
        header = ["saving", "pairs joined", "rounds needed, mean", "most", "images with equal groups"]
        texts.append(f"**{name}**, 200 of the images, each step of the run one by one done again in rounds:")
        texts.append(markdown_table(header, body))
    return "\n\n".join(texts)


@torch.inference_mode()
def _agreement(model: nn.Module, data: Dataset, target: float) -> list[str]:
    """The columns of the table above, of four stages each."""
    seen: list[tuple[int, Tensor, Tensor]] = []

    def both(x: Tensor, weight: Tensor, place: Tensor, r: int, exponent: float) -> tuple[Tensor, Tensor]:
        plans = [
            kernels.agglomerate_rounds(x, weight, place, r, exponent, count) for count in range(r.bit_length() + 5)
        ]
        exact, full = kernels.agglomerate(x, weight, place, r, exponent), plans[-1]
        needed = torch.stack([~_equal(plan, full) for plan in plans]).sum(0)
        seen.append((r, needed, _equal(kernels.agglomerate_rounds(x, weight, place, r, exponent), exact)))
        return exact

    images = prepare(spread(data, 200), model.spec.preprocess).inputs(model.spec.preprocess, 0, 200)
    mambatrim.reduce(model, target, method=vsm(grouping=methods.Grouping(both, kernels.cluster_macs)))(images)
    return [
        ", ".join(str(r) for r, *_ in seen),
        ", ".join(f"{needed.float().mean():.1f}" for _, needed, _ in seen),
        ", ".join(str(int(needed.max())) for _, needed, _ in seen),
        ", ".join(f"{100 * same.float().mean():.0f} %" for *_, same in seen),
    ]


def _equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """(B): whether two plans are the same."""
    return (a[0] == b[0]).all(1) & (a[1] == b[1]).all(1)


def mtr_part(study: Study) -> str:
    found = replace(study, targets=(0.4,)).part("mtr", mtr_variants(), study.held(), "mtr @ default")
    return _tables(found, "held-out images", {"Accuracy in percent:": accuracy})


def best_mtr(study: Study, model: str) -> str:
    """The variant of MTR that lost least on the held-out images; of equals the first."""
    quiet = replace(study, targets=(0.4,), run=False)
    found = quiet.part("mtr", mtr_variants(), study.held(), "mtr @ default")
    rows = [row for row in found.rows if row.model == model and row.name != "dense" and not row.note]
    return max(rows, key=lambda row: row.accuracy).name if rows else "mtr @ default"


def ideas_part(study: Study) -> str:
    quick = replace(study, targets=(0.4, 0.6))
    parts = {
        "Accuracy in percent:": accuracy,
        "Points ahead of the first row on the same images, with 95 % intervals:": ahead,
        "Divergence:": divergence,
    }
    groupings = quick.part("ideas", ideas.groupings(), study.held(), "vsm")
    scores = quick.part("scores", ideas.scores(), study.held(), "mtr")
    return "\n\n".join(_tables(found, "held-out images", parts) for found in (groupings, scores))


def test_part(study: Study) -> str:
    texts = []
    for model in study.models:
        best = best_mtr(study, model)
        one = replace(study, models={model: study.models[model]})
        found = one.part(f"test-{plain_word(model)}", finalists(best), study.test, "mtr at its best")
        parts: dict[str, Callable[[Row], str]] = {
            f"Accuracy in percent (MTR at its best is `{best}` on the held-out images):": accuracy,
            "Points ahead of MTR at its best on the same images, with 95 % intervals:": ahead,
            "Share of that MTR's drop that is left:": partial(_left, _drops(found.rows)),
            "Divergence from the dense model's class probabilities, in nats:": divergence,
        }
        if any(row.timing for row in found.rows):
            parts["Time saved, against the dense model in the same run:"] = speed
        texts.append(_tables(found, "test images", parts))
        if any(not row.note for row in found.rows):
            picture = f"beyond-{plain_word(model)}.png"
            found.frontier(model).save(study.out / picture)
            texts.append(f"![accuracy against FLOPs and time]({picture})")
    return "\n\n".join(texts)


def _drops(rows: tuple[Row, ...]) -> dict[float, float]:
    return {row.target: row.drop for row in rows if row.name == "mtr at its best"}


def _left(drops: Mapping[float, float], row: Row) -> str:
    return f"{row.drop / drops[row.target]:.2f}" if drops.get(row.target) else ""


def _tables(found: Comparison, what: str, parts: Mapping[str, Callable[[Row], str]]) -> str:
    texts = []
    for model in found.models:
        texts.append(heading(found, model, what))
        texts += [f"{title}\n\n{pivot(found, model, write)}" for title, write in parts.items()]
    return "\n\n".join(texts)


# ----------------------------------------------------------------------------------------------- is delta a good score


@torch.inference_mode()
def delta_part(study: Study) -> str:
    """Rank correlation of each token's score with the harm of leaving it out, per stage."""
    scores = {
        "delta": delta(),
        "residual norm": NORM,
        "mixer's output": OUTPUT,
        "reach": ideas.reach(1),
        "like the class token": methods.CLASS_TOKEN,
    }
    texts = []
    for name, model in study.models.items():
        if not isinstance(model, FlatMamba) or not study.run:
            continue
        dataset = spread(study.held(), 24)
        images = prepare(dataset, model.spec.preprocess).inputs(model.spec.preprocess, 0, 24)
        body = []
        for stage in default_stages(model.depth):
            found = [_correlations(model, image[None], stage, scores) for image in images]
            means = torch.tensor(found).mean(0)
            spreads = torch.tensor(found).std(0) / len(found) ** 0.5
            body.append([f"after block {stage}", *(f"{m:+.2f} ± {s:.2f}" for m, s in zip(means, spreads, strict=True))])
        texts.append(
            f"**{name}**, 24 held-out images: Spearman correlation of a token's score with the divergence "
            f"that leaving it out causes (mean ± standard error over images), and the coefficient of variation of "
            f"delta within an image.\n\n{markdown_table(['stage', *scores, 'variation of delta'], body)}"
        )
    return "\n\n".join(texts)


def _correlations(model: FlatMamba, image: Tensor, stage: int, scores: Mapping[str, Score]) -> list[float]:
    patches = model.num_patches()
    seen: dict[str, Tensor] = {}

    def look(signals: Signals, r: int) -> Assignment:
        seen.update({name: score.pool(signals)[0] for name, score in scores.items()})
        everyone = torch.arange(signals.size.shape[1])
        return Assignment.from_prune(everyone[: len(signals.size), None], len(everyone))

    needs = tuple(dict.fromkeys(name for score in scores.values() for name in score.needs))
    schedule = Schedule(tuple(1 if block == stage else 0 for block in range(model.depth)))
    without = mambatrim.reduce(model, schedule=schedule, method=Method("leave one out", needs, look))
    dense = model(image).log_softmax(1)
    logits = without(image.expand(patches, -1, -1, -1)).log_softmax(1)  # (M, classes): without token m
    harm = torch.nn.functional.kl_div(logits, dense.expand_as(logits), log_target=True, reduction="none").sum(1)
    of_delta = seen["delta"]
    return [*(_spearman(seen[name], harm) for name in scores), float(of_delta.std() / of_delta.mean())]


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().float() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# ------------------------------------------------------------------------------------------------ head-room of choosing


@torch.inference_mode()
def oracle_part(study: Study) -> str:
    """The best of many random plans for each image, chosen by looking at the dense model's answer."""
    texts = []
    for name, model in study.models.items():
        if not isinstance(model, FlatMamba) or not study.run:
            continue
        dataset = spread(study.held(), 500)
        held = prepare(dataset, model.spec.preprocess)
        images, labels = held.inputs(model.spec.preprocess, 0, len(dataset)), held.truth(model.spec)
        if labels is None:
            continue
        dense = model(images).log_softmax(1)
        body = []
        plans = {
            "as it stands": [methods.random(seed) for seed in range(12)],
            "clock running": [running(methods.random(seed), STEPPED) for seed in range(12)],
        }
        for label, draws in plans.items():
            answers = torch.stack([mambatrim.reduce(model, 0.4, method=method)(images) for method in draws])
            harm = (dense.exp() * (dense - answers.log_softmax(2))).sum(2)  # (draws, n)
            best = answers[harm.argmin(0), torch.arange(len(images))]
            one, chosen = (100 * float((x.argmax(1) == labels).float().mean()) for x in (answers[0], best))
            body.append([label, f"{one:.1f}", f"{chosen:.1f}"])
        one = 100 * float((mambatrim.reduce(model, 0.4, method="vsm")(images).argmax(1) == labels).float().mean())
        body.append(["vsm, for comparison", f"{one:.1f}", ""])
        table = markdown_table(["random pairs, -40 %", "one draw", "best of 12 draws per image"], body)
        texts.append(f"**{name}**, 500 held-out images.\n\n{table}")
    return "\n\n".join(texts)


PARTS: dict[str, Callable[[Study], str]] = {
    "mtr": mtr_part,
    "test": test_part,
    "broken": broken_part,
    "options": options_part,
    "rounds": rounds_part,
    "delta": delta_part,
    "oracle": oracle_part,
    "ideas": ideas_part,
}


def main() -> None:
    parser = arguments("the measurements of docs/beyond.md", PARTS, TARGETS, "runs/beyond")
    parser.add_argument("--held-out", type=int, default=2000, help="use so many of the held-out images (%(default)s)")
    parser.add_argument("--under", default="", help="suffix of the markers, where models need different options")
    given = parser.parse_args()
    study = set_up(given, given.images, given.held_out)
    for name in given.part:
        text = PARTS[name](study)
        print(f"\n## {name}\n\n{text}\n", flush=True)
        if given.page and text:
            machine = f"\n\nOn {describe_machine()}." if name == "test" else ""
            write_page(given.page, name + given.under, text + machine, by="recipes/beyond.py")
            copy_pictures(given.out, given.page, "beyond-*.png")


if __name__ == "__main__":
    main()
