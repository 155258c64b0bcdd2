"""Checkpoints: what is read, what is refused, and in which words."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mambatrim.models.checkpoint import detect_family, load, read_state_dict, resolve
from mambatrim.models.spec import CheckpointFile, ModelSpec, Preprocess

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
IMAGENET = Preprocess((224, 224), 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def spec_for(key: str = "model") -> ModelSpec:
    file = CheckpointFile("some-lab/some-model", "weights.pth", key, entries=2, parameters=8, top1=None)
    return ModelSpec("toy", "vim", None, IMAGENET, file, "Apache-2.0", "made here")


def weights(value: float = 1.0) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), value), "bias": torch.full((2,), value)}


def official(path: Path) -> Path:
    """A file as the official training script of Vim saves it."""
    content = {
        "model": weights(1.0),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}},
            "param_groups": [{"lr": 1e-3}],
        },
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 299,
        "model_ema": weights(2.0),
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vim_small", lr=1e-3, data_path=None),
    }
    torch.save(content, path)
    return path


def one_sentence(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "weights_only" not in text
    return text


def assert_same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(given) == list(wanted)
    for name in wanted:
        assert torch.equal(given[name], wanted[name]), name


def test_official_file_gives_the_weights_and_not_their_average(tmp_path: Path) -> None:
    assert_same(read_state_dict(official(tmp_path / "vim.pth")), weights(1.0))


def test_key_is_explicit_first_then_that_of_the_spec(tmp_path: Path) -> None:
    path = official(tmp_path / "vim.pth")
    assert_same(read_state_dict(path, "model_ema"), weights(2.0))
    assert_same(read_state_dict(path, spec=spec_for("model_ema")), weights(2.0))
    assert_same(read_state_dict(path, "model", spec_for("model_ema")), weights(1.0))


def test_a_file_without_the_spec_s_key_is_read_all_the_same(tmp_path: Path) -> None:
    torch.save(weights(3.0), tmp_path / "bare.pth")
    assert_same(read_state_dict(tmp_path / "bare.pth", spec=spec_for("model_ema")), weights(3.0))


def test_a_named_key_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights under the key 'ema'; it has: model, model_ema") as error:
        read_state_dict(official(tmp_path / "vim.pth"), "ema")
    one_sentence(error)


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrapper: str, prefix: str) -> None:
    torch.save({wrapper: {prefix + name: value for name, value in weights().items()}}, tmp_path / "file.pth")
    assert_same(read_state_dict(tmp_path / "file.pth"), weights())


def test_a_prefix_in_the_middle_of_a_name_stays(tmp_path: Path) -> None:
    torch.save({"head.module.weight": torch.ones(1)}, tmp_path / "file.pth")
    assert list(read_state_dict(tmp_path / "file.pth")) == ["head.module.weight"]


def test_two_entries_for_one_name_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1), "module.weight": torch.zeros(1)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="two entries for weight"):
        read_state_dict(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["file.safetensors", "file.pth", "file"])
def test_safetensors_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file({name: value.half() for name, value in weights().items()}, tmp_path / name)
    state = read_state_dict(str(tmp_path / name))
    assert {key: (tuple(value.shape), value.dtype) for key, value in state.items()} == {
        "weight": ((2, 3), torch.float16),
        "bias": ((2,), torch.float16),
    }


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    torch.save({"model": weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(tmp_path / "old.pth"), weights())


class Runs:
    """Writes a file when it is unpickled by a reader that trusts it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {"model": weights(), "extra": Runs(tmp_path / "trace")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"wants to use \w+\.mkdir .* refused") as error:
        read_state_dict(tmp_path / "evil.pth")
    one_sentence(error)
    assert not (tmp_path / "trace").exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"extra": Runs(tmp_path / "trace")}))
    with pytest.raises(ValueError, match="is no checkpoint") as error:
        read_state_dict(tmp_path / "evil.pth")
    one_sentence(error)
    assert not (tmp_path / "trace").exists()


def make_text(path: Path) -> None:
    path.write_text("These are not the weights that you are looking for.\n")


def make_short_text(path: Path) -> None:
    path.write_text("no")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday/beach.txt", "sand")


def make_half(path: Path) -> None:
    official(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_half_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def make_list(path: Path) -> None:
    torch.save([torch.ones(2)], path)


def make_without_tensors(path: Path) -> None:
    torch.save({"epoch": 3, "model": {}}, path)


def make_tensor_and_text(path: Path) -> None:
    torch.save({"model": {"weight": torch.ones(2), "version": "two"}}, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_text, "is no checkpoint"),
        (make_short_text, "is no checkpoint"),
        (make_empty, "is empty"),
        (make_zip, "is damaged or no checkpoint"),
        (make_half, "is damaged or no checkpoint"),
        (make_half_safetensors, "is damaged or no checkpoint"),
        (make_list, "holds a list and not weights"),
        (make_without_tensors, "holds no weights: .* only epoch, model"),
        (make_tensor_and_text, "entry 'version' of the weights is of type str"),
        (Path.mkdir, "is not a file but a folder"),
        (lambda path: None, "there is no file"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path: Path, make, words: str) -> None:
    path = tmp_path / "file.pth"
    make(path)
    with pytest.raises(ValueError, match=words) as error:
        read_state_dict(path)
    assert str(path) in one_sentence(error)


@pytest.mark.parametrize("kind", ["new", "old", "safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("error")
def test_damage_anywhere_is_a_value_error_or_harmless(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    path = tmp_path / "file"
    if kind == "safetensors":
        safetensors.torch.save_file(weights(), path)
    else:
        torch.save({"model": weights()}, path, _use_new_zipfile_serialization=kind == "new")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.unlink()  # the tensors of the last example may still map the file
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        read_state_dict(path)
    except ValueError as error:
        assert "\n" not in str(error)


def test_load_is_strict_and_casts_to_the_model_s_type() -> None:
    model = nn.Linear(3, 2)
    load(model, {name: value.half() for name, value in weights(0.5).items()}, spec_for())
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, torch.full((2, 3), 0.5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": None}, "bias is missing .1 entries for 2"),
        ({"rope.freqs_cos": torch.ones(4)}, "the model has no rope.freqs_cos"),
        ({"weight": torch.ones(2, 4)}, r"weight has the shape \(2, 4\) and not \(2, 3\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.int8)}, "weight is of type torch.int8"),
    ],
)
def test_load_names_the_first_thing_that_does_not_fit(change: dict[str, Tensor | None], words: str) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    state = {name: value for name, value in (weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=words) as error:
        load(model, state, spec_for())
    assert "toy of the family vim" in one_sentence(error)
    assert torch.equal(model.weight, before)


def test_load_says_what_the_weights_look_like() -> None:
    state = weights() | {"pos_embed_cls": torch.ones(1)}
    with pytest.raises(ValueError, match="by their names the weights are of mamba_reg"):
        load(nn.Linear(3, 2), state, spec_for())


def test_load_drops_what_training_scripts_leave_beside_the_weights() -> None:
    leftovers = ["ema_norm_weight", "distill_head.weight", "clip_decoder.0.bias", "norm.num_batches_tracked"]
    model = nn.Linear(3, 2)
    load(model, weights(4.0) | dict.fromkeys(leftovers, torch.ones(1)), spec_for())
    assert torch.equal(model.bias, torch.full((2,), 4.0))


def test_load_keeps_such_an_entry_where_the_model_has_it() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    state = {name: torch.full_like(value, 7) for name, value in model.state_dict().items()}
    load(model, state, spec_for())
    assert model[0].num_batches_tracked == 7


FAMILIES = {
    "keys_vim_*.json": ("vim", "videomamba"),
    "keys_videomamba_image_*.json": ("vim", "videomamba"),
    "keys_videomamba_video_*.json": ("videomamba",),
    "keys_mambar_*.json": ("mamba_reg",),
    "keys_local_vim_*.json": ("local_vim",),
    "keys_plainmamba_*.json": ("plain_mamba",),
    "keys_vmamba_*.json": ("vmamba",),
    "keys_vanilla_vmamba_*.json": ("vmamba",),
    "keys_local_vmamba_*.json": ("local_vmamba",),
    "keys_mambavision_*.json": ("mambavision",),
}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the lists of official keys in ../shared/golden")
@pytest.mark.parametrize("pattern", FAMILIES)
def test_families_are_known_by_the_official_names(pattern: str) -> None:
    files = sorted(GOLDEN.glob(pattern))
    assert files
    for file in files:
        names = json.loads(file.read_text())["state"]
        assert detect_family(dict.fromkeys(names, torch.ones(1))) == FAMILIES[pattern], file.name


def test_family_of_unknown_names_is_none() -> None:
    assert detect_family(weights()) == ()
    assert detect_family({"cls_token": torch.ones(1), "layers.0.mixer.A_b_log": torch.ones(1)}) == ("vim", "videomamba")


def test_resolve_prefers_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some-lab" / "some-model"
    file.parent.mkdir()
    file.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert resolve("some-lab/some-model", spec_for()).read_bytes() == b"x"
    assert resolve(file) == file


@pytest.mark.parametrize("name", ["vim.pth", "./vim", "../a/b", "/no/such/file.pth", "runs/best.pth", "a b/c", "a/b?c"])
def test_resolve_says_that_a_file_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match="there is no file") as error:
        resolve(name, spec_for())
    assert name in one_sentence(error)


def test_a_name_in_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no file runs/last"):
        resolve("runs/last", spec_for())


def test_an_unknown_hub_id_needs_a_file_name() -> None:
    with pytest.raises(ValueError, match="name the file in it too, as in other-lab/model:weights.pth") as error:
        resolve("other-lab/model", spec_for())
    one_sentence(error)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("some-lab/some-model", "weights.pth"),
        ("some-lab/some-model:other.pth", "other.pth"),
        ("some-lab/some-model/sub/other.pth", "sub/other.pth"),
    ],
)
def test_resolve_finds_what_the_hub_s_cache_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    snapshot = tmp_path / "models--some-lab--some-model" / "snapshots" / "abc"
    (snapshot / file).parent.mkdir(parents=True)
    (snapshot / file).write_bytes(b"cached")
    refs = tmp_path / "models--some-lab--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve(name, spec_for()).read_bytes() == b"cached"


def test_resolve_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")

    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="could not be downloaded .*Name or service.* fetch weights.pth from") as error:
        resolve("some-lab/some-model", spec_for())
    one_sentence(error)


def test_resolve_without_the_hub_s_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="huggingface_hub is not installed; fetch weights.pth"):
        resolve("some-lab/some-model", spec_for())


@pytest.mark.parametrize(
    "change",
    [
        {"size": (0, 224)},
        {"crop": 0.0},
        {"crop": 1.1},
        {"interpolation": "cubic"},
        {"mean": (0.5, 0.5)},
        {"std": (0.2, 0.0, 0.2)},
    ],
)
def test_preprocess_refuses_what_cannot_be_used(change: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "size": (8, 8),
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    with pytest.raises(ValueError, match=next(iter(change))):
        Preprocess(**(fields | change))
