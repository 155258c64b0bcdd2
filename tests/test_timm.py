"""The zoo in timm, where timm is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import pytest
import torch

import mambatrim
from mambatrim import timm_models

# operators that a torchvision without its compiled part, as on a machine for CPUs, misses when it is imported
_MISSING = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))


def imported() -> Any:
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _MISSING:
        library.define(operator)
    found = importlib.import_module("timm")
    found.kept = library  # the operators go with it
    return found


@pytest.fixture(scope="module")
def timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed (it is no dependency)")
    found = imported()
    timm_models.register()
    return found


def test_without_timm_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ValueError, match="timm cannot be imported"):
        timm_models.register()


def test_every_model_is_known_to_timm(timm, recwarn):
    names = timm_models.register()  # for the second time
    assert not recwarn
    assert names == [f"mambatrim_{name}" for name in mambatrim.list_models()]
    assert set(timm.list_models("mambatrim_*")) == set(names)


@torch.no_grad()
def test_weights_options_and_how_images_are_prepared(timm):
    model = timm.create_model("mambatrim_vim_cifar10", pretrained=True)
    ours = mambatrim.create_model("vim_cifar10", weights="bundled")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), ours(x))
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 1.0 and config["crop_mode"] == "center"
    assert config["mean"] == ours.spec.preprocess.mean and config["std"] == ours.spec.preprocess.std
    fast = timm.create_model("mambatrim_vim_cifar10", pretrained=True, flops_reduction=0.3, drop_rate=0.0)
    assert torch.equal(fast(x), mambatrim.reduce(ours, flops_reduction=0.3)(x))
    other = timm.create_model("mambatrim_vim_cifar10", pretrained=True, num_classes=3, img_size=48)
    assert other(torch.randn(1, 3, 48, 48)).shape == (1, 3) and other.pretrained_cfg["input_size"] == (3, 48, 48)
    assert torch.equal(other.layers[0].mixer.D, ours.layers[0].mixer.D)
    grey = timm.create_model("mambatrim_vim_cifar10", in_chans=1)
    assert grey(torch.randn(1, 1, 32, 32)).shape == (1, 10)


@torch.no_grad()
def test_a_backbone_as_segmentation_code_asks_for_one(timm):
    backbone = timm.create_model(
        "mambatrim_vim_cifar10", pretrained=True, features_only=True, out_indices=(3, -1), flops_reduction=0.3
    )
    assert backbone.feature_info.channels() == [160, 160] and backbone.feature_info.reduction() == [4, 4]
    assert [tuple(found.shape) for found in backbone(torch.randn(2, 3, 32, 32))] == [(2, 160, 8, 8)] * 2


def test_mistakes_are_named(timm):
    with pytest.raises(ValueError, match="no option 'global_pool'"):
        timm.create_model("mambatrim_vim_cifar10", global_pool="avg")
    with pytest.raises(ValueError, match="has no drop_path_rate"):
        timm.create_model("mambatrim_vim_cifar10", drop_path_rate=0.1)
    with pytest.raises(ValueError, match="vmamba_tiny_s1l8 cannot be fetched"):
        timm.create_model("mambatrim_vmamba_tiny_s1l8", pretrained=True)
