"""save_pretrained and from_pretrained: a model as a folder on the disk or on the Hugging Face Hub.

It has model.safetensors and config.json: all that `ModelSpec` says of a model, so that one that is not in the zoo comes
back too, and what its reducer does. Nothing in the folder is executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import nn

from . import methods
from .apply import reduce
from .cells import describe
from .models import CONFIGS, Model, ModelSpec, Preprocess, build
from .models.checkpoint import HUB_ID, check, download, load, read_state_dict
from .models.layers import cast as cast_to
from .names import lookup
from .reduction import Method, Reducer, Schedule

FORMAT = "mambatrim-model-1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Record = TypeVar("Record")


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model's weights, under their official keys, and its configuration into a folder.

    The configuration has the family and its sizes, how images are prepared, class names, licence, source, and the
    reducer: its method by name and its schedule. A published accuracy is not in it, as the weights may be others now.

    Raises:
        ValueError: the model has no spec, its reducer is one that a name and a schedule do not describe, or the folder
            cannot be made.
    """
    config = described(model)
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{place} cannot be made a folder: {error.strerror}") from error
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # under other names first: a run that is cut off leaves no half of a file
    for name, write in (
        (WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"})),
        (CONFIG, lambda path: path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")),
    ):
        unfinished = place / f"{name}.part"
        write(unfinished)
        unfinished.replace(place / name)


def described(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model, ready for JSON.

    Raises:
        ValueError: the model has no spec, or its reducer is one that a name and a schedule do not describe.
    """
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"save_pretrained takes a model with a spec, before torch.compile; this {type(model).__name__} has none"
        )
    return {
        "format": FORMAT,
        "name": spec.name,
        "family": spec.family,
        "config": asdict(cast(Any, model).config),
        "preprocess": asdict(spec.preprocess),
        "licence": spec.licence,
        "source": spec.source,
        "classes": spec.classes,
        "dtype": "bfloat16" if any(p.dtype == torch.bfloat16 for p in model.parameters()) else "float32",
        "reducer": _reducer(model),
    }


def from_pretrained(source: str | os.PathLike[str], revision: str | None = None) -> Model:
    """The model that `save_pretrained` wrote, in evaluation mode, with its reducer.

    Args:
        source: a folder, or an id of the Hugging Face Hub such as org/name, downloaded once.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: there is no such folder, the Hub cannot be reached, a file is missing or damaged, or the weights are
            not those that the configuration describes.
    """
    paths = _files(source, revision)
    given = _read(paths[CONFIG])
    where = str(paths[CONFIG])
    try:
        spec = _spec(given)
        dtype = lookup("dtype", cast(str, given["dtype"]), DTYPES)
        with torch.device("meta"):
            blueprint = build(spec)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where} describes no model: {reason}") from error
    state = read_state_dict(paths[WEIGHTS])
    # before memory is taken, which a wrong number in the configuration could want very much of
    check(blueprint, state, spec)
    model = build(spec)
    load(model, state, spec)
    cast_to(model, dtype)
    model.eval()
    try:
        return _reduced(model, given["reducer"])
    except ValueError as error:
        raise ValueError(f"{where} describes a reducer that does not fit its model: {error}") from error


# -------------------------------------------------------------------------------------------------------------- reducer


def _reducer(model: nn.Module) -> dict[str, Any] | None:
    """Method and schedule of the model's reducer, from which `reduce` makes it again; None where nothing is removed."""
    own = getattr(model, "reducer", None)
    if not isinstance(own, Reducer) or not own.schedule.places:
        return None
    name = own.method.name
    if not is_usual(own.method):
        raise ValueError(
            f"the reducer's method {name!r} is not one of the library with its default options, which is all that a "
            "configuration can hold: save the dense model, and reduce it again when it is loaded"
        )
    again = reduce(model, schedule=own.schedule, method=own.method).reducer
    if not isinstance(again, Reducer) or (again.special, again.tokens) != (own.special, own.tokens):
        raise ValueError(
            f"the reducer was made for {own.tokens} tokens, which are not those of the model's own image size: resize "
            "the model before it is reduced, or save the dense one"
        )
    return {"method": name, **own.schedule.as_dict()}


def _reduced(model: Model, described: object) -> Model:
    if described is None:
        return model
    if not isinstance(described, Mapping) or set(described) - {"stem"} != {"method", "removed"}:
        raise ValueError(f"it has method, removed and perhaps stem, or is null, not {described!r}")
    removed = _value(described["removed"], tuple[int, ...], "removed")
    schedule = Schedule(removed, _value(described.get("stem", 0), int, "stem"))
    return reduce(model, schedule=schedule, method=methods.get(described["method"]))


def is_usual(method: Method) -> bool:
    """Whether a method is what its name alone stands for, all options included."""
    with contextlib.suppress(ValueError):  # an object that cannot be described is nobody's default
        return method.name in methods.METHODS and describe(method) == describe(methods.get(method.name))
    return False


# ---------------------------------------------------------------------------------------------------------------- files


def _files(source: str | os.PathLike[str], revision: str | None) -> dict[str, Path]:
    """The local paths of both files by their names."""
    place = Path(source).expanduser()
    if place.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (place / name).is_file():
                raise ValueError(f"{place} has no {name}, so that it is no folder that save_pretrained wrote")
        return {name: place / name for name in (CONFIG, WEIGHTS)}
    hub = HUB_ID.fullmatch(str(source))
    if place.exists() or hub is None or hub["file"] or place.parent.is_dir():
        what = f"{place} is a file" if place.exists() else f"there is no folder {place}"
        raise ValueError(f"{what}; give the folder that save_pretrained wrote, or a Hub id such as org/name")
    return {name: download(hub["repo"], name, revision) for name in (CONFIG, WEIGHTS)}


def _read(path: Path) -> Mapping[str, object]:
    """The configuration, with all of its entries."""
    try:
        given = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ValueError(f"{path} is not a configuration that save_pretrained wrote: it does not say {FORMAT!r}")
    wanted = {"format", "name", "family", "config", "preprocess", "licence", "source", "classes", "dtype", "reducer"}
    for name in (*sorted(wanted - set(given)), *sorted(set(given) - wanted)):
        raise ValueError(f"{path} has {'an unknown' if name in given else 'no'} entry {name!r}")
    return given


def _spec(given: Mapping[str, object]) -> ModelSpec:
    texts = {name: _value(given[name], str, name) for name in ("name", "family", "licence", "source")}
    config = lookup("family", texts["family"], CONFIGS)
    return ModelSpec(
        **texts,
        config=_record(config, given["config"], "config"),
        preprocess=_record(Preprocess, given["preprocess"], "preprocess"),
        checkpoint=None,
        classes=_value(given["classes"], tuple[str, ...] | None, "classes"),
    )


def _record(kind: type[Record], given: object, name: str) -> Record:
    """A record from its fields in JSON. One that is not there has its default; one that is not known is an error."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must have fields by name, not be {given!r}")
    hints, known = typing.get_type_hints(kind), {field.name: field for field in fields(cast(Any, kind))}
    for field in given:
        if field not in known:
            raise ValueError(f"{name} has an unknown field {field!r}; known: {', '.join(known)}")
    for field, about in known.items():
        if field not in given and about.default is MISSING:
            raise ValueError(f"{name} has no field {field!r}")
    return kind(**{field: _value(value, hints[field], f"{name}.{field}") for field, value in given.items()})


def _value(given: object, hint: Any, name: str) -> Any:
    """A value of the type that a field is annotated with; lists become tuples."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return None if given is None else _value(given, optional[0], name)
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if isinstance(given, list | tuple):
            kinds = (kinds[0],) * len(given) if kinds[-1] is Ellipsis else kinds
            if len(kinds) == len(given):
                return tuple(_value(each, kind, name) for each, kind in zip(given, kinds, strict=True))
    elif hint is float and isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    elif isinstance(given, hint) and (hint is bool or not isinstance(given, bool)):
        return given
    wanted = str(hint) if typing.get_origin(hint) else hint.__name__
    raise ValueError(f"{name} must be of type {wanted}, not {given!r}")
