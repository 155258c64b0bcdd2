"""The zoo in timm: `timm_models.register()`, and `timm.create_model("mambatrim_vim_small")` makes one of its models.

Nothing else in the package imports this file, or timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .apply import reduce
from .evaluate import spec_of
from .features import Features, features
from .models import BUNDLED, MODELS, Model, create_model

PREFIX = "mambatrim_"
# what timm hands to every model, and what its training script always says; neither means anything here
_IGNORED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_ONLY_ZERO = ("drop_rate", "drop_path_rate")
# timm adds the names of what it registers
__all__ = ["register"]


def register() -> list[str]:
    """Make every model of the zoo known to timm under its name with `mambatrim_` before it, and return these names.

    `timm.create_model` then takes, beside a name: pretrained (the weights in the package, or the published ones from
    the Hub), num_classes (with pretrained weights a classifier of another width begins anew), img_size, in_chans,
    flops_reduction, method and schedule as in `mambatrim.reduce`, and features_only with out_indices as in
    `mambatrim.features`.

    Raises:
        ValueError: timm cannot be imported.
    """
    try:
        from timm.models import is_model, register_model  # type: ignore[import-not-found, unused-ignore]
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"timm cannot be imported: {str(error).splitlines()[0]}") from error
    names = {PREFIX + name: name for name in MODELS}
    for registered, name in names.items():
        if not is_model(registered):
            register_model(_entry(registered, name))
    return list(names)


def _entry(registered: str, name: str) -> Callable[..., nn.Module]:
    """What timm calls to make a model."""

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        given = {key: value for key, value in options.items() if key not in _IGNORED}
        for key in _ONLY_ZERO:
            if given.pop(key, 0):
                raise ValueError(f"{registered} has no {key}")
        reduction = {key: given.pop(key) for key in ("flops_reduction", "schedule", "method") if key in given}
        as_backbone, layers = given.pop("features_only", False), given.pop("out_indices", None)
        sizes: dict[str, Any] = {key: given.pop(key) for key in ("num_classes", "img_size", "in_chans") if key in given}
        for key in given:
            raise ValueError(f"{registered} has no option {key!r}")
        model: nn.Module = _pretrained(name, sizes) if pretrained else create_model(name, **sizes)
        if reduction:
            model = reduce(model, **reduction)
        described = _described(model)
        if as_backbone:
            model = features(model, layers)
            model.feature_info = _feature_info(model)
        # plain attributes, which nn.Module has no types for
        vars(model).update(pretrained_cfg=described, default_cfg=described)
        return model

    entry.__name__, entry.__module__, entry.__doc__ = registered, __name__, f"{name} of the zoo of mambatrim."
    return entry


def _pretrained(name: str, sizes: dict[str, Any]) -> Model:
    """The model with its published weights; a classifier of another width keeps its random ones."""
    published = MODELS[name].checkpoint
    if name in BUNDLED:
        weights = "bundled"
    elif published is None or not (published.repo and published.file):
        raise ValueError(
            f"the weights of {name} cannot be fetched by themselves; give a file to mambatrim.create_model ("
            f"{published.file if published else 'none published'}, {MODELS[name].source})"
        )
    else:
        weights = published.repo
    classes = sizes.get("num_classes", MODELS[name].config.num_classes)
    same = {key: value for key, value in sizes.items() if key != "num_classes"}
    model = create_model(name, weights=weights, **same)
    if classes == MODELS[name].config.num_classes:
        return model
    other = create_model(name, **sizes)
    trained = model.state_dict()
    kept = {key: value for key, value in trained.items() if value.shape == other.state_dict()[key].shape}
    other.load_state_dict(trained | {key: other.state_dict()[key] for key in trained if key not in kept})
    return other


def _described(model: nn.Module) -> dict[str, Any]:
    """How timm's data loaders prepare images for the model."""
    spec = spec_of(model)
    how = spec.preprocess
    return {
        "architecture": PREFIX + spec.name,
        "num_classes": spec.config.num_classes,
        "input_size": (spec.config.in_chans, *how.size),
        "crop_pct": how.crop,
        "crop_mode": "squash" if how.squash else "center",
        "interpolation": how.interpolation,
        "mean": how.mean,
        "std": how.std,
        "license": spec.licence,
        "origin_url": spec.source,
        "label_names": spec.classes,
    }


def _feature_info(backbone: Features) -> Any:
    """Channels and strides of the maps, as segmentation and detection code asks timm's backbones for them."""
    from timm.models import FeatureInfo  # type: ignore[import-not-found, unused-ignore]

    side: int = spec_of(backbone.model).preprocess.size[0]
    infos = [
        {"num_chs": shape[0], "reduction": round(side / shape[-2]), "module": f"layer {layer}", "index": k}
        for k, (layer, shape) in enumerate(zip(backbone.layers, backbone.shapes(), strict=True))
    ]
    return FeatureInfo(infos, tuple(range(len(infos))))
