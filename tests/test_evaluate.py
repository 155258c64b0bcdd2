"""Evaluation and timing: the figures are counted by hand on models whose answers are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mambatrim
from mambatrim.data import Folder
from mambatrim.evaluate import Evaluation, evaluate, evaluate_models
from mambatrim.models.spec import ModelSpec, Preprocess
from mambatrim.timing import describe_disturbance, time_models

PLAIN = Preprocess((8, 8), 1.0, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Grey(nn.Module):
    """Takes the brightness of an image, 0 to 9 tenths, for its class; `wrong` answers 0 where it is to be wrong."""

    def __init__(self, classes: int = 10, names: tuple[str, ...] | None = None, wrong: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.spec = ModelSpec("grey", "toy", None, PLAIN, None, "none", "made here", names)
        self.marks = nn.Parameter(torch.arange(classes).float())
        self.wrong = wrong
        self.calls: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        tenths = (images.mean(dim=(1, 2, 3)) * 10).round()  # (B,)
        for value in self.wrong:
            tenths = torch.where(tenths == value, 0.0, tenths)
        return -(tenths.unsqueeze(1) - self.marks).abs()  # (B, classes)


class Tenths:
    """Ten images, of brightness 0.0 to 0.9, each its own class."""

    def __init__(self, classes: tuple[str, ...] = tuple("0123456789")) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (round(25.5 * index),) * 3), index


def test_shares_are_counted() -> None:
    found = evaluate(Grey(wrong=(3, 7)), Tenths(), baseline=Grey(wrong=(3,)), batch_size=4)
    assert (found.images, found.top1, found.agreement) == (10, 0.8, 0.9)
    # the two wrong answers rank the classes from 0 up: 3 is among the first five, 7 is not
    assert found.top5 == 0.9
    assert found.ms_per_image > 0


def test_without_a_baseline_there_is_no_agreement() -> None:
    found = evaluate(Grey(), Tenths())
    assert (found.top1, found.top5, found.agreement) == (1.0, 1.0, None)


def test_top5_of_five_classes_says_nothing() -> None:
    class Five(Tenths):
        def __len__(self) -> int:
            return 5

    assert evaluate(Grey(5), Five(tuple("01234"))).top5 is None


def test_limit_is_spread_over_the_data_set() -> None:
    assert evaluate(Grey(wrong=(1, 3, 5, 7, 9)), Tenths(), limit=5).top1 == 1.0
    assert evaluate(Grey(), Tenths(), limit=99).images == 10
    with pytest.raises(ValueError, match="limit must be at least 1 image, not 0"):
        evaluate(Grey(), Tenths(), limit=0)


def test_every_image_is_seen_once_beside_the_warm_up() -> None:
    model = Grey()
    evaluate(model, Tenths(), batch_size=4)
    assert model.calls == [4, 4, 4, 2]


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    evaluate_models({"a": Grey()}, Tenths(), batch_size=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_labels_go_by_name_where_names_are_known(tmp_path: Path) -> None:
    # sorted folders are black, light, white: labels 0, 1, 2; the model has them in another order
    for name, tenth in (("black", 0), ("light", 2), ("white", 1)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (round(25.5 * tenth),) * 3).save(tmp_path / name / "a.png")
    assert evaluate(Grey(names=("black", "white", "light")), tmp_path).top1 == 1.0
    assert evaluate(Grey(), str(tmp_path)).top1 == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="has a class 'light' that grey does not know: black, white"):
        evaluate(Grey(names=("black", "white")), Folder(tmp_path))


def test_folders_called_by_numbers_are_those_classes(tmp_path: Path) -> None:
    for number in (0, 2, 10):  # sorted as text: 0, 10, 2
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (8, 8), (round(25.5 * number),) * 3).save(tmp_path / str(number) / "a.png")
    assert evaluate(Grey(11), tmp_path).top1 == 1.0
    with pytest.raises(ValueError, match="the labels go up to class 10, but the model .* has only 10 classes"):
        evaluate(Grey(10), tmp_path)


def test_what_cannot_be_compared_is_refused() -> None:
    other = Grey()
    other.spec = ModelSpec("other", "toy", None, Preprocess((4, 4), 1.0, "box", *[(0.5,) * 3] * 2), None, "", "")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the models model, baseline differ"):
        evaluate(Grey(), Tenths(), baseline=other)
    with pytest.raises(ValueError, match="Linear has no spec"):
        evaluate(nn.Linear(2, 2), Tenths())
    with pytest.raises(ValueError, match="baseline must be one of the models"):
        evaluate_models({"a": Grey()}, Tenths(), baseline="b")
    with pytest.raises(ValueError, match="there is no data set"):
        evaluate(Grey(), "missing.zip")


def test_a_reduced_model_is_compared_with_its_dense_one() -> None:
    torch.manual_seed(0)
    model = mambatrim.create_model("vim_cifar10")
    same = mambatrim.reduce(model, flops_reduction=0.0)
    found = mambatrim.evaluate(same, Tenths(), baseline=model, limit=3)
    assert isinstance(found, Evaluation) and found.agreement == 1.0


# timing: the order and the words; no test of this package looks at a clock


class Logged(nn.Module):
    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, images: Tensor) -> Tensor:
        self.log.append(self.name)
        return images


def test_models_take_turns_and_the_order_is_reversed() -> None:
    log: list[str] = []
    found = time_models({name: Logged(name, log) for name in "abc"}, torch.zeros(2, 3, 8, 8), repeats=3)
    assert "".join(log) == "abc" + "abc" + "cba" + "abc"
    assert (list(found.times), found.repeats) == (["a", "b", "c"], 3)
    assert all(timing.median >= timing.fastest >= 0 and timing.spread >= 0 for timing in found.times.values())


@pytest.mark.parametrize(
    ("models", "images", "repeats", "words"),
    [({}, 1, 1, "at least one model"), ({"a": Grey()}, 0, 1, "at least one image"), ({"a": Grey()}, 1, 0, "repeats")],
)
def test_time_models_needs_something_to_time(
    models: dict[str, nn.Module], images: int, repeats: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        time_models(models, torch.zeros(images, 3, 8, 8), repeats)


def test_disturbance_is_said_where_there_is_one() -> None:
    assert describe_disturbance(others=0.02, cores=2, own=1.9, spread=0.02) == ""
    assert "other processes kept 0.9 of 2 processors busy" in describe_disturbance(0.9, 2, 1.1, 0.02)
    # there are processors enough for all
    assert describe_disturbance(others=10.0, cores=64, own=2.0, spread=0.02) == ""
    assert "the repeats differ by 40%" in describe_disturbance(0.0, 2, 1.9, 0.4)
