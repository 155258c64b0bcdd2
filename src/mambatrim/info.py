"""What is known of the models of the zoo, without making them: text for people, and reports in JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from .apply import reduce
from .evaluate import spec_of
from .flops import ImageSize, Trunk, count_flops, sections
from .models import BUNDLED, MODELS, Model, ModelSpec, create_model
from .names import lookup
from .reduction import Section
from .report import giga, percent, report, result, table, to_json

CONVENTIONS = {
    "both": "both scan directions, which is what runs",
    "paper": "one direction, as R-MeeTo and DyVM count",
    "projections": "without the scan, as tracers count",
}
HEADER = ("model", "parameters", "input", "tokens", "FLOPs", "published top-1", "on", "licence", "weights")


def blueprint(name: str) -> Model:
    """A model without values, which takes no time and no memory."""
    lookup("model", name, MODELS)
    with torch.device("meta"):
        return create_model(name)


# ----------------------------------------------------------------------------------------------------------- all models


def text_of_all() -> str:
    """A line for each model: sizes, FLOPs, published accuracy, licence and file of its weights."""
    rows = [list(HEADER), *(_row(name, blueprint(name)) for name in MODELS)]
    # the last columns are words, and flush left
    for column in range(HEADER.index("on"), len(HEADER)):
        width = max(len(row[column]) for row in rows)
        for row in rows:
            row[column] = row[column].ljust(width)
    return table(rows[0], rows[1:])


def report_of_all() -> str:
    """The same as a report in JSON."""
    models = {name: blueprint(name) for name in MODELS}
    return to_json(report("info", [result(name, model, _published(model)) for name, model in models.items()]))


def _row(name: str, model: Model) -> list[str]:
    spec, counted = spec_of(model), count_flops(model)
    published = spec.checkpoint
    return [
        name,
        f"{_parameters(model) / 1e6:.1f} M",
        "x".join(map(str, model.sides())),
        str(counted.lengths[0]) if counted.lengths else "-",
        giga(counted.total),
        f"{published.top1} %" if published and published.top1 else "-",
        published.dataset if published else "-",
        spec.licence,
        weights_source(spec),
    ]


# ------------------------------------------------------------------------------------------------------------ one model


def text_of(name: str, flops_reduction: float = 0.0, image_size: int | None = None) -> str:
    """All about one model: sizes, input, tokens, weights, and FLOPs, with fewer tokens too if a saving is given."""
    model = blueprint(name)
    spec = spec_of(model)
    published = spec.checkpoint
    top1 = f"{published.top1} % on {published.dataset}, as published" if published else "not published"
    facts = [
        ("parameters", f"{_parameters(model):,}"),
        ("input", _input(model, image_size)),
        *_sequence(model, image_size),
        ("top-1", top1),
        ("weights", weights_source(spec)),
        ("licence", spec.licence),
        ("source", spec.source),
    ]
    fast = reduce(model, flops_reduction=flops_reduction, image_size=image_size) if flops_reduction else model
    lines = [spec.name, *(f"  {fact:<12}{value}" for fact, value in facts)]
    lines += ["", _flops_table(model, fast, image_size)]
    if fast is not model:
        reducer = cast(Trunk, fast).reducer
        removed = list(reducer.schedule.removed)
        saving = f"{percent(flops_reduction)} fewer FLOPs with {reducer.method.name}"
        lines += ["", f"schedule for {saving}: {reducer.extra_repr()}"]
        lines.append(f"patches removed after each block, counted from 0: {removed}")
    return "\n".join(lines)


def report_of(name: str, flops_reduction: float = 0.0, image_size: int | None = None) -> str:
    """The same as a report in JSON."""
    model = blueprint(name)
    models = {"dense": model}
    if flops_reduction:
        models["reduced"] = reduce(model, flops_reduction=flops_reduction, image_size=image_size)
    figures = _published(model)
    return to_json(report("info", [result(key, each, figures, image_size) for key, each in models.items()]))


def _input(model: Model, image_size: ImageSize) -> str:
    how = spec_of(model).preprocess
    *frames, height, width = model.sides(image_size)
    resized = f"both sides resized to {min(how.resize)}" if how.squash else f"short side resized to {min(how.resize)}"
    text = f"{height} x {width} pixels, {resized} ({how.interpolation}), centre crop"
    return f"{frames[0]} frames of {text}" if frames else text


def _sequence(model: Model, image_size: ImageSize) -> list[tuple[str, str]]:
    """Tokens, blocks and widths: of the sequence, or of each stage of a pyramid that loses tokens."""
    parts = sections(model, image_size)
    if len(parts) == 1:
        (part,) = parts
        tokens = f"{part.patches + part.special}: {part.patches} patches, {part.special} special"
        return [("tokens", tokens), ("blocks", f"{part.depth}, d_model {part.d_model}, d_inner {part.d_inner}")]

    def listed(value: Callable[[Section], object]) -> str:
        return ", ".join(str(value(part)) for part in parts)

    tokens = listed(lambda part: f"{part.windows} x {part.patches}" if part.windows > 1 else part.patches)
    widths = f"d_model {listed(lambda part: part.d_model)}, d_inner {listed(lambda part: part.d_inner)}"
    return [
        ("tokens", f"{tokens}, in {len(parts)} stages that can lose some"),
        ("blocks", f"{listed(lambda part: part.depth)}; {widths}"),
    ]


def _flops_table(model: Model, fast: Model, image_size: ImageSize) -> str:
    rows = []
    for convention, text in CONVENTIONS.items():
        counted = count_flops(fast, image_size, convention)
        row = [f"{convention} ({text})", giga(counted.dense_total)]
        rows.append(row if fast is model else [*row, giga(counted.total), percent(1 - counted.ratio)])
    return table(["FLOPs (multiply-adds)", "dense", "reduced", "saved"][: len(rows[0])], rows)


# ------------------------------------------------------------------------------------------------------------- weights


def weights_source(spec: ModelSpec) -> str:
    """Where the weights of an entry come from, in words."""
    checkpoint = spec.checkpoint
    if spec.name in BUNDLED:
        return "in the package"
    if checkpoint is None:
        return f"none published ({spec.source})"
    file = checkpoint.file or "a file whose name is not known"
    return f"{file} of {checkpoint.repo} on the Hub" if checkpoint.repo else f"{file} from {spec.source}"


def _published(model: Model) -> dict[str, Any]:
    """What is known about a model's weights, for a report."""
    spec = spec_of(model)
    checkpoint = spec.checkpoint
    return {
        "parameters": _parameters(model),
        "licence": spec.licence,
        "source": spec.source,
        "published_top1": checkpoint.top1 if checkpoint else None,
        "dataset": checkpoint.dataset if checkpoint else None,
        "weights": weights_source(spec),
        "repo": checkpoint.repo if checkpoint else None,
        "file": checkpoint.file if checkpoint else None,
    }


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
