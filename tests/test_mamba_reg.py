"""Mamba-Reg against the official code's outputs, and where its registers are."""

from __future__ import annotations

import pytest
import torch

import mambatrim
from mambatrim.models import MODELS, mamba_reg
from mambatrim.models.mamba_reg import MambaReg, MambaRegConfig

FIXTURES = ("mambar_e32_d4_img64_n12r1", "mambar_e32_d4_img64_n12r2", "mambar_e32_d4_img96x80_n12r4")


def build(file) -> MambaReg:
    """The model of a fixture, with its weights loaded as an official checkpoint is."""
    c = file.config
    size = c["img_size"]
    config = MambaRegConfig(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch=c["patch_size"],
        stride=c["patch_size"],
        d_model=c["embed_dim"],
        depth=c["depth"],
        num_classes=c["num_classes"],
        registers=c["num_cls_tokens"],
        narrow=c["cls_reduce"],
    )
    model = MambaReg(config)
    model.load_state_dict(file.part("state."), strict=True)
    return model.eval()


def tiny(**changes) -> MambaReg:
    torch.manual_seed(0)
    sizes = {"image_size": (64, 64), "patch": 8, "stride": 8, "d_model": 32, "depth": 4, "d_state": 4}
    return MambaReg(MambaRegConfig(**{**sizes, "num_classes": 10, "registers": 5, "narrow": 2, **changes})).eval()


@pytest.mark.parametrize("name", FIXTURES)
def test_parity_with_the_official_code(golden, compare_with_official, form, name):
    file = golden(name)
    model = build(file)
    compare_with_official(model, file)
    assert model.special_tokens() == tuple(file.tensors["layout.cls_positions"].tolist())


@pytest.mark.parametrize(
    ("size", "parameters", "entries"),
    [
        ("tiny", 9_264_232, 416),
        ("small", 27_801_064, 418),
        ("base", 99_301_096, 418),
        ("large", 341_222_376, 826),
    ],
)
def test_published_keys_and_shapes(golden_keys, size, parameters, entries):
    spec = MODELS[f"mambar_{size}"]
    with torch.device("meta"):
        model = MambaReg(spec.config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    if spec.checkpoint is not None:
        assert (spec.checkpoint.parameters, spec.checkpoint.entries) == (parameters, entries)
        assert spec.checkpoint.file == f"mambar_{size}_patch16_224.pth"
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    official = golden_keys(f"mambar_{size}")
    assert ours == official["state"] and parameters == official["num_parameters"]


def test_what_is_known_about_the_published_weights():
    top1 = {name: spec.checkpoint and spec.checkpoint.top1 for name, spec in mamba_reg.VARIANTS.items()}
    assert top1 == {"mambar_tiny": None, "mambar_small": 81.4, "mambar_base": 83.0, "mambar_large": 83.6}
    for spec in mamba_reg.VARIANTS.values():
        assert spec.preprocess.crop == 1.0 and spec.preprocess.resize == (224, 224)
        assert spec.licence == "none stated" and spec.preprocess.interpolation == "bicubic"


@pytest.mark.parametrize(("name", "first", "step"), [("mambar_small", 15, 16), ("mambar_large", 11, 12)])
def test_registers_are_spread_evenly(name, first, step):
    with torch.device("meta"):
        model = MambaReg(MODELS[name].config)
    positions = model.special_tokens()
    assert positions == tuple(range(first, 192, step)) and len(positions) == model.config.registers
    assert model.num_patches() == 196
    # more registers than patches: all of them first
    assert tiny().special_at(4) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("size", "both", "paper"), [("small", 6.238, 5.357), ("base", 22.046, 19.915), ("large", 77.098, 70.639)]
)
def test_published_flops(size, both, paper):
    """The figures count a classifier of D inputs and no neck; the model has n D / r inputs and a neck."""
    with torch.device("meta"):
        model = MambaReg(MODELS[f"mambar_{size}"].config)
    c = model.config
    neck = c.registers * c.d_model * (c.d_model // c.narrow)
    assert model.head_cost().head == neck + c.features * 1000
    beyond = neck + (c.features - c.d_model) * 1000
    for convention, published in (("both", both), ("paper", paper)):
        total = mambatrim.count_flops(model, convention=convention).total
        assert round((total - beyond) / 1e9, 3) == published


@torch.no_grad()
def test_registers_stay_in_their_order_whatever_goes():
    """Each image's registers are found where they are; what classifies is theirs, in the order of k."""
    model, images = tiny(), torch.randn(3, 3, 64, 64)
    model.cls_token.normal_()
    fast = mambatrim.reduce(model, schedule=mambatrim.Schedule((20, 0, 15, 0)))
    tokens = fast.forward_features(images)
    special = model.special_tokens()
    where = tokens.where(special)  # (B, n)
    assert tokens.x.shape[1] == 64 - 35 + 5 and (where.diff(dim=1) > 0).all()
    # images lose different patches, so that their registers stand at different places
    assert not torch.equal(where[0], where[1])
    for b in range(3):
        assert [tokens.origin.keep[b, position].item() for position in where[b]] == list(special)
        rows = [model.neck(model.norm_f(tokens.x[b, position])) for position in where[b]]
        by_hand = model.head(model.norm_neck(torch.cat(rows)))
        assert torch.allclose(fast.forward_head(tokens)[b], by_hand, atol=1e-5)


@torch.no_grad()
def test_registers_have_positions_of_their_own_at_any_size():
    model = tiny()
    for size in ((64, 64), (40, 72), (16, 16)):
        x = model.positions(model.patch_embed.grid(*size))
        special = model.special_tokens(size)
        assert torch.equal(x[0, list(special)], model.pos_embed_cls[0])
        assert x.shape[1] == model.num_patches(size) + 5
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)
    with pytest.raises(ValueError, match="narrow must be a divisor of the width 32, got 3"):
        tiny(narrow=3)
    with pytest.raises(ValueError, match="registers must be at least 1, got 0"):
        tiny(registers=0)
