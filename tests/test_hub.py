"""Models in a folder: they come back as they were, and what is wrong with a folder is said in one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mambatrim
from mambatrim import hub, methods
from mambatrim.models import MODELS, ModelSpec, Preprocess, build
from mambatrim.models.vim import VimConfig

TINY = VimConfig((32, 32), patch=8, stride=8, d_model=32, depth=4, d_state=4, num_classes=3)

STEPS = mambatrim.Schedule((3, 0, 2, 0))


def mine() -> mambatrim.models.Model:
    """A model that is in no zoo."""
    torch.manual_seed(0)
    prepared = Preprocess((32, 32), 0.9, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), squash=True)
    return build(ModelSpec("my_vim", "vim", TINY, prepared, None, "MIT", "my thesis", ("cat", "dog", "Ölpalme"))).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    mambatrim.save_pretrained(mambatrim.reduce(mine(), flops_reduction=0.2), tmp_path / "deep" / "saved")
    return tmp_path / "deep" / "saved"


@torch.no_grad()
def test_a_model_that_is_in_no_zoo_comes_back_with_its_reducer(folder):
    model, back = mine(), mambatrim.from_pretrained(folder)
    fast, images = mambatrim.reduce(model, flops_reduction=0.2), torch.randn(2, 3, 32, 32)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert back.spec == model.spec and back.reducer.extra_repr() == fast.reducer.extra_repr()
    assert torch.equal(back(images), fast(images)) and not back.training
    mambatrim.save_pretrained(model, folder)  # over the first one
    assert torch.equal(mambatrim.from_pretrained(str(folder))(images), model(images))


@torch.no_grad()
def test_another_input_size_and_precision_come_back(tmp_path):
    model = mambatrim.create_model("vim_cifar10", weights="bundled", image_size=(32, 48), dtype=torch.bfloat16)
    mambatrim.save_pretrained(model, tmp_path)
    back, images = mambatrim.from_pretrained(tmp_path), torch.randn(1, 3, 32, 48)
    assert back.spec.preprocess.size == (32, 48) and torch.equal(back(images), model(images))
    assert {p.dtype for p in back.parameters()} == {torch.float32, torch.bfloat16}


def test_the_hub_is_asked_for_both_files(folder, monkeypatch):
    asked = []

    def download(repo: str, file: str, revision: str | None) -> Path:
        asked.append((repo, file, revision))
        return folder / file

    monkeypatch.setattr(hub, "download", download)
    assert mambatrim.from_pretrained("someone/my-vim", revision="v2").spec.name == "my_vim"
    assert asked == [("someone/my-vim", file, "v2") for file in ("config.json", "model.safetensors")]


def changed(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    for name, value in entries.items():
        inside = config[name]
        config[name] = inside | value if isinstance(value, dict) and isinstance(inside, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"format": "other"}, "is not a configuration that save_pretrained wrote"),
        ({"family": "vin"}, "describes no model: unknown family 'vin'; did you mean 'vim'?"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"dtype": 16}, "unknown dtype 16"),
        ({"licence": None}, "licence must be of type str, not None"),
        ({"classes": [1, 2]}, "classes must be of type str, not 1"),
        ({"config": {"width": 3}}, "config has an unknown field 'width'; known: image_size"),
        ({"config": {"d_model": "32"}}, "config.d_model must be of type int, not '32'"),
        ({"config": {"d_model": True}}, "config.d_model must be of type int, not True"),
        ({"config": {"d_model": -1}}, "describes no model"),
        ({"config": {"image_size": [32]}}, "config.image_size must be of type tuple"),
        ({"config": {"d_model": 100_000}}, "the weights do not fit my_vim"),
        ({"config": {"num_classes": 4}}, "head.weight has the shape (3, 32) and not (4, 32)"),
        ({"config": 3}, "config must have fields by name"),
        ({"preprocess": {"interpolation": "cubic"}}, "unknown interpolation 'cubic'"),
        ({"family": "mamba_reg", "config": {}}, "the weights do not fit my_vim of the family mamba_reg"),
        ({"reducer": {"method": "mtrr"}}, "a reducer that does not fit its model: unknown method 'mtrr'"),
        ({"reducer": {"removed": [1, 2]}}, "schedule must be a Schedule for the 4 blocks"),
        ({"reducer": {"removed": [1, -2, 0, 0]}}, "whole numbers from 0 up, got -2"),
        ({"reducer": {"removed": [16, 0, 0, 0]}}, "16 of 16 patches"),
        ({"reducer": "mtr"}, "it has method, removed and perhaps stem, or is null"),
        ({"reducer": {"stem": "3"}}, "stem must be of type int, not '3'"),
        ({"reducer": {"stem": -3}}, "whole numbers from 0 up, got -3"),
        ({"extra": 1}, "has an unknown entry 'extra'"),
    ],
)
def test_a_wrong_configuration_is_named(entries, words, folder):
    if "extra" in entries:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(config | entries))
    else:
        changed(folder, **entries)
    with pytest.raises(ValueError) as caught:
        mambatrim.from_pretrained(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "has no config.json"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("config.json", b"", "is damaged, or no JSON"),
        ("config.json", b"\xff\xfe{", "is damaged, or no JSON"),
        ("config.json", b"[" * 100_000, "is damaged, or no JSON"),
        ("config.json", b"[]", "is not a configuration that save_pretrained wrote"),
        ("model.safetensors", b"miaow", "is no checkpoint"),
        ("model.safetensors", b"\x80\x02cos\nsystem\n.", "damaged or no checkpoint"),
    ],
)
def test_a_damaged_folder_is_named(name, content, words, folder):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        mambatrim.from_pretrained(folder)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_cut_off_is_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        mambatrim.from_pretrained(folder)


def test_wrong_places_are_named(folder, tmp_path):
    for source, words in (
        (tmp_path / "nothing", "there is no folder"),
        (folder / "config.json", "is a file; give the folder"),
        ("vim_small", "there is no folder vim_small"),
    ):
        with pytest.raises(ValueError, match=words):
            mambatrim.from_pretrained(source)
    shutil.copy(folder / "config.json", tmp_path / "taken")
    with pytest.raises(ValueError, match="taken cannot be made a folder"):
        mambatrim.save_pretrained(mine(), tmp_path / "taken")


def test_what_a_configuration_cannot_hold_is_refused(tmp_path):
    model = mine()
    for method in (methods.mtr(feature="update"), methods.tome(feature="update"), replace(methods.mtr(), name="own")):
        with pytest.raises(ValueError, match="which is all that a configuration can hold"):
            mambatrim.save_pretrained(mambatrim.reduce(model, schedule=STEPS, method=method), tmp_path)
    with pytest.raises(ValueError, match="resize the model before it is reduced"):
        mambatrim.save_pretrained(mambatrim.reduce(model, schedule=STEPS, image_size=48), tmp_path)
    model.spec = None
    with pytest.raises(ValueError, match="takes a model with a spec"):
        mambatrim.save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_method_with_its_default_options_can_be_saved():
    assert [name for name in methods.METHODS if not hub.is_usual(methods.get(name))] == []


def test_a_config_of_another_family_is_refused():
    with pytest.raises(ValueError, match="the config of the family vmamba is a VMambaConfig, not a VimConfig"):
        build(replace(MODELS["vmamba_tiny_s1l8"], config=TINY))


def test_another_sequence_policy_is_refused(tmp_path):
    """A name cannot say it, and the model must not come back as another one."""
    model = mambatrim.create_model("vim_cifar10")
    fast = mambatrim.reduce(model, 0.3, method=mambatrim.methods.running(mambatrim.methods.mtr()))
    with pytest.raises(ValueError, match="not one of the library with its default options"):
        mambatrim.save_pretrained(fast, tmp_path / "model")
