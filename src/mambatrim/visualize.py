"""Pictures of what token reduction did: which patches are left after each stage, and which were merged into which.

Everything is drawn from `Tokens.origin`. B batch, M patches, H and W height and width of the model's input.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .apply import with_reducer
from .data import preprocess, read_image
from .evaluate import spec_of
from .flops import Trunk, count_flops
from .models.spec import Preprocess
from .reduction import Layout, Reducer, Tokens
from .reduction.schedule import named

Picture = str | os.PathLike[str] | Image.Image
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
Words = Sequence[tuple[str, Colour]]

# small inputs are enlarged by a whole factor to about this many pixels, large ones are drawn as they are
SIDE = 192
# more stages than this are not drawn: some spread over them are, the last among them
MOST_STAGES = 5
# share of its group's own colour in a merged patch
TINT = 0.33
NOTE = "A frame keeps its colour from stage to stage. Blocks are counted from 0."
MARGIN, GAP, SWATCH = 20, 14, 24
PAPER, INK, FAINT, WARNING, GONE = (255, 255, 255), (26, 28, 33), (100, 105, 115), (200, 30, 40), (34, 35, 38)


def trace(model: nn.Module, images: Tensor) -> list[Tokens]:
    """Run the model once on (B, 3, H, W) and return its tokens after each stage that removes some."""
    return _run(model, images)[1]


def visualize(
    model: nn.Module, images: Picture | Iterable[Picture], titles: Sequence[str] | None = None
) -> Image.Image:
    """Draw what the model's reducer does to some images: a row each, with the input and then one picture per stage.

    Args:
        model: a model of the zoo, reduced.
        images: one or several, as paths or as pictures.
        titles: what to call each image; by default the name of its file.

    Raises:
        ValueError: nothing to draw (no image, a model with all its tokens, a video model), or an unreadable image.
    """
    given = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
    names = [_name(image) for image in given] if titles is None else list(titles)
    if not given or len(names) != len(given):
        raise ValueError(f"visualize needs at least one image, and one title per image if any: got {len(given)} images")
    spec, reducer = spec_of(model), cast(Trunk, model).reducer
    places = reducer.schedule.places
    if not places:
        raise ValueError("this model keeps all of its tokens, so there is nothing to draw; reduce it first")
    loaded = [image if isinstance(image, Image.Image) else read_image(image) for image in given]
    inputs = torch.stack([preprocess(image, spec.preprocess) for image in loaded])  # (B, 3, H, W)
    inputs = inputs.to(next(model.parameters()).device)
    logits, stages = _run(model, inputs)
    if len(stages[0].grid) != 2:
        raise ValueError(f"only models of images can be drawn, and {spec.name} has a patch grid {stages[0].grid}")
    if any(len(stage.x) != len(inputs) or stage.grid != stages[0].grid for stage in stages):
        raise ValueError(f"only models with one grid of patches can be drawn, and {spec.name} has stages or windows")
    full, _ = _run(with_reducer(model, Reducer.dense()), inputs)
    count = min(len(stages), MOST_STAGES)
    drawn = sorted(len(stages) - 1 - i * len(stages) // count for i in range(count))
    pictures = [_denormalise(image, spec.preprocess) for image in inputs]
    rows = []
    for row, picture in enumerate(pictures):
        groups = [_groups(stages[stage], reducer.special, row) for stage in drawn]
        caption = _caption(names[row], full[row], logits[row], spec.classes)
        rows.append((caption, _draw_row(picture, stages[0].grid, groups)))
    report = count_flops(cast(Trunk, model), (inputs.shape[2], inputs.shape[3]))
    tokens, special = stages[0].origin.length, len(reducer.special)
    columns = [(f"{tokens} tokens", f"input: {tokens - special} patches + {special} special")]
    columns += [(f"{stages[i].origin.survivors} tokens", named(places[i])) for i in drawn]
    heading = f"{spec.name}, {reducer.method.name}: {100 * (1 - report.ratio):.1f} % fewer FLOPs"
    last = stages[-1].origin
    pruned = bool((last.dest == last.survivors).any())
    merged = bool((last.dest < last.survivors).sum() > last.keep.numel())
    return _compose(heading, columns, rows, _legend(merged, pruned))


# ------------------------------------------------------------------------------------------------------- what to draw


@dataclass(frozen=True)
class _Group:
    """One token that is there: the patch that it was (None for a special token), and the patches merged into it."""

    target: int | None
    merged: tuple[int, ...]


class _Recorder(nn.Module):
    """A reducer that does what another does and keeps what came out; made for one forward and then dropped."""

    def __init__(self, reducer: Reducer) -> None:
        super().__init__()
        self.reducer = reducer
        self.stages: list[Tokens] = []

    def acts(self, block: int) -> bool:
        return self.reducer.acts(block)

    def needs(self, block: int) -> tuple[str, ...]:
        return self.reducer.needs(block)

    def layout(self, tokens: Tokens) -> Layout | None:
        return self.reducer.layout(tokens)

    def forward(self, block: int, tokens: Tokens, captured: Mapping[str, Tensor]) -> Tokens:
        after: Tokens = self.reducer(block, tokens, captured)
        if after is not tokens:
            self.stages.append(after)
        return after


@torch.no_grad()
def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tokens]]:
    """Logits (B, classes), and the tokens after each stage, from one forward."""
    recorder = _Recorder(cast(Trunk, model).reducer)
    logits: Tensor = with_reducer(model, recorder)(images)
    return logits, recorder.stages


def _groups(tokens: Tokens, special: tuple[int, ...], row: int) -> list[_Group]:
    """The tokens of one image by the patches in them; patches are counted in raster order, special tokens left out."""
    dest, keep = tokens.origin.dest[row].tolist(), tokens.origin.keep[row].tolist()
    patches = [position for position in range(len(dest)) if position not in special]
    number = {position: patch for patch, position in enumerate(patches)}
    inside: list[list[int]] = [[] for _ in keep]
    for position in patches:
        if dest[position] < len(keep) and keep[dest[position]] != position:
            inside[dest[position]].append(number[position])
    return [_Group(number.get(position), tuple(merged)) for position, merged in zip(keep, inside, strict=True)]


def _caption(name: str, full: Tensor, reduced: Tensor, classes: tuple[str, ...] | None) -> Words:
    """The image's name and both predictions; the second one stands out where it is another."""

    def predicted(logits: Tensor) -> str:
        share, index = logits.softmax(0).max(0)
        best = int(index)
        certainty = f"{100 * float(share):.0f} %" if share >= 0.01 else "< 1 %"
        return f"{classes[best] if classes else f'class {best}'} {certainty}"

    same = bool(full.argmax() == reduced.argmax())
    return (
        (name, INK),
        (f"all tokens: {predicted(full)}", FAINT),
        (f"reduced: {predicted(reduced)}", FAINT if same else WARNING),
    )


def _name(image: Picture) -> str:
    name = "image" if isinstance(image, Image.Image) else Path(image).name
    return name if len(name) <= 36 else f"{name[:20]}...{name[-13:]}"


def _denormalise(image: Tensor, how: Preprocess) -> Image.Image:
    """The picture that the model sees, from its input (3, H, W)."""
    mean, std = (image.new_tensor(values)[:, None, None] for values in (how.mean, how.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)  # (3, H, W)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))


# ---------------------------------------------------------------------------------------------------------- one image


def _draw_row(picture: Image.Image, grid: tuple[int, ...], stages: Sequence[Sequence[_Group]]) -> list[Image.Image]:
    """The input, and the picture of each stage."""
    factor = max(1, round(SIDE / max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    large = picture.resize(size, Image.Resampling.LANCZOS)
    boxes = _boxes(grid, size)
    targets = {group.target for groups in stages for group in groups if group.merged and group.target is not None}
    colours = {target: _colour(index) for index, target in enumerate(sorted(targets))}
    return [large, *(_draw_stage(large, boxes, groups, colours) for groups in stages)]


def _boxes(grid: tuple[int, ...], size: tuple[int, int]) -> list[Box]:
    """Where each patch is drawn. Overlapping patches share the picture out evenly, which is what they are apart."""
    high, wide = grid
    rows = [round(i * size[1] / high) for i in range(high + 1)]
    columns = [round(i * size[0] / wide) for i in range(wide + 1)]
    return [(left, top, right, low) for top, low in pairwise(rows) for left, right in pairwise(columns)]


def _colour(index: int) -> Colour:
    """Colours that follow each other are far apart: the golden ratio spreads the hues, and lightness takes turns."""
    lightness = (0.5, 0.72, 0.36)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(index * 0.618034 % 1.0, lightness, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_stage(
    picture: Image.Image, boxes: Sequence[Box], groups: Sequence[_Group], colours: Mapping[int, Colour]
) -> Image.Image:
    """Dark where tokens were removed; picture where they were kept; the mean of its group where one was merged."""
    drawn = Image.new("RGB", picture.size, GONE)
    for target, merged in ((group.target, group.merged) for group in groups):
        own = () if target is None else (target,)
        for patch in own:
            drawn.paste(picture.crop(boxes[patch]), boxes[patch])
        if not merged:
            continue
        frame = FAINT if target is None else colours[target]
        means = [np.asarray(picture.crop(boxes[patch])).mean(axis=(0, 1)) for patch in (*own, *merged)]
        for patch in merged:
            _merged_cell(drawn, boxes[patch], np.mean(means, axis=0), frame)
        for patch in own:
            _frame(drawn, boxes[patch], frame, share=7)
    return drawn


def _merged_cell(drawn: Image.Image, box: Box, mean: np.ndarray, frame: Colour) -> None:
    # tinted, so that it is not taken for a patch that is really of one colour, and its group is seen at a glance
    red, green, blue = (
        round((1 - TINT) * of_mean + TINT * of_frame) for of_mean, of_frame in zip(mean, frame, strict=True)
    )
    drawn.paste((red, green, blue), box)
    _frame(drawn, box, frame, share=14)


def _frame(drawn: Image.Image, box: Box, colour: Colour, share: int) -> None:
    """A frame inside the box; its width is one `share`th of the box."""
    left, top, right, low = box
    width = max(1, round(min(right - left, low - top) / share))
    ImageDraw.Draw(drawn).rectangle((left, top, right - 1, low - 1), outline=colour, width=width)


# ------------------------------------------------------------------------------------------------------ the whole page


def _legend(merged: bool, pruned: bool) -> list[tuple[Image.Image, str]]:
    """A mark and its meaning, for the marks that are in the picture."""
    ramp = np.linspace(0, 1, SWATCH)[:, None, None] * np.array([-90, 10, -120]) + np.array([150, 190, 235])
    sky = Image.fromarray(np.broadcast_to(ramp, (SWATCH, SWATCH, 3)).astype(np.uint8))
    box = (0, 0, SWATCH, SWATCH)
    target, inside, gone = sky.copy(), sky.copy(), Image.new("RGB", sky.size, GONE)
    _frame(target, box, _colour(0), share=7)
    _merged_cell(inside, box, np.asarray(sky).mean(axis=(0, 1)), _colour(0))
    entries = [(sky, "kept, nothing merged into it")]
    if merged:
        entries += [
            (target, "kept, others merged into it"),
            (inside, "merged into the token framed in this colour: their mean, tinted"),
        ]
    return [*entries, (gone, "removed")] if pruned else entries


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _compose(
    heading: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[Words, Sequence[Image.Image]]],
    legend: Sequence[tuple[Image.Image, str]],
) -> Image.Image:
    """Heading, names of the columns, a caption and pictures per row, legend."""
    title, text, small = _font(20), _font(15), _font(13)
    side, high = rows[0][1][0].size
    step = max(side, *(int(small.getlength(line)) for column in columns for line in column)) + GAP
    captions = [sum(text.getlength(words) + 2 * GAP for words, _ in caption) for caption, _ in rows]
    inner = max(step * len(columns) - GAP, int(title.getlength(heading)), *map(int, captions))
    places = _flow([SWATCH + 8 + int(small.getlength(words)) for _, words in legend], inner)
    top, row_height = MARGIN + 34 + 44, 28 + high + GAP
    bottom = top + row_height * len(rows)
    size = (inner + 2 * MARGIN, bottom + places[-1][1] + SWATCH + 30 + MARGIN)
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), heading, INK, title)
    for index, (first, second) in enumerate(columns):
        pen.text((MARGIN + index * step, MARGIN + 36), first, INK, text)
        pen.text((MARGIN + index * step, MARGIN + 56), second, FAINT, small)
    for number, (caption, pictures) in enumerate(rows):
        x, y = float(MARGIN), top + number * row_height
        for words, colour in caption:
            pen.text((x, y + 6), words, colour, text)
            x += text.getlength(words) + 2 * GAP
        for index, picture in enumerate(pictures):
            page.paste(picture, (MARGIN + index * step, y + 28))
    for (mark, words), (left, down) in zip(legend, places, strict=True):
        page.paste(mark, (MARGIN + left, bottom + down))
        pen.text((MARGIN + left + SWATCH + 8, bottom + down + 5), words, INK, small)
    pen.text((MARGIN, size[1] - MARGIN - 18), NOTE, FAINT, small)
    return page


def _flow(widths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """(left, top) of things set side by side, in as many lines as it takes."""
    places, left, top = [], 0, 0
    for width in widths:
        if left and left + width > room:
            left, top = 0, top + SWATCH + 8
        places.append((left, top))
        left += width + 2 * GAP
    return places
