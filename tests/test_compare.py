"""compare: all methods at all savings on a small model; cells that are kept, found again and never mixed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mambatrim
from mambatrim import measuring, methods
from mambatrim.cells import describe, key
from mambatrim.cli import main
from mambatrim.compare import Entry, compare, in_stages, nearest
from mambatrim.comparison import Comparison
from mambatrim.models import MODELS, build
from mambatrim.opening import model_label, open_model
from mambatrim.prepared import Unlabelled, prepare
from mambatrim.reduction import NORM, Method, Schedule, inverse
from mambatrim.report import SCHEMA

IMAGES = 24


def small(seed: int = 0, d_model: int = 16) -> nn.Module:
    """A Vim of 6 blocks on 64 patches of a 16x16 picture, with random weights."""
    spec = MODELS["vim_cifar10"]
    config = replace(spec.config, image_size=(16, 16), patch=2, stride=2, d_model=d_model, depth=6, d_state=4)
    torch.manual_seed(seed)
    model = build(replace(spec, config=config, preprocess=replace(spec.preprocess, size=(16, 16))))
    with torch.no_grad():  # random heads are too small to tell pictures apart
        model.head.weight.normal_()
    return model.eval()


class Noise:
    """Pictures of noise whose labels are drawn at random."""

    def __init__(self, count: int = IMAGES, seed: int = 0) -> None:
        self.classes = MODELS["vim_cifar10"].classes or ()
        generator = np.random.default_rng(seed)
        self.pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        self.labels = generator.integers(0, 10, count)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small()


def some() -> dict[str, Method | Entry | nn.Module]:
    return {"mtr": methods.mtr(), "tome": methods.tome(), "spread": methods.get("even_spread")}


def run(
    model: nn.Module, entrants: dict[str, Method | Entry | nn.Module], out: Path | None = None, **more: object
) -> Comparison:
    given = {"targets": (0.2, 0.4), "data": Noise(), "out": out, "timing": False, **more}
    return compare({"small": model}, entrants, **given)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- figures


def test_all_methods_at_all_savings(model: nn.Module) -> None:
    targets = (0.2, 0.3, 0.4, 0.5)
    found = run(model, {name: methods.get(name) for name in methods.METHODS}, targets=targets)
    assert len(found.rows) == 1 + len(targets) * len(methods.METHODS)
    assert [row.note for row in found.rows if row.note] == []
    for row in found.rows[1:]:
        assert row.saved is not None and abs(row.saved["both"] - row.target) <= 0.005, row.name
        assert row.images == IMAGES and row.kl > 0
        assert row.drop_interval is not None and row.drop_interval.low <= row.drop <= row.drop_interval.high
        assert row.drop == pytest.approx(found.rows[0].accuracy - row.accuracy)


def test_figures_are_those_of_the_models(model: nn.Module) -> None:
    data, method = Noise(), methods.tome()
    row = run(model, {"tome": method}, reference=None).rows[2]
    images = torch.stack([mambatrim.data.preprocess(data[i][0], model.spec.preprocess) for i in range(IMAGES)])
    with torch.no_grad():
        full = model(images)
        fast = mambatrim.reduce(model, flops_reduction=0.4, method=method)(images)
    labels = torch.from_numpy(data.labels)
    assert row.accuracy == int((fast.argmax(1) == labels).sum()) / IMAGES
    assert row.agreement == int((fast.argmax(1) == full.argmax(1)).sum()) / IMAGES
    p, q = full.double().softmax(1), fast.double().softmax(1)
    assert row.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)


def test_differences_to_the_reference_are_paired(model: nn.Module) -> None:
    found = run(model, some(), reference="tome")
    rows = {(row.name, row.target): row for row in found.rows}
    for (name, target), row in rows.items():
        if name in ("tome", "dense"):
            assert row.ahead is None
        else:
            assert row.ahead == pytest.approx(row.accuracy - rows["tome", target].accuracy)
    twice = run(model, {"mtr": methods.mtr(), "again": methods.mtr()})
    again = next(row for row in twice.rows if row.name == "again")
    assert again.ahead == 0 and again.ahead_interval is not None
    assert (again.ahead_interval.low, again.ahead_interval.high) == (0, 0)


def test_without_labels_the_dense_model_is_right(model: nn.Module, tmp_path: Path) -> None:
    found = run(model, some(), data=Unlabelled(Noise()))
    assert not found.labelled and found.rows[0].accuracy == 1
    assert all(row.accuracy == row.agreement for row in found.rows)
    assert "agreement with the dense model" in found.to_markdown()
    for index in range(3):
        Noise()[index][0].save(tmp_path / f"{index}.png")
    flat = run(model, some(), data=tmp_path)
    assert not flat.labelled and flat.rows[0].images == 3


def test_smaller_dense_models_stand_beside(model: nn.Module) -> None:
    found = run(model, {**some(), "half as wide": small(1, 8)})
    row = found.rows[1]
    assert (row.name, row.target, row.ahead) == ("half as wide", 0.0, None)
    assert row.saved is not None and row.saved["both"] > 0.3 and row.kl > 0


def test_times_are_taken_beside_the_dense_model(model: nn.Module, tmp_path: Path) -> None:
    first = run(model, {"mtr": methods.mtr()}, tmp_path, targets=(0.4,), timing=True)
    timing = first.rows[1].timing
    assert timing is not None and timing.ms > 0 and timing.dense_ms > 0 and timing.batch == IMAGES
    assert first.rows[0].timing is None and "time saved" in first.to_markdown()
    assert run(model, {"mtr": methods.mtr()}, tmp_path, targets=(0.4,), timing=True).rows[1].timing == timing
    assert run(model, {"mtr": methods.mtr()}, tmp_path, targets=(0.4,)).rows[1].timing == timing


def test_schedules_of_an_entry(model: nn.Module) -> None:
    early = Entry(methods.tome(), in_stages((0, 1)))
    halfway = Entry(methods.tome(), in_stages(lambda depth: (depth // 2 - 1, depth // 2)))
    own = nearest(lambda trunk: [Schedule.constant(trunk.depth, r) for r in range(1, 100)])
    found = run(model, {"early": early, "half": halfway, "own": Entry(methods.tome(), own)}, reference=None)
    removed = {(row.name, row.target): row.removed for row in found.rows}
    assert [index for index, count in enumerate(removed["early", 0.2]) if count] == [0, 1]
    assert [index for index, count in enumerate(removed["half", 0.2]) if count] == [2, 3]
    assert len(set(removed["own", 0.2])) == 2 and removed["own", 0.2][-1] == 0  # the same everywhere but at the end


def test_what_cannot_be_has_a_note(model: nn.Module) -> None:
    found = run(model, {"late": Entry(methods.mtr(), in_stages((5,)))}, reference=None)
    assert all("no schedule with stages after blocks (5,)" in row.note for row in found.rows[1:])
    assert "- late, -20%: no schedule" in found.to_markdown()
    assert json.loads(json.dumps(found.to_report()))["results"][1]["figures"]["note"]


# --------------------------------------------------------------------------------------------------------------- cells


def test_a_stopped_run_continues(model: nn.Module, tmp_path: Path) -> None:
    whole = run(model, some(), tmp_path / "whole")
    files = sorted((tmp_path / "whole").iterdir())
    assert len(files) == len(whole.rows) == 7

    class Killed(Exception):
        pass

    def kill(done: int, total: int, now: str) -> None:
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        run(model, some(), tmp_path / "part", progress=kill)
    assert len(list((tmp_path / "part").iterdir())) == 4
    assert run(model, some(), tmp_path / "part").to_csv() == whole.to_csv()
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == [path.name for path in files]


def test_what_is_there_is_not_run_again(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, some(), tmp_path)
    for path in sorted(tmp_path.iterdir())[::2]:
        path.unlink()
    missing = 7 - len(list(tmp_path.iterdir()))
    measured = []
    answers = measuring.answers
    monkeypatch.setattr(measuring, "answers", lambda *given: measured.append(given) or answers(*given))
    assert run(model, some(), tmp_path).to_csv() == whole.to_csv()
    assert len(measured) == missing
    run(model, some(), tmp_path)
    assert len(measured) == missing


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"entrants": {"mtr": methods.mtr(score=NORM)}},
        lambda: {"entrants": {"mtr": methods.mtr(score=inverse(NORM))}},
        lambda: {"entrants": {"mtr": methods.mtr(weight=methods.plain)}},
        lambda: {"entrants": {"mtr": Entry(methods.mtr(), in_stages((1, 3)))}},
        lambda: {"model": small(1)},
        lambda: {"data": Noise(seed=1)},
        lambda: {"data": Noise(count=12)},
        lambda: {"targets": (0.41,)},
    ],
)
def test_any_change_is_another_cell(model: nn.Module, tmp_path: Path, change: Callable[[], dict[str, object]]) -> None:
    base = {"model": model, "entrants": {"mtr": methods.mtr()}, "targets": (0.4,)}
    run(**base, out=tmp_path)  # type: ignore[arg-type]
    before = set(tmp_path.iterdir())
    run(**{**base, **change()}, out=tmp_path)  # type: ignore[arg-type]
    assert before < set(tmp_path.iterdir())
    count = len(list(tmp_path.iterdir()))
    run(**{**base, "entrants": {"another name": methods.mtr()}}, out=tmp_path, reference=None)  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == count


def test_every_method_has_a_description_of_its_own() -> None:
    found = {name: key(describe(methods.get(name))) for name in methods.METHODS}
    assert found == {name: key(describe(methods.get(name))) for name in methods.METHODS}
    assert len(set(found.values())) == len(found)
    options = [
        *(methods.mtr(feature=feature) for feature in methods.FEATURES),
        *(
            methods.mtr(order=methods.as_grouped),
            methods.mtr(place=methods.centre),
            methods.mtr(combine=methods.pruned),
        ),
        *(methods.mtr(score=methods.delta(methods.forward)), methods.mtr(score=methods.delta(methods.backward))),
        *(methods.mtr(groups=methods.by_rank(methods.all_others)), methods.mtr(groups=methods.EVEN_ODD)),
        *(methods.random(1), methods.random(2), methods.tome(split=methods.WINDOWS), methods.tome()),
    ]
    assert len({key(describe(option)) for option in options}) == len(options)
    own = [Method("own", (), lambda signals, r: r + 1), Method("own", (), lambda signals, r: r + 2)]
    assert key(describe(own[0])) != key(describe(own[1]))
    with pytest.raises(ValueError, match="object of type object, which cannot be told"):
        describe(Method("own", (), object()))  # type: ignore[arg-type]


def test_without_running_there_are_only_stored_rows(model: nn.Module, tmp_path: Path) -> None:
    assert run(model, some(), tmp_path, run=False).rows == ()
    some_rows = run(model, {"mtr": methods.mtr()}, tmp_path)
    assert run(model, some(), tmp_path, run=False).rows == some_rows.rows


def test_a_damaged_cell_is_named(model: nn.Module, tmp_path: Path) -> None:
    run(model, {"mtr": methods.mtr()}, tmp_path, targets=(0.4,))
    path = next(tmp_path.glob("vim_cifar10-mtr-40-*.safetensors"))
    whole = path.read_bytes()
    for content in (b"", whole[:-40], whole.replace(b'{\\"format\\": \\"mambatrim', b'{\\"fermat\\": \\"mambatrim')):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is damaged .*; delete it, and the cell is run anew"):
            run(model, {"mtr": methods.mtr()}, tmp_path, targets=(0.4,))
    other = next(tmp_path.glob("vim_cifar10-dense-*"))
    path.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="holds another cell than its name says"):
        run(model, {"mtr": methods.mtr()}, tmp_path, targets=(0.4,))


# -------------------------------------------------------------------------------------------------------------- tables


def test_tables_can_be_read(model: nn.Module, tmp_path: Path) -> None:
    found = run(model, some(), tmp_path)
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [line["name"] for line in lines] == [row.name for row in found.rows]
    assert [float(line["accuracy"]) for line in lines] == [row.accuracy for row in found.rows]
    assert lines[0]["ahead"] == "" and float(lines[2]["ahead_low"]) <= float(lines[2]["ahead"])
    content = json.loads(json.dumps(found.to_report(), allow_nan=False))
    assert (content["schema"], content["kind"], len(content["results"])) == (SCHEMA, "compare", 7)
    result = content["results"][3]
    assert list(result) == ["name", "model", "method", "schedule", "tokens", "flops", "figures"]
    assert set(result["flops"]) == {"both", "paper", "projections"}
    assert any(result["figures"]["cell"] in path.name for path in tmp_path.iterdir())
    rows = [line.split("|") for line in found.to_markdown().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 7 and len({len(row) for row in rows}) == 1
    assert [row[1].strip() for row in rows[2:]] == [row.name for row in found.rows]


def test_the_frontier_is_a_picture(model: nn.Module, tmp_path: Path) -> None:
    found = run(model, {**some(), "narrow": small(1, 8)}, timing=True)
    paths = found.save(tmp_path)
    assert [path.name for path in paths] == ["comparison.csv", "comparison.json", "comparison.md", "frontier-small.png"]
    with Image.open(paths[-1]) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    assert picture.width > 1000 and picture.height > 400 and colours is not None and len(colours) > 50
    # without times there is one panel
    assert run(model, some()).frontier("small").width < picture.width - 400
    with pytest.raises(ValueError, match="no figures of a model 'large'; known: small"):
        found.frontier("large")


# -------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"targets": (0.95,)}, "above 0 and below 0.9, got 0.95"),
        ({"targets": (0,)}, "above 0 and below 0.9, got 0"),
        ({"targets": ()}, "at least one target"),
        ({"targets": (0.2, 0.2)}, "targets must differ"),
        ({"reference": "tomme"}, "the reference 'tomme' must be one of the methods: mtr"),
        ({"entrants": {}}, "at least one model and one method"),
        ({"entrants": {"dense": methods.mtr()}}, "'dense' being taken"),
        ({"entrants": {"mtr": methods.mtr}}, "must be Methods, Entries or dense models by name"),
        ({"data": "nothing.parquet"}, "there is no data set nothing.parquet"),
        ({"data": Noise(count=0)}, "the data set is empty"),
        ({"out": Path(__file__)}, "cells are kept in a folder, but .*test_compare.py is a file"),
    ],
)
def test_wrong_input_is_said(model: nn.Module, given: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(**{"model": model, "entrants": {"mtr": methods.mtr()}, **given})  # type: ignore[arg-type]


def test_models_must_fit(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="takes dense models and reduces them itself"):
        run(mambatrim.reduce(model, flops_reduction=0.2), {"mtr": methods.mtr()})
    spec = model.spec
    torch.manual_seed(0)
    other = build(replace(spec, config=replace(spec.config, num_classes=11))).eval()
    with pytest.raises(ValueError, match="must have the same classes, got 10, 11"):
        run(model, {"mtr": methods.mtr(), "other": other})


def test_a_text_means_a_model(tmp_path: Path) -> None:
    model = open_model("vim_cifar10")
    mambatrim.save_pretrained(model, tmp_path / "mine")
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(open_model(str(tmp_path / "mine"))(image), model(image))
        weights = tmp_path / "mine" / "model.safetensors"
        assert torch.equal(open_model(f"vim_cifar10={weights}")(image), model(image))
    assert (model_label("vim_small=a/b.pth"), model_label(str(tmp_path / "mine"))) == ("vim_small", "mine")
    for text, words in (
        ("vim_cifra10", "did you mean 'vim_cifar10'"),
        ("vim_smal=x.pth", "did you mean 'vim_small'"),
        ("vim_small", "vim_small=FILE"),
        ("vim_small=", "names no weights"),
        ("vim_small=missing.pth", "there is no file missing.pth"),
    ):
        with pytest.raises(ValueError, match=words):
            open_model(text)


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    for index in range(4):
        name = "cat" if index % 2 else "ship"
        (folder / name).mkdir(parents=True, exist_ok=True)
        Noise()[index][0].save(folder / name / f"{index}.png")
    words = ["compare", str(folder), "--out", str(out), "--no-timing", "--method", "tome", "--flops-reduction", "0.3"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert (
        "**vim_cifar10**, 4 images, labels" in printed and "| tome | -30% |" in printed and "| mtr | -30% |" in printed
    )
    assert {path.name for path in out.iterdir()} >= {"cells", "comparison.csv", "frontier-vim_cifar10.png"}
    assert main([*words, "--no-run"]) == 0
    assert capsys.readouterr().out == printed
    assert main([*words, "--no-labels", "--limit", "2", "--stages", "1", "3"]) == 0
    assert "2 images, no labels" in capsys.readouterr().out
    for more, complaint in (
        (["--method", "tomme"], "unknown method 'tomme'; did you mean 'tome'?"),
        (["--flops-reduction", "0.95"], "from 0 up to below 0.9, not 0.95"),
        (["--model", "vim_cifra10"], "did you mean 'vim_cifar10'"),
        (["--reference", "tomme"], "did you mean 'tome'"),
    ):
        assert main([*words, *more]) == 2
        assert complaint in capsys.readouterr().err


def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    exec(compile(block, "study.md", "exec"), {"data": Noise(6)})
    assert "| mtr, by norm | -30% |" in capsys.readouterr().out
    with Image.open("frontier.png") as picture:
        assert picture.width > 500


# --------------------------------------------------------------------------------------------------- images in memory


def test_images_in_memory_are_those_of_preprocess() -> None:
    how = MODELS["vim_small"].preprocess
    data = Noise(3)
    found = prepare(data, how)
    expected = torch.stack([mambatrim.data.preprocess(data[index][0], how) for index in range(3)])
    assert torch.equal(torch.cat([found.inputs(how, 0, 2), found.inputs(how, 2, 3)]), expected)
    assert found.truth(MODELS["vim_cifar10"]).tolist() == data.labels.tolist()  # type: ignore[union-attr]
    assert prepare(data, how).digest == found.digest != prepare(Noise(3, seed=1), how).digest
    assert prepare(Unlabelled(data), how).truth(MODELS["vim_cifar10"]) is None
