"""A picture of what a benchmark found: images per second as bars, and a mark at what the FLOPs promise."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .timed import Measured, Measurement

Colour = tuple[int, int, int]

WIDTH, MARGIN, ROW, BAR, LABEL, FIGURES = 900, 24, 30, 18, 190, 250
PAPER, INK, FAINT, RULE = (255, 255, 255), (26, 28, 33), (100, 105, 115), (214, 217, 222)
COLOURS: dict[str, Colour] = {"dense": (120, 126, 138), "reduced": (38, 110, 190), "rival": (205, 140, 45)}
LEGEND = "grey: all tokens. blue: fewer tokens, the red mark is what the FLOPs promise. ochre: what others would use."
PROMISE: Colour = (200, 30, 40)


def draw(measured: Sequence[Measurement], machine: str) -> Image.Image:
    """Bars of all models, a panel for each setting; scans are not drawn.

    Args:
        measured: what `measure` found for each setting.
        machine: one line that says what it was measured on.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not measured:
        raise ValueError("there is nothing to draw: no setting was measured")
    panels = [(each.setting, [one for one in each.found if one.kind in COLOURS]) for each in measured]
    height = 2 * MARGIN + 64 + sum(52 + ROW * len(found) for _, found in panels)
    page = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), "Images per second", INK, _font(20))
    pen.text((MARGIN, MARGIN + 30), machine, FAINT, _font(13))
    top = MARGIN + 64
    for setting, found in panels:
        pen.text((MARGIN, top + 4), str(setting), INK, _font(16))
        _draw_panel(pen, top + 34, found)
        top += 52 + ROW * len(found)
    pen.text((MARGIN, height - MARGIN - 12), LEGEND, FAINT, _font(13))
    return page


def _draw_panel(pen: ImageDraw.ImageDraw, top: int, found: Sequence[Measured]) -> None:
    """Bars one below the other; the longest bar or promise fills the room."""
    text, room = _font(14), WIDTH - 2 * MARGIN - LABEL - FIGURES
    rates = [1000 / one.timing.median for one in found]
    dense = rates[0]
    most = max([*rates, *(dense * one.ideal for one in found if one.ideal is not None)])
    left = MARGIN + LABEL
    pen.line((left, top, left, top + ROW * len(found) - 6), RULE, 1)
    for row, (one, rate) in enumerate(zip(found, rates, strict=True)):
        y = top + row * ROW
        pen.text((MARGIN, y), one.name, INK, text)
        pen.rectangle((left, y, left + round(room * rate / most), y + BAR), COLOURS[one.kind])
        if one.kind == "reduced" and one.ideal is not None:
            x = left + round(room * dense * one.ideal / most)
            pen.rectangle((x - 1, y - 3, x + 1, y + BAR + 3), PROMISE)
        words = f"{rate:.1f} / s, {one.versus:.2f}x"
        if one.kind == "reduced":
            words += f" ({100 * (one.realised or 0):.0f} % of the ideal)"
        pen.text((left + room + 10, y), words, FAINT, text)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
