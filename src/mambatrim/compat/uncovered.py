"""What the real packages have and the stand-ins have not: names that import, and say so when they are called.

Scripts import many names that they never call. They get a function, or a class for a capitalised name, that raises
NotImplementedError with its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

UNCOVERED: dict[str, tuple[str, ...]] = {
    "mamba_ssm": ("Mamba2", "Mamba3", "MambaLMHeadModel"),
    "mamba_ssm.modules.mamba_simple": ("Block",),
    "mamba_ssm.modules.block": ("Block",),
    "mamba_ssm.modules.mamba2": ("Mamba2",),
    "mamba_ssm.modules.mamba2_simple": ("Mamba2Simple",),
    "mamba_ssm.modules.mamba3": ("Mamba3",),
    "mamba_ssm.modules.mha": ("MHA",),
    "mamba_ssm.modules.mlp": ("GatedMLP",),
    "mamba_ssm.modules.ssd_minimal": ("segsum", "ssd_minimal_discrete"),
    "mamba_ssm.models.config_mamba": ("MambaConfig",),
    "mamba_ssm.models.mixer_seq_simple": ("MambaLMHeadModel", "MixerModel", "create_block"),
    "mamba_ssm.ops.triton.layernorm": ("layer_norm_ref", "rms_norm_ref"),
    "mamba_ssm.ops.triton.layer_norm": ("layer_norm_linear_fn", "layer_norm_ref", "rms_norm_ref"),
    "mamba_ssm.ops.triton.layernorm_gated": ("LayerNorm", "RMSNorm", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"),
    "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update", "selective_state_update_ref"),
    "mamba_ssm.ops.triton.ssd_combined": (
        *("mamba_chunk_scan", "mamba_chunk_scan_combined", "mamba_conv1d_scan_ref", "mamba_split_conv1d_scan_combined"),
        *("mamba_split_conv1d_scan_ref", "ssd_chunk_scan_combined_ref", "ssd_selective_scan"),
    ),
    "mamba_ssm.ops.triton.ssd_chunk_scan": ("chunk_scan", "chunk_scan_ref"),
    "mamba_ssm.ops.triton.ssd_chunk_state": ("chunk_state", "chunk_state_ref"),
    "mamba_ssm.ops.triton.ssd_state_passing": ("state_passing", "state_passing_ref"),
    "mamba_ssm.utils.generation": ("decode", "sample", "update_graph_cache"),
    "mamba_ssm.utils.hf": ("load_config_hf", "load_state_dict_hf"),
    "mamba_ssm.distributed.distributed_utils": ("all_reduce", "reduce_scatter"),
    "mamba_ssm.distributed.tensor_parallel": ("ColumnParallelLinear", "RowParallelLinear"),
    "causal_conv1d.causal_conv1d_interface": ("causal_conv1d_ref", "causal_conv1d_update_ref"),
    "causal_conv1d.causal_conv1d_varlen": ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref"),
}


def refusal(module: str, name: str) -> Callable[..., NoReturn] | type:
    """What stands under `name` in the stand-in for `module`."""
    sentence = f"{module}.{name} is not covered by mambatrim.compat, which runs Mamba-1 without CUDA"

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(sentence)

    if name[0].isupper():
        return type(name, (), {"__init__": refuse, "__doc__": f"{sentence}.", "__module__": module})
    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__, refuse.__module__ = f"{sentence}.", module
    return refuse


class GenerationMixin:
    """A base that models of images inherit and never use: it can be built, and its `generate` refuses."""

    generate = refusal("mamba_ssm.utils.generation", "generate")
