"""The command: what it prints, what it complains about, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

import mambatrim
from mambatrim import cli, demo
from mambatrim.cli import main

Capture = pytest.CaptureFixture[str]


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command itself, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mambatrim", *words], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").save(path)
    return str(path)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "notes.jpg"
    path.write_text("not a picture")
    return str(path)


def sentence(captured: str) -> str:
    """The one line that is on stderr."""
    lines = captured.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mambatrim: "), captured
    assert "Traceback" not in captured
    return lines[0]


# help


def test_help_fits_on_one_screen_and_names_every_command() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) <= 24
    assert all(word in done.stdout for word in ("demo", "classify", "info"))


@pytest.mark.parametrize("words", [("demo",), ("classify",), ("info",)])
def test_each_command_has_help(words: tuple[str, ...], capsys: Capture) -> None:
    assert main([*words, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mambatrim {mambatrim.__version__}\n"


# classify


def test_classify_prints_the_first_classes(photo: str) -> None:
    done = run("classify", photo, "--flops-reduction", "0.4", "--top", "3")
    assert (done.returncode, done.stderr) == (0, "")
    name, *classes = done.stdout.splitlines()
    assert name == photo and len(classes) == 3
    model = mambatrim.reduce(mambatrim.create_model("vim_cifar10", weights="bundled"), flops_reduction=0.4)
    logits = model(mambatrim.load_images(photo, model.spec))[0]
    assert model.spec is not None and model.spec.classes is not None
    assert classes[0].split()[-1] == model.spec.classes[int(logits.argmax())]
    shares = [float(line.split()[0]) for line in classes]
    assert shares == sorted(shares, reverse=True)


def test_classify_in_json(photo: str, capsys: Capture) -> None:
    assert (
        main(["classify", photo, photo, "--flops-reduction", "0.3", "--method", "prune", "--top", "2", "--json"]) == 0
    )
    (entry,) = json.loads(capsys.readouterr().out)["results"]
    assert (entry["model"], entry["method"]) == ("vim_cifar10", "prune")
    images = entry["figures"]["images"]
    assert [image["path"] for image in images] == [photo, photo] and entry["figures"]["failed"] == []
    assert images[0]["classes"] == images[1]["classes"] and len(images[0]["classes"]) == 2


def test_a_model_without_class_names_prints_numbers(photo: str, tmp_path: Path, capsys: Capture) -> None:
    save_file(mambatrim.create_model("vim_tiny").state_dict(), tmp_path / "weights.safetensors")
    assert main(["classify", photo, "--model", "vim_tiny", "--weights", str(tmp_path / "weights.safetensors")]) == 0
    assert " class " in capsys.readouterr().out


def test_a_bad_image_among_good_ones_is_reported(photo: str, text: str) -> None:
    done = run("classify", text, photo, "--top", "1")
    assert done.returncode == 1
    assert "notes.jpg is no image" in sentence(done.stderr)
    assert len(done.stdout.splitlines()) == 2 and done.stdout.startswith(photo)


def test_a_bad_image_is_in_the_json_too(photo: str, text: str, capsys: Capture) -> None:
    assert main(["classify", text, photo, "--json"]) == 1
    (failed,) = json.loads(capsys.readouterr().out)["results"][0]["figures"]["failed"]
    assert failed["path"] == text and "is no image" in failed["reason"]


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is no image"),
        (lambda path: path.write_text("miaow"), "is no image"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (truncated, "is a damaged or incomplete image"),
        (lambda path: Image.new("L", (1, 9_000_000)).save(path, "PNG"), "too narrow"),
    ],
)
def test_only_bad_images_end_with_2(make: object, words: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "cat.jpg"
    make(path)  # type: ignore[operator]
    assert main(["classify", str(path)]) == 2
    captured = capsys.readouterr()
    assert words in sentence(captured.err) and captured.out == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--model", "vim_tinny"), "unknown model 'vim_tinny'; did you mean 'vim_tiny'?"),
        (("--model", "vim_small"), "vim_small needs --weights: a checkpoint file, or hustvl/Vim-small-midclstok"),
        (("--model", "vim_tiny_plus"), "vim_tiny_plus needs --weights"),
        (("--method", "mtrr"), "unknown method 'mtrr'; did you mean 'mtr'?"),
        (("--weights", "missing.pth"), "there is no file missing.pth"),
        (("--flops-reduction", "0.9"), "from 0 up to below 0.9, not 0.9"),
        (("--flops-reduction", "-0.1"), "from 0 up to below 0.9, not -0.1"),
        (("--flops-reduction", "nan"), "from 0 up to below 0.9, not nan"),
        (("--flops-reduction", "much"), "from 0 up to below 0.9, not much"),
        (("--top", "0"), "whole number from 1 up, not 0"),
        (("--colour",), "unrecognized arguments: --colour"),
    ],
)
def test_bad_words_end_with_2_and_one_sentence(
    words: tuple[str, ...], complaint: str, photo: str, capsys: Capture
) -> None:
    assert main(["classify", photo, *words]) == 2
    captured = capsys.readouterr()
    assert complaint in sentence(captured.err) and captured.out == ""


@pytest.mark.parametrize("words", [(), ("classify",), ("clasify", "a.png"), ("demo", "--limit", "none")])
def test_bad_usage_ends_with_2(words: tuple[str, ...], capsys: Capture) -> None:
    assert main(words) == 2
    sentence(capsys.readouterr().err)


def test_weights_of_another_model_are_refused(photo: str, tmp_path: Path, capsys: Capture) -> None:
    save_file(mambatrim.create_model("vim_cifar10").state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    for file, words in (("weights.safetensors", "the weights do not fit vim_tiny"), ("text.pth", "is no checkpoint")):
        assert main(["classify", photo, "--model", "vim_tiny", "--weights", str(tmp_path / file)]) == 2
        assert words in sentence(capsys.readouterr().err)


# info


def test_info_lists_the_models(capsys: Capture) -> None:
    assert main(["info"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert listed == mambatrim.list_models()


def test_info_tells_about_one(capsys: Capture) -> None:
    assert main(["info", "vim_small", "--flops-reduction", "0.4"]) == 0
    out = capsys.readouterr().out
    facts = (
        "25,796,584",
        "197: 196 patches",
        "Apache-2.0",
        "80.5 %",
        "vim_s_midclstok_80p5acc.pth",
        "5.912 G",
        "5.077 G",
    )
    assert [fact for fact in facts if fact not in out] == []
    assert "after blocks 0, 4, 8, 12" in out


def test_info_in_json_and_for_another_size(capsys: Capture) -> None:
    assert main(["info", "vim_tiny", "--flops-reduction", "0.2", "--image-size", "384", "--json"]) == 0
    dense, reduced = json.loads(capsys.readouterr().out)["results"]
    assert dense["tokens"] == [577] * 24 and reduced["tokens"][0] == 577 > reduced["tokens"][-1]
    assert dense["figures"]["parameters"] == 7_148_008


def test_info_of_nothing_ends_with_2(capsys: Capture) -> None:
    for words, complaint in (
        (["vim_huge"], "unknown model 'vim_huge'"),
        (["vim_tiny", "--image-size", "3"], "3"),
        (["--flops-reduction", "0.4"], "name a model"),
    ):
        assert main(["info", *words]) == 2
        assert complaint in sentence(capsys.readouterr().err)


# demo

DEMO_ROWS = [f"{method} -{saving}%" for method in ("mtr", "vsm") for saving in (20, 30, 40)]


def test_demo_prints_a_table_and_writes_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(demo, "REPEATS", 1)
    out = tmp_path / "tokens.png"
    assert main(["demo", "--limit", "20", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = [line.partition("  ")[0] for line in printed.splitlines() if line.startswith(("dense", "mtr", "vsm"))]
    assert rows == ["dense", *DEMO_ROWS]
    assert "on 20 CIFAR-10 test images" in printed and str(out) in printed
    with Image.open(out) as picture:
        assert picture.width > 800 and picture.height > 800


def test_demo_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(demo, "REPEATS", 1)
    assert main(["demo", "--limit", "10", "--json", "--out", str(tmp_path / "tokens.jpg")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in content["results"]] == ["dense", *DEMO_ROWS]
    dense, *reduced = content["results"]
    assert (dense["figures"]["images"], dense["figures"]["agreement"]) == (10, 1.0)
    for entry, saving in zip(reduced, 2 * (0.2, 0.3, 0.4), strict=True):
        assert 1 - entry["flops"]["both"] / dense["flops"]["both"] == pytest.approx(saving, abs=0.005)
        assert entry["figures"]["ms_per_image"] > 0


@pytest.mark.parametrize("out", ["picture.txt", "nowhere/picture.png"])
def test_demo_says_at_once_that_the_picture_cannot_be_written(out: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo", "--out", str(tmp_path / out)]) == 2
    assert out in sentence(capsys.readouterr().err)


# the process


def test_a_reader_that_leaves_is_no_error(photo: str) -> None:
    command = [sys.executable, "-m", "mambatrim", "classify", *[photo] * 60, "--top", "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read().decode()
    assert (process.returncode, complaint) == (0, "")


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "create_model", interrupted)
    assert main(["classify", "a.png"]) == 128 + signal.SIGINT
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="only there does the command start itself once more")
def test_the_command_does_not_spin_beside_other_processes(photo: str, tmp_path: Path) -> None:
    program = (
        "import os; from mambatrim.cli import main; main(); print({k: os.environ[k] for k in NAMES if k in os.environ})"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    (tmp_path / "mambatrim").write_text(program.replace("NAMES", str(names)))
    for given in ({}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        environment = {name: value for name, value in os.environ.items() if name not in names} | given
        wanted = str(given or cli.WAITING)
        command = [sys.executable, str(tmp_path / "mambatrim"), "classify", photo, "--top", "1"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
        assert done.stdout.splitlines()[-1] == wanted


def test_file_names_that_the_terminal_cannot_write_are_no_error(tmp_path: Path) -> None:
    path = tmp_path / "картина.png"
    Image.new("RGB", (8, 8)).save(path)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mambatrim", "classify", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
