"""Data sets of videos: what is found in folders, and evaluate, compare and calibrate with a model of frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import mambatrim
from mambatrim import methods
from mambatrim.cli import main
from mambatrim.clips import open_clips
from mambatrim.compare import compare
from mambatrim.models import MODELS, build

FRAMES = 4


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A VideoMamba of 4 blocks on 4 frames of 32x32 pixels, with random weights."""
    spec = MODELS["videomamba_tiny_f8"]
    config = replace(
        spec.config,
        image_size=(32, 32),
        patch=8,
        stride=8,
        d_model=16,
        depth=4,
        d_state=4,
        num_classes=2,
        frames=FRAMES,
    )
    torch.manual_seed(0)
    how = replace(spec.preprocess, size=(32, 32))
    return build(replace(spec, config=config, preprocess=how, classes=("cat", "ship"))).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, each with a folder of six frames and an animated GIF."""
    root = tmp_path_factory.mktemp("videos")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "ship"):
        noise = torch.randint(0, 256, (6, 36, 40, 3), generator=generator, dtype=torch.uint8)
        frames = [Image.fromarray(each.numpy()) for each in noise]
        (root / name / "walk").mkdir(parents=True)
        for index, frame in enumerate(frames):
            frame.save(root / name / "walk" / f"{index}.png")
        frames[0].save(root / name / "run.gif", save_all=True, append_images=frames[1:])
    return root


def test_classes_and_videos_are_found(videos: Path) -> None:
    found = open_clips(videos, FRAMES)
    assert found.classes == ("cat", "ship") and [label for _, label in found.samples] == [0, 0, 1, 1]
    assert [path.name for path, _ in found.samples] == ["run.gif", "walk"] * 2
    assert len(found[1][0]) == FRAMES and found[3][1] == 1
    one = open_clips(videos / "cat", FRAMES)  # videos without classes
    assert one.classes == () and len(one) == 2


def test_compare_sees_what_the_model_sees(model: nn.Module, videos: Path) -> None:
    found = compare({"video": model}, {"mtr": methods.mtr()}, (0.3,), videos, timing=False)
    dense, reduced = found.rows
    inputs = mambatrim.load_images([path for path, _ in open_clips(videos, FRAMES).samples], model.spec)
    labels = torch.tensor([0, 0, 1, 1])
    fast = mambatrim.reduce(model, flops_reduction=0.3, method="mtr")
    with torch.no_grad():
        for row, each in ((dense, model), (reduced, fast)):
            assert row.accuracy == float((each(inputs).argmax(1) == labels).float().mean())
    assert mambatrim.evaluate(model, videos).top1 == dense.accuracy
    assert not compare({"video": model}, {"mtr": methods.mtr()}, (0.3,), videos / "cat", timing=False).labelled


def test_the_command_takes_videos(
    model: nn.Module, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mambatrim.save_pretrained(model, tmp_path / "mine")
    words = ["--model", str(tmp_path / "mine"), "--method", "mtr", "--flops-reduction", "0.3", "--no-timing"]
    assert main(["compare", str(videos), "--out", str(tmp_path / "out"), *words]) == 0
    assert "4 images, labels" in capsys.readouterr().out
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    for data, words_of_it in ((tmp_path / "photos", "has no videos"), (Path(__file__), "is no folder: a model of")):
        assert main(["compare", str(data), "--out", str(tmp_path / "no"), *words]) == 2
        complaint = capsys.readouterr().err
        assert words_of_it in complaint and len(complaint.splitlines()) == 1


def test_pictures_and_videos_are_not_mixed(model: nn.Module, videos: Path) -> None:
    image = mambatrim.create_model("vim_cifar10", weights="bundled")
    with pytest.raises(ValueError, match="must take the same input, and these take 4 frames, pictures"):
        compare({"video": model, "image": image}, {"mtr": methods.mtr()}, (0.3,), videos)
    with pytest.raises(ValueError, match="the model takes pictures"):
        compare({"image": image}, {"mtr": methods.mtr()}, (0.3,), open_clips(videos, FRAMES))
    with pytest.raises(ValueError, match="has no classes"):
        mambatrim.evaluate(model, videos / "cat")
