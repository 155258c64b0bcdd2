"""Traces and pictures: what is drawn is looked up pixel by pixel where the tokens are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mambatrim
from mambatrim import methods
from mambatrim.models.vim import Vim
from mambatrim.reduction import Assignment, Method, Schedule, Signals
from mambatrim.visualize import GONE, TINT, _boxes, _draw_row, _draw_stage, _Group, trace, visualize


@pytest.fixture(scope="module")
def model() -> Vim:
    torch.manual_seed(0)
    return mambatrim.create_model("vim_cifar10")


def noise(seed: int = 0, size: int = 32) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


# trace


def test_trace_gives_the_tokens_after_every_stage(model: Vim) -> None:
    fast = mambatrim.reduce(model, flops_reduction=0.4, method="mtr")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stages = trace(fast, images)
    kept = [65 - sum(fast.reducer.schedule.removed[: block + 1]) for block in (2, 4, 7)]
    assert [stage.origin.survivors for stage in stages] == kept
    for stage in stages:
        stage.origin.check()
        assert stage.x.shape == (3, stage.origin.survivors, 160)
        assert torch.equal(stage.size.sum(1), torch.full((3,), 65.0))
    with torch.no_grad():
        assert torch.equal(stages[-1].origin.dest, fast.forward_features(images).origin.dest)


def test_trace_leaves_the_model_as_it_was(model: Vim) -> None:
    fast = mambatrim.reduce(model, flops_reduction=0.4, method="mtr")
    before, reducer = list(fast._modules), fast.reducer
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = fast(images)
        trace(fast, images)
        assert torch.equal(fast(images), logits)
    assert fast.reducer is reducer and list(fast._modules) == before


def test_trace_of_a_dense_model_is_empty(model: Vim) -> None:
    assert trace(model, torch.zeros(1, 3, 32, 32)) == []


# marks


def test_marks_are_what_the_legend_says() -> None:
    # a grid of 2 x 2 patches of 20 pixels: 0 stays alone, 2 went into 1, 3 was pruned
    picture = Image.new("RGB", (40, 40), (10, 10, 10))
    picture.paste((100, 120, 140), (20, 0, 40, 20))
    picture.paste((200, 180, 160), (0, 20, 20, 40))
    frame = (250, 0, 0)
    drawn = _draw_stage(picture, _boxes((2, 2), (40, 40)), [_Group(0, ()), _Group(1, (2,))], {1: frame})
    assert drawn.getpixel((10, 10)) == drawn.getpixel((0, 0)) == (10, 10, 10)
    assert drawn.getpixel((30, 10)) == (100, 120, 140)
    mixed = tuple(round((1 - TINT) * 150 + TINT * part) for part in frame)
    assert drawn.getpixel((10, 30)) == mixed
    assert [drawn.getpixel(corner) for corner in ((20, 0), (39, 19), (0, 20), (19, 39))] == [frame] * 4
    # the target's frame is the thicker one
    assert (drawn.getpixel((22, 2)), drawn.getpixel((2, 22))) == (frame, mixed)
    assert drawn.getpixel((30, 30)) == drawn.getpixel((20, 20)) == GONE


def test_a_group_keeps_its_colour_from_stage_to_stage() -> None:
    stages = [
        [_Group(0, (1,)), _Group(2, ()), _Group(3, ())],
        [_Group(0, (1, 2)), _Group(3, ())],
    ]
    _, first, second = _draw_row(Image.new("RGB", (32, 32)), (2, 2), stages)
    assert first.size == (192, 192)
    assert first.getpixel((0, 0)) == second.getpixel((0, 0)) == second.getpixel((0, 96)) != (0, 0, 0)


def test_boxes_cover_the_picture_once() -> None:
    for grid, size in (((8, 8), (192, 192)), ((27, 27), (224, 224)), ((3, 5), (50, 41))):
        seen = np.zeros((size[1], size[0]), dtype=int)
        for left, top, right, low in _boxes(grid, size):
            seen[top:low, left:right] += 1
        assert (seen == 1).all()


# pages


def test_visualize_draws_a_row_per_image_and_a_column_per_stage(model: Vim, tmp_path: Path) -> None:
    fast = mambatrim.reduce(model, flops_reduction=0.4, method="mtr")
    noise().save(tmp_path / "noise.png")
    one = mambatrim.visualize(fast, tmp_path / "noise.png")
    two = visualize(fast, [str(tmp_path / "noise.png"), noise(1)])
    assert one.mode == "RGB" and one.width > 4 * 192
    assert two.height - one.height > 192
    # the untouched input stands at the left of the first row
    wanted = np.asarray(noise().resize((192, 192), Image.Resampling.LANCZOS))
    page = np.asarray(one)
    assert any((page[top : top + 192, 20 : 20 + 192] == wanted).all() for top in range(one.height - 192))


def test_every_kept_patch_is_on_the_page(model: Vim) -> None:
    def last_ones(signals: Signals, r: int) -> Assignment:
        batch, patches = signals.size.shape
        return Assignment.from_prune(torch.arange(patches - r, patches).repeat(batch, 1), patches)

    schedule = Schedule(tuple(32 if block == 3 else 0 for block in range(12)))
    half = mambatrim.reduce(model, schedule=schedule, method=Method("last", (), last_ones))
    page = np.asarray(visualize(half, noise()))
    wanted = np.asarray(noise().resize((192, 192), Image.Resampling.LANCZOS)).copy()
    wanted[96:] = GONE  # the lower half of the grid
    left = 20 + 192 + 14
    assert any((page[top : top + 192, left : left + 192] == wanted).all() for top in range(page.shape[0] - 192))


def test_a_schedule_of_many_stages_is_drawn_in_part(model: Vim) -> None:
    many = mambatrim.reduce(model, schedule=Schedule.constant(12, 4))
    assert visualize(many, noise()).width < 7 * 220


def test_titles_may_be_given_and_any_image_size_works(model: Vim) -> None:
    fast = mambatrim.reduce(model, flops_reduction=0.3, method=methods.prune())
    assert visualize(fast, [noise(size=50)], titles=["a very long title " * 8]).width > 1000
    with pytest.raises(ValueError, match="one title per image"):
        visualize(fast, [noise()], titles=["a", "b"])


def test_what_cannot_be_drawn_is_refused(model: Vim, tmp_path: Path) -> None:
    fast = mambatrim.reduce(model, flops_reduction=0.4, method="mtr")
    with pytest.raises(ValueError, match="keeps all of its tokens"):
        visualize(model, noise())
    with pytest.raises(ValueError, match="at least one image"):
        visualize(fast, [])
    (tmp_path / "cat.jpg").write_text("miaow")
    with pytest.raises(ValueError, match="cat.jpg is no image"):
        visualize(fast, tmp_path / "cat.jpg")


def test_windows_are_refused() -> None:
    model = mambatrim.reduce(mambatrim.create_model("mambavision_tiny"), flops_reduction=0.2)
    with pytest.raises(ValueError, match="one grid of patches"):
        visualize(model, noise(0, 64))
