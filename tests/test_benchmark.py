"""The benchmark: what it runs, what it counts, what it measures of memory, and its command. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mambatrim
from mambatrim import benchmark, timing
from mambatrim.benchmark import chart, rivals, timed
from mambatrim.cli import main
from mambatrim.kernels import cpu

SMALL = benchmark.Setting("vim_cifar10", batch=2)


@pytest.fixture(scope="module")
def measured():
    return benchmark.measure(SMALL, (0.2, 0.4), ("mtr", "tome"), repeats=1)


def test_dense_first_then_each_method_at_each_reduction_then_the_others(measured):
    names = [one.name for one in measured.found if one.kind != "scan"]
    assert names == ["dense", "mtr -20 %", "mtr -40 %", "tome -20 %", "tome -40 %", "ViT 160 x 6"]
    scans = [one for one in measured.found if one.kind == "scan"]
    assert [one.name for one in scans[:3]] == ["scan: kernel", "scan: reference loop", "scan: materialised loop"]
    assert scans[0].versus == 1.0


def test_ratios_are_those_of_the_flops_and_of_the_times(measured):
    dense, *_ = measured.found
    model = mambatrim.create_model("vim_cifar10")
    for one in measured.found[1:5]:
        method, share = one.name.split(" -")
        fast = mambatrim.reduce(model, flops_reduction=int(share[:2]) / 100, method=method)
        assert one.ideal == pytest.approx(1 / mambatrim.count_flops(fast).ratio)
        assert one.tokens == mambatrim.count_flops(fast).lengths
        assert one.versus == dense.timing.median / one.timing.median
        assert one.realised == one.versus / one.ideal
    assert all(one.ideal is None and one.realised is None for one in measured.found[5:])


def test_report_is_of_the_common_schema(measured):
    report = benchmark.to_report([measured])
    assert (report["schema"], report["kind"]) == ("mambatrim-report-1", "benchmark")
    entry = report["results"][2]
    assert (entry["name"], entry["method"], entry["model"]) == ("mtr -40 %", "mtr", "vim_cifar10")
    assert entry["figures"]["batch"] == 2 and entry["figures"]["dtype"] == "fp32"
    assert len(report["results"]) == len(measured.found)
    json.dumps(report, allow_nan=False)


def test_every_setting_is_run():
    found = benchmark.settings(["vim_tiny", "vim_small"], [1, 8], ["fp32", "bf16"], None, "cpu")
    assert len(set(found)) == 8
    assert [setting.model for setting in found] == ["vim_tiny"] * 4 + ["vim_small"] * 4


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "vim_tinny", "did you mean"),
        ("dtype", "fp16", "fp32"),
        ("batch", 0, "at least 1"),
        ("device", "tpu", "cuda"),
    ],
)
def test_a_wrong_setting_gets_a_sentence(field, value, words):
    with pytest.raises(ValueError, match=words):
        benchmark.Setting(**({"model": "vim_tiny"} | {field: value}))


# -------------------------------------------------------------------------------------------------------------- rivals


@pytest.mark.parametrize(
    ("name", "rival", "parameters"), [("vim_tiny", "DeiT-T", 5_717_416), ("vim_small", "DeiT-S", 22_050_664)]
)
def test_the_plain_transformer_has_the_published_size(name, rival, parameters):
    found, *_ = rivals.rivals(mambatrim.create_model(name), None, torch.float32, torch.device("cpu"))
    assert found.name == rival
    assert sum(p.numel() for p in found.model.parameters()) == parameters
    assert found.tokens == (197,) * 12
    # PyTorch's counter does not know the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        assert found.run(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert found.macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_the_plain_transformer_computes_attention():
    """Against PyTorch's own encoder layer with the same weights."""
    torch.manual_seed(0)
    block = rivals._VitBlock(64, 4).eval()
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.qkv.weight,
            "self_attn.in_proj_bias": block.qkv.bias,
            **{f"self_attn.out_proj.{n}": p for n, p in block.proj.named_parameters()},
            **{f"linear1.{n}": p for n, p in block.fc1.named_parameters()},
            **{f"linear2.{n}": p for n, p in block.fc2.named_parameters()},
            **{f"norm1.{n}": p for n, p in block.norm1.named_parameters()},
            **{f"norm2.{n}": p for n, p in block.norm2.named_parameters()},
        }
    )
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(block(x), layer(x), atol=1e-5, rtol=1e-5)


def test_a_video_model_is_compared_with_as_many_tokens():
    with torch.device("meta"):
        model = mambatrim.create_model("videomamba_tiny_f8")
        found = rivals.rivals(model, None, torch.float32, torch.device("meta"))
    assert found[0].tokens == (8 * 196 + 1,) * 12


def test_models_that_are_not_flat_have_no_rival():
    with torch.device("meta"):
        assert (
            rivals.rivals(mambatrim.create_model("vmamba_tiny_s1l8"), None, torch.float32, torch.device("meta")) == []
        )


def test_other_scans_compute_the_same():
    arguments = rivals.scan_arguments(2, 11, 24, 4)
    expected = rivals.loop_scan(**arguments)
    for scan in rivals.scans().values():
        torch.testing.assert_close(scan(**arguments), expected, atol=1e-4, rtol=1e-4)


def test_a_scan_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(timed, "scans", lambda: {"wrong": lambda **arguments: 2 * rivals.loop_scan(**arguments)})
    with pytest.raises(ValueError, match="something else"):
        timed.time_scans(rivals.scan_arguments(1, 5, 16, 4), 1)


# ------------------------------------------------------------------------------------------------------ memory and time


@pytest.mark.skipif(benchmark.forward_memory(lambda: None) is None, reason="the system does not tell the peak")
def test_memory_is_the_peak_and_not_the_sum():
    size = 64 * 2**20

    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(size // 4)

    def together() -> None:
        kept = [torch.ones(size // 4) for _ in range(3)]
        kept.clear()

    def untouched() -> None:
        torch.empty(size)

    assert benchmark.forward_memory(one_after_the_other) == pytest.approx(size, rel=0.1)
    assert benchmark.forward_memory(together) == pytest.approx(3 * size, rel=0.1)
    assert benchmark.forward_memory(untouched) < size // 8


def test_rounds_end_with_the_time_but_not_before_the_third():
    calls = []
    found = timing.time_functions({"a": lambda: calls.append(1)}, repeats=1000, seconds=1e-9)
    assert found.repeats == 3 and len(calls) == 4
    assert timing.time_functions({"a": lambda: None}, repeats=2, seconds=1e-9).repeats == 2
    with pytest.raises(ValueError, match="above 0"):
        timing.time_functions({"a": lambda: None}, seconds=0)


# ------------------------------------------------------------------------------------------------------------- picture


def test_the_picture_marks_what_the_flops_promise(measured):
    picture = benchmark.draw([measured, measured], "some machine")
    assert picture.size[0] == chart.WIDTH
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert {chart.PROMISE, *chart.COLOURS.values()} <= colours
    with pytest.raises(ValueError, match="nothing to draw"):
        benchmark.draw([], "some machine")


# ------------------------------------------------------------------------------------------------------------- command

WORDS = ("benchmark", "vim_cifar10", "--batch", "1", "--repeats", "1", "--flops-reduction", "0.4", "--alone")


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys):
    files = ("--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"))
    assert main([*WORDS, "--dtype", "fp32", "bf16", *files]) == 0
    out = capsys.readouterr().out
    assert "vim_cifar10, batch 1, fp32" in out and "vim_cifar10, batch 1, bf16" in out and "mtr -40 %" in out
    assert "scan:" not in out and "ViT" not in out
    report = json.loads((tmp_path / "b.json").read_text())
    assert [entry["figures"]["dtype"] for entry in report["results"]] == ["fp32", "fp32", "bf16", "bf16"]
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size[0] == chart.WIDTH


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("vim_tinny",), "did you mean 'vim_tiny'"),
        (("--method", "mrt"), "did you mean 'mtr'"),
        (("--dtype", "fp16"), "invalid choice: 'fp16'"),
        (("--batch", "0"), "whole number from 1 up"),
        (("--seconds", "-1"), "above 0"),
        (("--json", "/no/such/folder/b.json"), "no folder that one may write to"),
        (("--plot", "b.txt"), "must end as a picture does"),
        (("local_vim_tiny", "--packed"), "pack takes Vim, VideoMamba or Mamba-Reg"),
    ],
)
def test_a_wrong_word_gets_one_sentence(words, sentence, capsys):
    assert main(["benchmark", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


@pytest.mark.skipif(not cpu.compiled(), reason="the kernels were not compiled")
def test_packed_models(tmp_path: Path, capsys):
    words = ["vim_cifar10", "--batch", "1", "--flops-reduction", "0.4", "--repeats", "1", "--packed"]
    assert main(["benchmark", *words, "--json", str(tmp_path / "packed.json")]) == 0
    assert "vim_cifar10, batch 1, fp32, packed" in capsys.readouterr().out
    results = json.loads((tmp_path / "packed.json").read_text())["results"]
    assert [one["figures"]["packed"] for one in results[:3]] == [True, True, False]  # transformers cannot be packed


def test_a_gpu_that_is_not_there(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["benchmark", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_timm_and_the_extension_are_asked_as_their_interfaces_say(monkeypatch):
    """Where they are installed; here their place is taken, to see what they are called with."""
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        return torch.nn.Identity()

    def optimize(model, dtype):
        asked.append((type(model).__name__, {"dtype": dtype}))
        return model

    taken = {
        "timm": SimpleNamespace(create_model=create_model),
        "intel_extension_for_pytorch": SimpleNamespace(optimize=optimize),
    }
    monkeypatch.setattr(rivals, "find_spec", lambda name: taken.get(name))
    monkeypatch.setattr(rivals, "import_module", taken.__getitem__)
    found = rivals.rivals(mambatrim.create_model("vim_tiny"), None, torch.bfloat16, torch.device("cpu"))
    assert [rival.name for rival in found] == ["DeiT-T", "DeiT-T (timm)", "DeiT-T (Intel's extension)"]
    assert asked == [
        ("deit_tiny_patch16_224", {"img_size": (224, 224), "num_classes": 1000}),
        ("PlainVit", {"dtype": torch.bfloat16}),
    ]
