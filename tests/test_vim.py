"""Vim against the official code's outputs, and what the library promises of every model."""

from __future__ import annotations

import argparse
import copy

import pytest
import torch

import mambatrim
from mambatrim.models import MODELS, checkpoint, vim
from mambatrim.models.layers import BiMambaMixer, Block, PatchEmbed, cast, resize_positions
from mambatrim.models.vim import Vim, VimConfig

FIXTURES = ("vim_e32_d4_img48x80", "vim_e32_d4_img64", "vim_e32_d4_img64_stride8", "vim_e24_d24_img224")


def build(file) -> Vim:
    """The model of a fixture, with its weights loaded as an official checkpoint is."""
    c = file.config
    size = c["img_size"]
    config = VimConfig(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch=c["patch_size"],
        stride=c.get("stride", c["patch_size"]),
        d_model=c["embed_dim"],
        depth=c["depth"],
        d_state=c["d_state"],
        num_classes=c["num_classes"],
    )
    model = Vim(config)
    model.load_state_dict(file.part("state."), strict=True)
    return model.eval()


def tiny(seed: int = 0, **changes) -> Vim:
    torch.manual_seed(seed)
    config = VimConfig(
        **{"image_size": (32, 32), "patch": 8, "stride": 8, "d_model": 32, "depth": 6, "d_state": 4, **changes}
    )
    return Vim(config).eval()


@pytest.mark.parametrize("name", FIXTURES)
def test_parity_with_the_official_code(golden, compare_with_official, form, name):
    file = golden(name)
    compare_with_official(build(file), file)


@pytest.mark.parametrize("case", ["halved", "summed"])
@torch.no_grad()
def test_golden_mixer(golden, form, case):
    file = golden("norm_and_conv")
    mixer = BiMambaMixer(32, scale=0.5 if case == "halved" else 1.0)
    mixer.load_state_dict(file.part("mixer.state."), strict=True)
    x = file.part(f"mixer_{case}.")
    assert (mixer(x["x"])[0] - x["out"]).abs().max() <= 1e-5 * x["out"].abs().max()


@pytest.mark.parametrize("name", ["vim_tiny", "vim_small", "vim_base"])
def test_published_keys_and_shapes(golden_keys, name):
    with torch.device("meta"):
        model = Vim(MODELS[name].config)
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == golden_keys(name)["state"]
    entry = MODELS[name].checkpoint
    assert entry is not None and entry.entries == len(ours) == 415
    assert entry.parameters == sum(p.numel() for p in model.parameters()) == golden_keys(name)["num_parameters"]


@pytest.mark.parametrize(("name", "parameters"), [("vim_tiny_plus", 7_250_344), ("vim_small_plus", 26_001_256)])
def test_stride_8(name, parameters):
    with torch.device("meta"):
        model = Vim(MODELS[name].config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.num_patches() == 729 and model.special_tokens() == (364,)


@torch.no_grad()
def test_the_two_directions_are_mirror_images():
    """Turning the sequence round and swapping the directions' parameters turns every signal round, and that is all."""
    mixer = BiMambaMixer(32, d_state=4)
    torch.nn.init.normal_(mixer.A_log, 0, 0.3)
    torch.nn.init.normal_(mixer.A_b_log, 0, 0.3)
    swapped = copy.deepcopy(mixer)
    state = {}
    for key, value in mixer.state_dict().items():
        pairs = (
            ("conv1d_b", "conv1d"),
            ("x_proj_b", "x_proj"),
            ("dt_proj_b", "dt_proj"),
            ("A_b_log", "A_log"),
            ("D_b", "D"),
        )
        for b, f in pairs:
            head = key.split(".")[0]
            if head in (b, f):
                key = (f if head == b else b) + key[len(head) :]
                break
        state[key] = value
    swapped.load_state_dict(state, strict=True)
    x = torch.randn(2, 11, 32)
    names = ("dt", "dt_mean", "B", "C", "y", "y_gated", "update")
    _, here = mixer(x, names)
    _, there = swapped(x.flip(1), names)
    assert tuple(here) == names
    for name in names:
        turned = there[name].flip(1) if name == "update" else there[name].flip(2).flip(1)
        assert torch.allclose(here[name], turned, atol=1e-6), name
    score, mirrored = here["dt_mean"].sum(1), there["dt_mean"].sum(1)
    assert torch.allclose(score, mirrored.flip(1), rtol=1e-6)


@torch.no_grad()
def test_signals_agree_with_each_other(form):
    block = Block(32, BiMambaMixer(32, d_state=4))
    x = torch.randn(2, 9, 32)
    names = ("hidden", "update", "dt", "dt_mean", "B", "C", "y", "y_gated")
    out, captured = block(x, names)
    assert set(captured) == set(names) and block(x)[1] == {}
    assert torch.equal(captured["hidden"], out) and torch.allclose(out, x + captured["update"])
    assert torch.allclose(captured["dt"].mean(-1), captured["dt_mean"], rtol=1e-5)
    summed = block.mixer.out_proj(0.5 * captured["y_gated"].sum(1))
    assert torch.allclose(summed, captured["update"], atol=1e-6)
    assert captured["B"].shape == captured["C"].shape == (2, 2, 9, 4)


@torch.no_grad()
def test_any_image_size():
    model = tiny()
    for size in ((32, 32), (8, 8), (40, 24), (64, 33)):
        tokens = model.forward_features(torch.randn(2, 3, *size))
        assert tokens.grid == (size[0] // 8, size[1] // 8)
        assert tokens.x.shape[1] == model.num_patches(size) + 1
        assert model(torch.randn(1, 3, *size)).shape == (1, 1000)
        assert torch.equal(tokens.take(model.special_tokens(size))[:, 0], tokens.x[:, model.num_patches(size) // 2])


@torch.no_grad()
def test_positions_are_resized_around_the_class_token():
    """The class token's row stays what it is, and a table that is flat over the grid stays flat."""
    model = tiny()
    model.pos_embed.fill_(0.25)
    model.pos_embed[:, 8] = 7.0  # the class token's own row, in the middle of 16 patches
    model.patch_embed.proj.weight.zero_()
    x = model.embed(torch.zeros(1, 3, 48, 40)).x
    middle = 6 * 5 // 2
    assert torch.equal(x[:, middle], model.cls_token[:, 0] + 7.0)
    rest = torch.cat([x[:, :middle], x[:, middle + 1 :]], 1)
    assert torch.allclose(rest, torch.full_like(rest, 0.25), atol=1e-6)
    table = torch.randn(1, 12, 5)
    assert resize_positions(table, (3, 4), (3, 4)) is table
    by_hand = torch.nn.functional.interpolate(
        table.reshape(1, 3, 4, 5).permute(0, 3, 1, 2), size=(5, 7), mode="bicubic", align_corners=False
    )
    assert torch.allclose(resize_positions(table, (3, 4), (5, 7)).reshape(1, 5, 7, 5).permute(0, 3, 1, 2), by_hand)


@torch.no_grad()
def test_nothing_to_remove_is_bit_identical():
    model, images = tiny(), torch.randn(3, 3, 32, 32)
    assert torch.equal(mambatrim.reduce(model, flops_reduction=0)(images), model(images))


@torch.no_grad()
def test_reduced_model_executes_the_predicted_counts():
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    dense = model(images)
    fast = mambatrim.reduce(model, schedule=mambatrim.Schedule((3, 0, 4, 0, 2, 0)))
    seen = []
    for layer in fast.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    fast(images)
    assert tuple(seen) == mambatrim.count_flops(fast).lengths == (17, 14, 14, 10, 10, 8)
    assert fast.pos_embed is model.pos_embed and torch.equal(model(images), dense)


@torch.no_grad()
def test_an_image_is_reduced_alike_alone_and_in_a_batch():
    model = tiny()
    fast = mambatrim.reduce(model, schedule=mambatrim.Schedule((3, 0, 4, 0, 2, 0)))
    images = torch.randn(5, 3, 32, 32)
    together = fast.forward_features(images)
    for i in range(5):
        alone = fast.forward_features(images[i : i + 1])
        assert torch.equal(alone.origin.dest[0], together.origin.dest[i])
        assert torch.allclose(alone.x[0], together.x[i], atol=1e-5)


@torch.no_grad()
def test_image_size_of_a_reduction():
    model = tiny()
    fast = mambatrim.reduce(model, flops_reduction=0.3, image_size=48)
    assert fast(torch.randn(1, 3, 48, 48)).shape == (1, 1000)
    with pytest.raises(ValueError, match="reduce the model for this image size"):
        fast(torch.randn(1, 3, 32, 32))


@torch.no_grad()
def test_bf16_is_near_fp32(form):
    model, images = tiny(d_model=64), torch.randn(4, 3, 32, 32)
    exact = model(images)
    half = copy.deepcopy(model)
    cast(half, torch.bfloat16)
    assert half.layers[0].mixer.A_log.dtype == half.layers[0].norm.weight.dtype == torch.float32
    assert half.embed(images).x.dtype == half(images).dtype == torch.float32
    assert (half(images) - exact).abs().max() <= 0.05 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        auto = model(images)
    assert (auto - exact).abs().max() <= 0.05 * exact.abs().max()
    fast = mambatrim.reduce(half, flops_reduction=0.3)
    assert torch.isfinite(fast(images)).all()


def test_gradients_reach_every_parameter(form):
    model = tiny(depth=2).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("reduction", [0.0, 0.3])
def test_compiles_and_exports_whole(reduction):
    fast, images = mambatrim.reduce(tiny(), flops_reduction=reduction), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = fast(images)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(images), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(fast, (images,), dynamic_shapes={"images": {0: batch}}, strict=True)
        more = torch.randn(5, 3, 32, 32)
        assert torch.allclose(program.module()(more), fast(more), atol=1e-5)


@torch.no_grad()
def test_official_checkpoint_files(tmp_path):
    """An official .pth holds an argparse.Namespace and, for Base, the published weights under another key."""
    model = tiny()
    other = tiny(seed=1)
    file = tmp_path / "vim.pth"
    torch.save(
        {"model": other.state_dict(), "model_ema": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1)},
        file,
    )
    state = checkpoint.read_state_dict(file, key="model_ema")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(checkpoint.read_state_dict(file)["cls_token"], other.cls_token)
    assert MODELS["vim_base"].checkpoint.key == "model_ema" and MODELS["vim_small"].checkpoint.key == "model"


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vim_small'"):
        mambatrim.create_model("vim_smal")
    with pytest.raises(ValueError, match="dtype must be one of"):
        mambatrim.create_model("vim_tiny", dtype=torch.float16)
    with pytest.raises(ValueError, match="num_classes"):
        mambatrim.create_model("vim_tiny", num_classes=0)
    with pytest.raises(ValueError, match="model with bundled weights"):
        mambatrim.create_model("vim_tiny", weights="bundled")
    with pytest.raises(ValueError, match="at least 8x8 pixels"):
        tiny()(torch.randn(1, 3, 7, 32))
    with pytest.raises(ValueError, match="images must be"):
        tiny()(torch.randn(3, 32, 32))
    torch.save(tiny().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError):
        mambatrim.create_model("vim_tiny", weights=tmp_path / "other.pth")


def test_models_are_listed():
    assert mambatrim.list_models("vim_*") == list(vim.VARIANTS)
    assert mambatrim.create_model("vim_cifar10", image_size=(40, 40)).spec.preprocess.size == (40, 40)
    assert PatchEmbed(3, 8, 16, 8).grid(224, 224) == (27, 27)
