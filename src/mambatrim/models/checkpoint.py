"""Weights from a file or from the Hub into a model: read safely, unwrapped, and loaded strictly."""

from __future__ import annotations

import argparse
import pickle  # only for the name of the error that torch raises on a file that it refuses
import re
import socket
import struct
import urllib.request
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeGuard
from urllib.parse import urlsplit

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mambatrim.models.spec import ModelSpec

# where training scripts put the weights inside what they save, in this order
WRAPPERS = ("model", "module", "state_dict")
# what wrappers of torch (DistributedDataParallel, torch.compile) put in front of every key
PREFIXES = ("module.", "_orig_mod.")
# kept by some training scripts beside the weights; dropped where the model has no such entry
LEFTOVERS = ("ema_*", "distill_head.*", "clip_decoder.*", "*.num_batches_tracked")

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:[:/](?P<file>[\w-][\w./-]*))?", re.ASCII)

# broken bytes make the readers below raise nearly anything
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
    struct.error,
)


def resolve(weights: str | Path, spec: ModelSpec | None = None) -> Path:
    """The local file that `weights` names, downloaded once if it is an id of the Hugging Face Hub.

    Args:
        weights: a file; or `org/name`, the file there being the one that `spec` knows; or `org/name:file` or
            `org/name/file`.
        spec: the entry of the model that the weights are for.

    Raises:
        ValueError: there is no such file, the id lacks a file name, or the Hub cannot be reached.
    """
    path = Path(weights).expanduser()
    if path.exists():
        return path
    name = str(weights)
    hub = HUB_ID.fullmatch(name)
    names_a_file = name.endswith(SUFFIXES) and name.count("/") == 1 and ":" not in name
    if hub is None or names_a_file or path.parent.is_dir():
        raise ValueError(f"there is no file {name}, and it is no Hub id either (such as hustvl/Vim-small-midclstok)")
    repo, file = hub["repo"], hub["file"]
    known = spec.checkpoint if spec is not None else None
    if file is None and known is not None and known.repo == repo:
        file = known.file
    if not file:
        raise ValueError(
            f"there is no file {name}; if it is a Hub id, name the file in it too, as in {repo}:weights.pth"
        )
    return download(repo, file)


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """A file of the Hugging Face Hub, fetched once; `revision` is a branch, tag or commit.

    Raises:
        ValueError: huggingface_hub is not installed, or there is no such file, or no network.
    """
    by_hand = f"fetch {file} from {repo} by hand and give its path"
    try:
        import huggingface_hub  # imported here: only a download needs it
    except ImportError as error:
        raise ValueError(f"{repo} is on the Hub and huggingface_hub is not installed; {by_hand}") from error
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if not urllib.request.getproxies():
            # without a network this fails at once, where the download would try again for half a minute
            socket.getaddrinfo(urlsplit(huggingface_hub.hf_hub_url(repo, file)).hostname, 443)
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except (OSError, ValueError) as error:  # huggingface_hub's own errors are among these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
        raise ValueError(f"{repo} could not be downloaded from the Hub ({reason}); {by_hand}") from error


def read_state_dict(path: str | Path, key: str | None = None, spec: ModelSpec | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, without what wrappers of torch put in front of the names.

    Read are safetensors, and files of `torch.save` that hold nothing but tensors, plain values and `argparse.Namespace`
    (which official Vim files contain): no code of the file is run. The weights are those under `key`, which must be
    there; else those under the key that `spec` names, the first of "model", "module" and "state_dict", or at the top.

    Raises:
        ValueError: the file is missing, no checkpoint, damaged or not safe, or has no weights under `key`.
    """
    path = Path(path).expanduser()
    content = _read(path)
    state = _unwrap(content, key, spec, path)
    stripped: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {name!r} of the weights is of type {type(value).__name__}, not a tensor")
        bare = _strip(name)
        if bare in stripped:
            raise ValueError(f"{path} has two entries for {bare}, with and without a prefix such as {PREFIXES[0]}")
        stripped[bare] = value
    return stripped


def _read(path: Path) -> object:
    """Everything that the file holds."""
    if not path.exists():
        raise ValueError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file but a folder or a device; name the checkpoint itself")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{path} is empty")
    is_zip, is_pickle = head.startswith(b"PK\x03\x04"), head.startswith(b"\x80\x02")
    # the size of a header of JSON, and its first character
    is_safetensors = len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    if not (is_zip or is_pickle or is_safetensors):
        raise ValueError(
            f"{path} is no checkpoint: neither safetensors nor a file of torch.save, or damaged at its start"
        )
    try:
        if is_safetensors:
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old or broken files: what matters of it becomes an error below
            # mapped, not read: an official file holds the optimiser too, which nobody looks at
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _UNREADABLE as error:
        raise ValueError(f"{path} {_why_unreadable(error)}") from error


def _why_unreadable(error: BaseException) -> str:
    # torch's own text runs over several lines and advises to switch the protection off
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused is not None:
        return (
            f"wants to use {refused[1]} while it is read, which is refused because it could run code; "
            "save the weights alone, best as safetensors"
        )
    return "is damaged or no checkpoint: it begins like one and cannot be read to its end"


def _holds_tensors(value: object) -> TypeGuard[Mapping[object, object]]:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _unwrap(content: object, key: str | None, spec: ModelSpec | None, path: Path) -> Mapping[object, object]:
    """The part of the file that holds the weights."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__} and not weights by name")
    inside = {name: value for name, value in content.items() if _holds_tensors(value)}
    if key and key not in inside:
        there = ", ".join(sorted(map(str, inside))) or "no such group at all"
        raise ValueError(f"{path} has no weights under the key {key!r}; it has: {there}")
    preferred = spec.checkpoint.key if spec is not None and spec.checkpoint is not None else ""
    for wrapper in (key, preferred, *WRAPPERS):
        if wrapper in inside:
            return inside[wrapper]
    if not _holds_tensors(content):
        there = ", ".join(sorted(map(str, content))[:8]) or "nothing"
        raise ValueError(f"{path} holds no weights: no tensors under {', '.join(WRAPPERS)} or at the top, only {there}")
    return content


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def detect_family(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The families that the names of the weights may belong to; none where they are unknown.

    Vim and the image models of VideoMamba have the same names, so both are returned: which it is must be said.
    """
    names = tuple(state)

    def has(part: str) -> bool:
        return any(part in name for name in names)

    if "pos_embed_cls" in state:
        return ("mamba_reg",)
    if "temporal_pos_embedding" in state:
        return ("videomamba",)
    if has(".mixer.A_log_0"):
        return ("local_vim",)
    if has(".direction_Bs"):
        return ("plain_mamba",)
    if has(".multi_scan."):
        return ("local_vmamba",)
    if has(".A_logs"):
        return ("vmamba",)
    if has(".conv1d_x."):
        return ("mambavision",)
    if has(".mixer.A_b_log") and "cls_token" in state:
        return ("vim", "videomamba")
    return ()


def load(model: nn.Module, state: Mapping[str, Tensor], spec: ModelSpec) -> None:
    """Copy `state` into the model: every entry of the model, in its shape, and no other.

    Raises:
        ValueError: as `check`; the model is then unchanged.
    """
    model.load_state_dict(check(model, state, spec), strict=True)


def check(model: nn.Module, state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The entries of `state` that are the model's, without what training scripts leave beside them.

    Raises:
        ValueError: naming the first entry that is missing, too many, or of another shape, and the family that the
            weights look like.
    """
    expected = model.state_dict()
    state = {
        name: value
        for name, value in state.items()
        if name in expected or not any(fnmatchcase(name, pattern) for pattern in LEFTOVERS)
    }
    problem = _mismatch(expected, state)
    if problem is not None:
        families = " or ".join(detect_family(state)) or "no family known here"
        raise ValueError(
            f"the weights do not fit {spec.name} of the family {spec.family}: {problem} "
            f"({len(state)} entries for {len(expected)}; by their names the weights are of {families})"
        )
    return state


def _mismatch(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """The first thing that keeps `state` from being loaded, in words."""
    missing = next((name for name in expected if name not in state), None)
    if missing is not None:
        return f"{missing} is missing"
    # rotary embeddings are known by their buffers: without them the model would load and be wrong
    unexpected = next((name for name in state if name not in expected), None)
    if unexpected is not None:
        return f"the model has no {unexpected}"
    for name, wanted in expected.items():
        given = state[name]
        if given.shape != wanted.shape:
            return f"{name} has the shape {tuple(given.shape)} and not {tuple(wanted.shape)}"
        if given.is_floating_point() != wanted.is_floating_point():
            return f"{name} is of type {given.dtype}, and {wanted.dtype} cannot be made of it"
    return None
