"""One text for any model: a name of the zoo, a name with a file of weights, or a folder of `save_pretrained`."""

from __future__ import annotations

from pathlib import Path

from .hub import from_pretrained
from .models import BUNDLED, MODELS, Model, create_model
from .names import lookup


def open_model(text: str) -> Model:
    """The model that a text means, with the trained weights that it names.

    Args:
        text: a name with weights in the package, such as vim_cifar10; NAME=WEIGHTS, a name of `list_models()` and a
            checkpoint file or Hub id, such as vim_small=vim_s.pth; or a folder with config.json and model.safetensors.

    Raises:
        ValueError: no such model, folder or file, or a name whose weights are not in the package.
    """
    name, equals, weights = text.partition("=")
    if equals:
        lookup("model", name, MODELS)
        if not weights:
            raise ValueError(f"{text} names no weights; write {name}=FILE")
        return create_model(name, weights=weights)
    if Path(text).is_dir():
        return from_pretrained(text)
    lookup("model", text, MODELS)
    if text not in BUNDLED:
        raise ValueError(f"{text} has no weights in the package; write {text}=FILE with a checkpoint of it")
    return create_model(text, weights="bundled")


def own_weights(name: str) -> str:
    """The weights that lie in the package, for a model that has some.

    Raises:
        ValueError: it has none; the sentence says where they are.
    """
    spec = lookup("model", name, MODELS)
    if name in BUNDLED:
        return "bundled"
    if spec.checkpoint is None:
        raise ValueError(f"{name} needs --weights FILE: a checkpoint from {spec.source}")
    if not spec.checkpoint.repo:
        raise ValueError(f"{name} needs --weights FILE: {spec.checkpoint.file or 'a checkpoint'} from {spec.source}")
    raise ValueError(
        f"{name} needs --weights: a checkpoint file, or {spec.checkpoint.repo} to download one from the Hub"
    )


def model_label(text: str) -> str:
    """What to call the model of a text in tables: the name before the weights, or the folder's own name."""
    return text.partition("=")[0] if "=" in text else Path(text).name
