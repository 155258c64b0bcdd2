"""convert: official modules and state dicts become models of this library, with the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mambatrim
from foreign import OfficialVim
from mambatrim.models.mamba_reg import MambaReg, MambaRegConfig
from mambatrim.models.videomamba import VideoMamba, VideoMambaConfig
from mambatrim.models.vim import Vim, VimConfig


def official(seed: int = 0, **options) -> OfficialVim:
    torch.manual_seed(seed)
    model = OfficialVim(**options).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("options", "family", "kind", "size"),
    [
        ({}, "vim", Vim, None),
        ({"patch": 8, "stride": 4, "d_model": 48, "depth": 3, "d_state": 8, "num_classes": 7}, "vim", Vim, None),
        ({"img_size": (32, 48)}, "vim", Vim, (32, 48)),
        ({"divide": False, "place": "first"}, "videomamba", VideoMamba, None),
    ],
)
@torch.no_grad()
def test_a_module_becomes_ours(options, family, kind, size):
    theirs = official(**options).train()
    ours = mambatrim.convert(theirs, family=family, image_size=size)
    assert type(ours) is kind and not ours.training and all(module.training for module in theirs.modules())
    images = torch.randn(2, 3, *ours.config.image_size)
    theirs.eval()
    expected = theirs(images)
    assert (ours(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours.head.weight.zero_()
    assert torch.equal(theirs(images), expected)  # the weights are not shared
    assert mambatrim.reduce(ours, flops_reduction=0.2).spec.preprocess.size == ours.config.image_size


@pytest.mark.parametrize("name", ["vim_e32_d4_img48x80", "videomamba_image_e32_d4_img64", "mambar_e32_d4_img64_n12r1"])
@torch.no_grad()
def test_official_weights_give_official_logits(golden, name):
    file = golden(name)
    family = {"vim": "vim", "videomamba": "videomamba", "mambar": None}[name.partition("_")[0]]
    ours = mambatrim.convert(file.part("state."), family=family, image_size=tuple(file.tensors["input"].shape[2:]))
    expected = file.tensors["logits"]
    error = max(file.checks["max_abs_float32_minus_float64"].values())
    assert (ours(file.tensors["input"]) - expected).abs().max() <= max(4 * error, 1e-5 * expected.abs().max())


def test_wrapped_weights_overlapping_patches_videos_and_registers():
    state = official(stride=4).state_dict()
    inside = {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    ours = mambatrim.convert(inside, family="vim", image_size=32)
    assert ours.config == VimConfig((32, 32), 8, 4, 32, 6, 4, 10)
    sizes = {"image_size": (32, 32), "patch": 8, "stride": 8, "d_model": 32, "depth": 2, "d_state": 4, "num_classes": 5}
    for config, model in (
        (VideoMambaConfig(**sizes, frames=4, tubelet=2), VideoMamba),
        (MambaRegConfig(**sizes, registers=3, narrow=2), MambaReg),
    ):
        assert mambatrim.convert(model(config).state_dict()).config == config


def test_refuses_what_is_not_the_same():
    theirs = official()

    def refused(match, source=theirs, **options):
        with pytest.raises(ValueError, match=match) as error:
            mambatrim.convert(source, **options)
        assert "\n" not in str(error.value)

    refused("do not tell vim from videomamba")
    refused("computes other logits", family="videomamba")
    refused("computes other logits", official(divide=False), family="vim")
    refused("not of mamba_reg", family="mamba_reg")
    refused("unknown family to convert 'vimm'", family="vimm")
    refused("no family known here", nn.Linear(2, 2))
    refused("takes a module or its state dict", "weights.pth", family="vim")
    state = theirs.state_dict()
    refused("15 patches is not that of a square image", {**state, "pos_embed": state["pos_embed"][:, 1:]}, family="vim")
    refused("does not make the 16 patches", state, family="vim", image_size=16)
    refused(
        "layers.3.norm.weight is missing", {k: v for k, v in state.items() if k != "layers.3.norm.weight"}, family="vim"
    )
    refused("entry 'epoch' of the weights is of type int", {**state, "epoch": 3}, family="vim")
    refused("norm_f.weight is missing", {k: v for k, v in state.items() if k != "norm_f.weight"}, family="vim")


def test_a_module_that_cannot_run_is_converted_unseen_only():
    theirs = official()
    theirs.layers[0].mixer.forward = lambda *args, **options: torch.ops.nothing_here.scan()
    with pytest.raises(ValueError, match="could not run, so that logits were not compared"):
        mambatrim.convert(theirs, family="vim")
    assert isinstance(mambatrim.convert(theirs, family="vim", check=False), Vim)
