"""Frontiers: accuracy against what a model costs, a curve per method, drawn without a plotting library."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, GRID, STRONG = (255, 255, 255), (26, 28, 33), (100, 105, 115), (226, 228, 232), (215, 0, 40)
Colour = tuple[int, int, int]

# everything is drawn so much larger and then made smaller, which smooths the lines
SCALE = 3
WIDTH, HEIGHT, LEFT, TOP, GAP, BELOW = 520, 440, 64, 56, 70, 56
LINE, ROW = 2, 21


@dataclass(frozen=True)
class Point:
    """A place in the plot, and the interval of its height."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Points of one method.

    name: what the legend calls it.
    points: joined by lines in the order of x, unless `alone`.
    strong: drawn thicker, to be found at once.
    alone: points of their own kind, such as the dense model and smaller ones.
    """

    name: str
    points: tuple[Point, ...]
    strong: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what x is, and the curves, which have the same names in every panel."""

    x: str
    curves: tuple[Curve, ...]


def draw_frontier(title: str, y: str, panels: Sequence[Panel]) -> Image.Image:
    """Panels side by side with one legend, in which the curve that ends highest comes first.

    Raises:
        ValueError: there is nothing to draw.
    """
    panels = [panel for panel in panels if any(curve.points for curve in panel.curves)]
    if not panels:
        raise ValueError("there is no point to draw in the frontier")
    curves = {curve.name: curve for panel in reversed(panels) for curve in panel.curves if curve.points}
    order = sorted(curves.values(), key=lambda curve: (not curve.alone, -min(point.y for point in curve.points)))
    joined = sorted((curve.strong, curve.name) for curve in order if not curve.alone)
    colours = {name: STRONG if strong else _colour(i, len(joined)) for i, (strong, name) in enumerate(joined)}
    small = _font(13)
    legend = 40 + int(max(small.getlength(curve.name) for curve in order) / SCALE) + 12
    size = (
        LEFT + len(panels) * WIDTH + (len(panels) - 1) * GAP + 16 + legend,
        TOP + max(HEIGHT, ROW * len(order)) + BELOW,
    )
    page = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    pen = ImageDraw.Draw(page)
    _text(pen, (LEFT, 14), title, INK, 17)
    for index, panel in enumerate(panels):
        left = LEFT + index * (WIDTH + GAP)
        _draw_panel(pen, left, panel, y, colours)
    for row, curve in enumerate(order):
        top = TOP + ROW * row + ROW / 2
        left = size[0] - legend
        colour = colours.get(curve.name, INK)
        if not curve.alone:
            _line(pen, [(left, top), (left + 26, top)], colour, 4 if curve.strong else LINE)
        _mark(pen, (left + 13, top), colour, list(colours).index(curve.name) if not curve.alone else -1)
        _text(pen, (left + 34, top - 9), curve.name, INK, 13)
    return page.resize(size, Image.Resampling.LANCZOS)


def _draw_panel(pen: ImageDraw.ImageDraw, left: int, panel: Panel, y: str, colours: dict[str, Colour]) -> None:
    points = [point for curve in panel.curves for point in curve.points]
    xs = _ticks(min(point.x for point in points), max(point.x for point in points))
    ys = _ticks(min(point.low for point in points), max(point.high for point in points))
    bottom = TOP + HEIGHT

    def place(x: float, height: float) -> tuple[float, float]:
        return (
            left + WIDTH * (x - xs[0]) / (xs[-1] - xs[0]),
            bottom - HEIGHT * (height - ys[0]) / (ys[-1] - ys[0]),
        )

    for tick in xs:
        at = place(tick, ys[0])
        _line(pen, [at, (at[0], TOP)], GRID, 1)
        _text(pen, (at[0], bottom + 6), f"{tick:g}", FAINT, 12, "ma")
    for tick in ys:
        at = place(xs[0], tick)
        _line(pen, [at, (left + WIDTH, at[1])], GRID, 1)
        _text(pen, (left - 8, at[1]), f"{tick:g}", FAINT, 12, "rm")
    _line(pen, [(left, TOP), (left, bottom), (left + WIDTH, bottom)], FAINT, 1)
    _text(pen, (left + WIDTH / 2, bottom + 28), panel.x, INK, 13, "ma")
    _text(pen, (left, TOP - 6), y, INK, 13, "lb")
    for curve in sorted(panel.curves, key=lambda curve: (curve.strong, curve.alone)):
        colour = colours.get(curve.name, INK)
        kind = -1 if curve.alone else list(colours).index(curve.name)
        path = [place(point.x, point.y) for point in sorted(curve.points, key=lambda point: point.x)]
        if not curve.alone:
            _line(pen, path, colour, 4 if curve.strong else LINE)
        for point in curve.points:
            _line(pen, [place(point.x, point.low), place(point.x, point.high)], colour, 1)
            _mark(pen, place(point.x, point.y), colour, kind)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, about six, of which the first is not above `low` and the last not below `high`."""
    span = max(high - low, 1e-9 * max(abs(high), 1.0))
    rough = span / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _colour(index: int, count: int) -> Colour:
    """Hues spread over the circle but for the red of the strong curve; neighbours differ in lightness too."""
    red, green, blue = colorsys.hls_to_rgb(0.06 + 0.86 * index / max(count, 1), (0.33, 0.47)[index % 2], 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _mark(pen: ImageDraw.ImageDraw, at: tuple[float, float], colour: Colour, kind: int) -> None:
    """A filled shape: -1 is that of points that stand alone."""
    x, y, r = at[0] * SCALE, at[1] * SCALE, 4.2 * SCALE
    corners = {1: (4, 45), 2: (3, -90), 3: (4, 0), 4: (3, 90), 5: (5, -90)}.get(-1 if kind < 0 else kind % 6)
    if kind < 0:
        pen.rectangle((x - r, y - r, x + r, y + r), fill=PAPER, outline=colour, width=2 * SCALE)
    elif corners is None:
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        count, turn = corners
        angles = [math.radians(turn + 360 * i / count) for i in range(count)]
        pen.polygon([(x + 1.25 * r * math.cos(a), y + 1.25 * r * math.sin(a)) for a in angles], fill=colour)


def _line(pen: ImageDraw.ImageDraw, path: Sequence[tuple[float, float]], colour: Colour, width: int) -> None:
    if len(path) > 1:
        pen.line([(x * SCALE, y * SCALE) for x, y in path], fill=colour, width=width * SCALE, joint="curve")


def _text(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], words: str, colour: Colour, size: int, anchor: str = "la"
) -> None:
    pen.text((at[0] * SCALE, at[1] * SCALE), words, colour, _font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size * SCALE)
