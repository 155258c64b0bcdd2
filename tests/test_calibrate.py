"""calibrate: a better schedule under the budget, the same one each time, kept as it is found."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import mambatrim
from mambatrim import methods
from mambatrim.calibrate import calibrate, read_schedule
from mambatrim.cli import main
from mambatrim.models import MODELS, build
from mambatrim.reduction import Schedule


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A Vim of 4 blocks on 36 patches, with random weights."""
    spec = MODELS["vim_cifar10"]
    config = replace(spec.config, image_size=(12, 12), patch=2, stride=2, d_model=16, depth=4, d_state=4)
    torch.manual_seed(0)
    made = build(replace(spec, config=config, preprocess=replace(spec.preprocess, size=(12, 12))))
    with torch.no_grad():
        made.head.weight.normal_()
    return made.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def divergence(model: nn.Module, images: torch.Tensor, removed: tuple[int, ...], method: str) -> float:
    """The definition, from one call of either model."""
    reduced = mambatrim.reduce(model, schedule=Schedule(removed), method=method)
    mine, other = model(images).double().softmax(1), reduced(images).double().softmax(1)
    return float((mine * (mine.log() - other.log())).sum(1).mean())


@pytest.mark.parametrize("method", ["vsm", "mtr"])
def test_it_keeps_the_budget_and_is_better_than_the_default(model, images, method):
    found = calibrate(model, images, 0.3, method, tries=40)
    reduced = mambatrim.reduce(model, schedule=found.schedule, method=method)
    counted = mambatrim.count_flops(reduced)
    assert (found.flops, found.dense_flops) == (counted.total, counted.dense_total)
    assert 0.3 <= 1 - counted.ratio < 0.35
    assert found.kl == pytest.approx(divergence(model, images, found.removed, method), rel=1e-4)
    assert found.kl_default == pytest.approx(divergence(model, images, found.default, method), rel=1e-4)
    assert found.kl < found.kl_default
    assert found.default == mambatrim.solve(model, 0.3, method=methods.get(method)).removed
    assert found.tried <= 40


def test_a_stopped_run_continues_and_ends_where_one_in_one_go_does(model, images, tmp_path):
    whole = calibrate(model, images, 0.3, tries=30)
    journal = tmp_path / "x.jsonl"

    class Stopped(Exception):
        pass

    def stop(done: int, most: int, least: float) -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate(model, images, 0.3, journal=journal, tries=30, progress=stop)
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("a") as file:
        file.write('{"run": "half of a li')
    assert calibrate(model, images, 0.3, journal=journal, tries=30) == whole
    lines = journal.read_text().splitlines()
    assert len(lines) == whole.tried
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    again = calibrate(model, images, 0.3, journal=journal, tries=30)
    handle.remove()
    assert again == whole and not calls
    # other images are another run, which leaves the lines of the first one alone
    calibrate(model, images[:4], 0.3, journal=journal, tries=2)
    assert journal.read_text().splitlines()[: len(lines)] == lines
    assert len(journal.read_text().splitlines()) == len(lines) + 2


def test_what_a_journal_says_is_believed(model, images, tmp_path):
    """Only so can a rerun be as cheap as it is."""
    journal = tmp_path / "x.jsonl"
    first = calibrate(model, images, 0.3, journal=journal, tries=20)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    other = next(each for each in entries[1:] if tuple(each["removed"]) not in (first.removed, first.default))
    other["kl"] = 0.0
    journal.write_text("".join(json.dumps(each) + "\n" for each in entries))
    assert calibrate(model, images, 0.3, journal=journal, tries=20).kl == 0.0


def test_bad_input_gets_a_sentence(model, images, tmp_path):
    for arguments, words in (
        ((images, 0.0), "above 0 and below 0.9"),
        ((images, True), "above 0 and below 0.9"),
        ((images[0], 0.3), "n, 3, H, W"),
        ((images[:0], 0.3), "n at least 1"),
        ((images, 0.3, "vsn"), "vsm"),
        ((images, 0.3, "vsm", None, 0), "tries must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(model, *arguments)
    with pytest.raises(ValueError, match="evaluation mode"):
        calibrate(mambatrim.reduce(model, 0.0).train(), images, 0.3)
    model.eval()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"run": "a", "removed": [1], "kl": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"line 2 of .*bad.jsonl is damaged"):
        calibrate(model, images, 0.3, journal=bad)


def test_a_schedule_in_a_file(model, images, tmp_path):
    found = calibrate(model, images, 0.3, tries=3)
    path = tmp_path / "s.json"
    path.write_text(found.to_json())
    assert Schedule.from_json(path.read_text()) == found.schedule
    stored = read_schedule(path)
    assert (stored.schedule, stored.method, stored.model) == (found.schedule, "vsm", "vim_cifar10")
    path.write_text(found.schedule.to_json())
    assert read_schedule(path).method is None
    path.write_text(calibrate(model, images, 0.3, methods.vsm(distance=0.1), tries=3).to_json())
    with pytest.raises(ValueError, match="options of its own"):
        read_schedule(path)
    for text in ("", "[]", '{"removed": [-1]}', "x" * 1000, '{"removed": [1], "method": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"s\.json") as error:
            read_schedule(path)
        assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="cannot be read"):
        read_schedule(tmp_path / "none.json")


def test_the_command(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for index in range(6):
        pixels = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(f"images/{index}.png")
    mambatrim.save_pretrained(model, "model")
    words = ["calibrate", "model", "--images", "images", "--flops-reduction", "0.3", "--tries", "5"]
    assert main([*words, "--save", "smaller"]) == 0
    shown = capsys.readouterr().out
    stored = json.loads(Path("model-vsm-30.json").read_text())
    assert f"{stored['kl']:.4f}" in shown and f"{stored['kl_default']:.4f}" in shown
    assert Path("model-vsm-30.jsonl").exists()
    saved = mambatrim.from_pretrained("smaller")
    assert (saved.reducer.method.name, list(saved.reducer.schedule.removed)) == ("vsm", stored["removed"])
    classify = ["classify", "images/0.png", "--model", "model", "--schedule", "model-vsm-30.json", "--json"]
    assert main(classify) == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert (result["method"], result["schedule"]["removed"]) == ("vsm", stored["removed"])
    for wrong, said in (
        ([*classify, "--method", "mtr"], "is for method vsm, not mtr"),
        ([*classify, "--flops-reduction", "0.2"], "not both"),
        ([*classify[:-2], "images/0.png"], "images/0.png holds no schedule"),
        ([*words, "--out", "no/where.json"], "cannot be written"),
        ([*words[:3], "nowhere"], "nowhere"),
    ):
        assert main(wrong) == 2
        printed = capsys.readouterr().err
        assert said in printed and len(printed.splitlines()) == 1, printed


def test_distillation_looks_at_no_label_and_brings_the_answers_nearer(model, images):
    """What recipes/recover.py does, in short: gradients pass through the virtual sequence."""
    torch.manual_seed(0)
    student = copy.deepcopy(mambatrim.reduce(model, flops_reduction=0.3, method="vsm"))
    with torch.no_grad():
        wanted = model(images).log_softmax(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(15):
        loss = F.kl_div(student(images).log_softmax(1), wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
