"""The modules that stand in for the CUDA packages: which names each has, as module objects."""

from __future__ import annotations

import opcode
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType

from . import conv, extensions, inner, mamba, norm, scan
from .uncovered import UNCOVERED, GenerationMixin, refusal

COVERED: dict[str, dict[str, object]] = {
    "mamba_ssm": {
        "__version__": "1.2.0+mambatrim",
        "Mamba": mamba.Mamba,
        "selective_scan_fn": scan.selective_scan_fn,
        "mamba_inner_fn": inner.mamba_inner_fn,
        "bimamba_inner_fn": inner.bimamba_inner_fn,
    },
    "mamba_ssm.modules.mamba_simple": {
        "Mamba": mamba.Mamba,
        "RMSNorm": norm.RMSNorm,
        "layer_norm_fn": norm.layer_norm_fn,
        "rms_norm_fn": norm.rms_norm_fn,
    },
    "mamba_ssm.ops.selective_scan_interface": {
        "selective_scan_fn": scan.selective_scan_fn,
        "selective_scan_ref": scan.selective_scan_ref,
        "mamba_inner_fn": inner.mamba_inner_fn,
        "mamba_inner_ref": inner.mamba_inner_ref,
        "mamba_inner_fn_no_out_proj": inner.mamba_inner_fn_no_out_proj,
        "bimamba_inner_fn": inner.bimamba_inner_fn,
        "bimamba_inner_ref": inner.bimamba_inner_ref,
    },
    "mamba_ssm.ops.triton.layernorm": {
        "RMSNorm": norm.RMSNorm,
        "layer_norm_fn": norm.layer_norm_fn,
        "rms_norm_fn": norm.rms_norm_fn,
    },
    "mamba_ssm.ops.triton.layer_norm": {
        "RMSNorm": norm.RMSNorm2,
        "layer_norm_fn": norm.layer_norm_fn_2,
        "rms_norm_fn": norm.rms_norm_fn_2,
    },
    "mamba_ssm.utils.generation": {
        "GenerationMixin": GenerationMixin,
        "InferenceParams": mamba.InferenceParams,
    },
    "causal_conv1d": {
        "__version__": "1.4.0+mambatrim",
        "causal_conv1d_fn": conv.causal_conv1d_fn,
        "causal_conv1d_update": conv.causal_conv1d_update,
    },
    "causal_conv1d.causal_conv1d_interface": {
        "causal_conv1d_fn": conv.causal_conv1d_fn,
        "causal_conv1d_update": conv.causal_conv1d_update,
    },
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": conv.causal_conv1d_fwd_function,
        "causal_conv1d_bwd_function": conv.causal_conv1d_bwd_function,
        "causal_conv1d_update_function": conv.causal_conv1d_update_function,
    },
    "causal_conv1d_cuda": {
        "causal_conv1d_fwd": conv.causal_conv1d_fwd,
        "causal_conv1d_bwd": conv.causal_conv1d_bwd,
        "causal_conv1d_update": conv.causal_conv1d_cuda_update,
    },
    "selective_scan_cuda": {"fwd": extensions.fwd, "bwd": extensions.bwd},
    "selective_scan_cuda_core": {"fwd": extensions.core_fwd, "bwd": extensions.core_bwd},
    "selective_scan_cuda_oflex": {"fwd": extensions.oflex_fwd, "bwd": extensions.core_bwd},
    "selective_scan_cuda_ndstate": {"fwd": extensions.ndstate_fwd, "bwd": extensions.ndstate_bwd},
}


def _in_from_import(frame: FrameType) -> bool:
    """Whether the frame is at the part of `from module import name` that fetches the name."""
    return opcode.opname[frame.f_code.co_code[frame.f_lasti]] == "IMPORT_FROM"


def _stand_in(name: str, content: Mapping[str, object], is_package: bool) -> ModuleType:
    """A module of the content that names itself and what it has when it is asked for anything else."""
    module = ModuleType(name, f"Stand-in of mambatrim for {name}, without CUDA.")
    module.__spec__ = ModuleSpec(name, None, is_package=is_package)
    module.__package__ = name if is_package else name.rpartition(".")[0]
    if is_package:
        module.__path__ = []
    public = ", ".join(sorted(key for key in content if not key.startswith("_")))

    def __getattr__(key: str) -> object:
        sentence = f"mambatrim's stand-in for {name} has no {key!r}; it has {public or 'nothing but its modules'}"
        # Python throws the text of an AttributeError away in `from ... import`; hasattr and pickle rely on it elsewhere
        if not key.startswith("__") and _in_from_import(sys._getframe(1)):
            raise ImportError(sentence, name=name)
        raise AttributeError(sentence, name=key, obj=module)

    vars(module).update(content, __getattr__=__getattr__)
    return module


def _build() -> dict[str, ModuleType]:
    names = {*COVERED, *UNCOVERED}
    # the packages on the way to each module
    names |= {name[:at] for name in names for at, letter in enumerate(name) if letter == "."}
    modules = {}
    for name in sorted(names):
        refused = {key: refusal(name, key) for key in UNCOVERED.get(name, ())}
        is_package = any(other.startswith(f"{name}.") for other in names)
        modules[name] = _stand_in(name, {**refused, **COVERED.get(name, {})}, is_package)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


STAND_INS = _build()  # by their full names, packages before what is in them
