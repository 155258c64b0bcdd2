"""The stand-ins for the CUDA packages: values of official code, gradients in double precision, and whole scripts."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mambatrim import compat
from mambatrim.compat.stand_ins import STAND_INS

PACKAGES = [name for name in STAND_INS if "." not in name]
REAL = [name for name in PACKAGES if name not in sys.modules and importlib.util.find_spec(name) is not None]
pytestmark = pytest.mark.skipif(bool(REAL), reason=f"the real packages are installed: {', '.join(REAL)}")

SCAN = "mamba_ssm.ops.selective_scan_interface"


@pytest.fixture
def ours():
    """Imports a module with the stand-ins in place."""
    compat.install()
    yield importlib.import_module
    compat.uninstall()


def close(actual, expected, tolerance=3e-6):
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-3)
    assert error <= tolerance, f"relative error {error:.2e}"


def leaves(seed, **shapes):
    """Random fp32 leaves of autograd; A is negative."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return {n: (-torch.exp(0.5 * t) if n.startswith("A") else t).requires_grad_() for n, t in made.items()}


def doubled(tensors):
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=True):
    """The scan, channel-first, written again: (B, E, L), and the last state."""
    groups = 1 if B.dim() == 3 else B.shape[1]
    B, C = (x.reshape(x.shape[0], groups, *x.shape[-2:]).repeat_interleave(u.shape[1] // groups, 1) for x in (B, C))
    steps = delta if delta_bias is None else delta + delta_bias[:, None]
    steps = F.softplus(steps) if softplus else steps
    state, outputs = 0, []
    for t in range(u.shape[2]):
        state = torch.exp(steps[..., t, None] * A) * state + (steps * u)[..., t, None] * B[..., t]
        outputs.append((state * C[..., t]).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def inner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, D, delta_bias, A_b=None):
    """Convolution, projections and scan written again: xz (B, 2E, L) -> (B, E, L); with A_b the flipped scan added."""
    x, z = xz.chunk(2, dim=1)
    taps = conv1d_weight.shape[-1]
    u = F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), conv1d_weight, conv1d_bias, groups=x.shape[1]))
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    dt, B, C = (x_proj_weight @ u).split([rank, states, states], dim=1)
    delta = delta_proj_weight @ dt
    y = recurrence(u, delta, A, B, C, D, z, delta_bias)[0]
    if A_b is None:
        return y
    flipped = [t.flip(-1) for t in (u, delta, B, C, z)]
    other = recurrence(flipped[0], flipped[1], A_b, flipped[2], flipped[3], D, flipped[4], delta_bias)[0]
    return y + other.flip(-1)


def same_gradients(actual, tensors, expected, wide, tolerance=1e-5):
    """Values, and gradients of a random projection by all tensors, against double precision."""
    close(actual, expected)
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(9))
    mine = torch.autograd.grad(actual, list(tensors.values()), grad)
    theirs = torch.autograd.grad(expected, list(wide.values()), grad.double(), retain_graph=True)
    for name, a, b in zip(tensors, mine, theirs, strict=True):
        assert a.dtype == tensors[name].dtype
        close(a, b, tolerance)


# ------------------------------------------------------------------------------------------------- installing, names


def test_install_is_idempotent_and_uninstall_takes_away_exactly_that():
    before = set(sys.modules)
    names = compat.install()
    assert compat.install() == names == list(STAND_INS)
    assert set(sys.modules) - before == set(names)
    assert compat.uninstall() == names
    assert set(sys.modules) == before
    assert compat.uninstall() == []


def test_a_real_package_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        names = compat.install()
        assert "causal_conv1d" in names and not any(name.startswith("mamba_ssm") for name in names)
        module = importlib.import_module("mamba_ssm")
        assert module.real and compat.install() == names  # imported or not
        assert "mamba_ssm" not in compat.uninstall()
        assert sys.modules["mamba_ssm"] is module
    finally:
        compat.uninstall()
        sys.modules.pop("mamba_ssm", None)


def test_what_is_not_there_says_so_at_import(ours):
    with pytest.raises(ImportError, match=f"{SCAN} has no 'complex_scan_fn'; it has .*selective_scan_fn"):
        exec(f"from {SCAN} import complex_scan_fn")
    with pytest.raises(ImportError, match="mamba_ssm has no 'Mamba7'; it has Mamba, "):
        exec("from mamba_ssm import Mamba7")
    with pytest.raises(ModuleNotFoundError, match="mamba_ssm.vision"):
        ours("mamba_ssm.vision")
    module = ours(SCAN)
    assert not hasattr(module, "complex_scan_fn")  # pickle and inspect go through all modules and count on this
    with pytest.raises(AttributeError, match="stand-in for mamba_ssm.ops.selective_scan_interface"):
        _ = module.complex_scan_fn
    assert importlib.util.find_spec("mamba_ssm") is not None and inspect.getmodule(close).__name__ == __name__
    assert pickle.loads(pickle.dumps(torch.relu)) is torch.relu


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("mamba_ssm", "Mamba2"),
        ("mamba_ssm.modules.mamba2", "Mamba2"),
        ("mamba_ssm.modules.mamba2_simple", "Mamba2Simple"),
        ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
        ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
        ("mamba_ssm.ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined"),
        ("mamba_ssm.models.mixer_seq_simple", "MambaLMHeadModel"),
        ("mamba_ssm.utils.hf", "load_config_hf"),
        ("causal_conv1d.causal_conv1d_interface", "causal_conv1d_ref"),
    ],
)
def test_names_that_scripts_only_import_refuse_when_called(ours, module, name):
    found = getattr(ours(module), name)
    with pytest.raises(NotImplementedError, match=f"{module}.{name} is not covered"):
        found(torch.ones(1), dim=3)


# ------------------------------------------------------------------------------------------- selective_scan_interface


@pytest.mark.parametrize("case", ["groups4", "large_delta", "len1", "n1", "n16", "n8", "no_z", "plain"])
@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_ref"])
def test_golden_scan(ours, golden, case, name):
    file = golden("selective_scan")
    x = file.part(f"{case}.")
    arguments = {key: x[key] for key in file.config[case]["inputs"]}
    softplus = file.config[case]["delta_softplus"]
    out, state = getattr(ours(SCAN), name)(**arguments, delta_softplus=softplus, return_last_state=True)
    assert out.is_contiguous()
    allowed = 4 * file.checks["max_abs_float32_minus_float64"][case]
    for actual, expected in ((out, x["out"]), (state, x["last_state"])):
        assert (actual - expected).abs().max() <= max(allowed, 1e-5 * expected.abs().max())


def scan_leaves(groups, length=13):
    few = (2, 5, length) if groups == 0 else (2, groups, 5, length)
    rows = dict.fromkeys(("u", "delta", "z"), (2, 12, length))
    return leaves(3, **rows, A=(12, 5), B=few, C=few, D=(12,), delta_bias=(12,))


@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_ref"])
@pytest.mark.parametrize("groups", [0, 1, 3, 12])
@pytest.mark.parametrize("left_out", [(), ("z",), ("D", "delta_bias", "z")])
def test_scan_gradients(ours, name, groups, left_out):
    x = {key: t for key, t in scan_leaves(groups).items() if key not in left_out}
    softplus = "delta_bias" not in left_out
    if not softplus:
        x["delta"] = x["delta"].detach().abs().requires_grad_()
    wide = doubled(x)
    same_gradients(
        *(getattr(ours(SCAN), name)(**x, delta_softplus=softplus), x),
        *(recurrence(**wide, softplus=softplus)[0], wide),
    )


def test_scan_in_double_precision_and_of_any_layout(ours):
    scan = ours(SCAN).selective_scan_fn
    wide = doubled(scan_leaves(3, length=4))
    names = list(wide)
    assert torch.autograd.gradcheck(
        lambda *t: scan(**dict(zip(names, t, strict=True)), delta_softplus=True), tuple(wide.values())
    )
    x = {key: t.detach() for key, t in scan_leaves(1).items()}
    strided = {key: t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t for key, t in x.items()}
    assert torch.equal(scan(**x, delta_softplus=True), scan(**strided, delta_softplus=True))


def test_scan_in_bf16(ours):
    scan = ours(SCAN).selective_scan_fn
    x = scan_leaves(1)
    half = {k: t.detach().bfloat16().requires_grad_() if t.dim() > 2 else t for k, t in x.items()}
    wide = doubled(half)
    out = scan(**half, delta_softplus=True)
    expected = recurrence(**wide)[0]
    assert out.dtype == torch.bfloat16
    close(out, expected, 2**-8)
    mine = torch.autograd.grad(out.float().sum(), list(half.values()))
    for a, b in zip(mine, torch.autograd.grad(expected.sum(), list(wide.values())), strict=True):
        close(a, b, 2**-6)


def test_scan_refuses_by_name(ours):
    scan = ours(SCAN).selective_scan_fn
    x = {key: t.detach() for key, t in scan_leaves(0).items()}
    with pytest.raises(NotImplementedError, match="complex A"):
        scan(**{**x, "A": x["A"].to(torch.complex64)})
    with pytest.raises(NotImplementedError, match="complex B"):
        scan(**{**x, "B": x["B"].to(torch.complex64)})
    with pytest.raises(NotImplementedError, match="C for every token.*constant over the tokens"):
        scan(**{**x, "C": x["A"]})
    with pytest.raises(ValueError, match=r"u must be \(B, E, L\)"):
        scan(**{**x, "u": x["u"][0]})
    with pytest.raises(ValueError, match="groups that divides 12 channels, got 5"):
        scan(**{**x, "B": torch.ones(2, 5, 5, 13), "C": torch.ones(2, 5, 5, 13)})


def inner_leaves():
    return leaves(
        *(5,),
        **{"xz": (2, 24, 11), "conv1d_weight": (12, 1, 4), "conv1d_bias": (12,), "x_proj_weight": (13, 12)},
        **{"delta_proj_weight": (12, 3), "A": (12, 5), "A_b": (12, 5), "D": (12,), "delta_bias": (12,)},
        **{"out_proj_weight": (6, 12), "out_proj_bias": (6,)},
    )


@pytest.mark.parametrize("name", ["mamba_inner_fn", "mamba_inner_ref", "bimamba_inner_fn", "bimamba_inner_ref"])
def test_inner_functions_and_their_gradients(ours, name):
    x = inner_leaves()
    if not name.startswith("bi"):
        x.pop("A_b")
    wide = doubled(x)
    y = inner(**{key: t for key, t in wide.items() if not key.startswith("out")})
    expected = F.linear(y.transpose(1, 2), wide["out_proj_weight"], wide["out_proj_bias"])
    same_gradients(getattr(ours(SCAN), name)(**x), x, expected, wide)


def test_inner_function_without_output_projection(ours):
    x = {key: t for key, t in inner_leaves().items() if not key.startswith(("out", "A_b"))}
    wide = doubled(x)
    same_gradients(ours(SCAN).mamba_inner_fn_no_out_proj(**x), x, inner(**wide), wide)


def test_inner_function_with_b_and_c_of_the_caller(ours):
    x = {key: t for key, t in inner_leaves().items() if key != "A_b"}
    run = ours(SCAN).mamba_inner_fn
    whole = run(**x)
    u = torch.nn.functional.silu(
        F.conv1d(F.pad(x["xz"][:, :12], (3, 0)), x["conv1d_weight"], x["conv1d_bias"], groups=12)
    )
    _, B, C = (x["x_proj_weight"] @ u).split([3, 5, 5], dim=1)
    short = {**x, "x_proj_weight": x["x_proj_weight"][:3]}
    close(run(**short, B=B, C=C[:, None]), whole)
    biases = {"B_proj_bias": torch.ones(5), "C_proj_bias": torch.ones(5)}
    close(run(**short, B=B + 1, C=C + 1), run(**x, **biases))
    with pytest.raises(NotImplementedError, match="leave out dt_rms_weight"):
        run(**x, dt_rms_weight=torch.ones(12))
    with pytest.raises(ValueError, match=r"xz must be \(B, 24, L\)"):
        run(**{**x, "xz": x["xz"][:, :20]})


# --------------------------------------------------------------------------------------------------------- the mixer


@pytest.mark.parametrize("case", ["plain", "short", "bias_noconvbias"])
def test_golden_mixer_and_its_steps(ours, golden, case):
    file = golden("mamba1_mixer")
    x = file.part(f"{case}.")
    mixer = ours("mamba_ssm").Mamba(**file.config[case])
    mixer.load_state_dict(file.part(f"{case}.state."))
    inference = ours("mamba_ssm.utils.generation").InferenceParams(max_seqlen=32, max_batch_size=2)
    with torch.no_grad():
        close(mixer(x["input"]), x["out"], 1e-5)
        close(mixer(torch.cat([x["input"], x["more"]], dim=1)), x["out_long"], 1e-5)
        close(mixer(x["input"], inference_params=inference), x["out"], 1e-5)
        conv_state, ssm_state = inference.key_value_memory_dict[0]
        close(conv_state, x["conv_state"], 1e-5)
        close(ssm_state, x["ssm_state"], 1e-5)
        steps = []
        for t in range(3):
            inference.seqlen_offset += 1
            steps.append(mixer(x["more"][:, t : t + 1], inference_params=inference))
    close(torch.cat(steps, dim=1), x["step_out"], 1e-5)
    close(conv_state, x["step_conv_state"], 1e-5)
    close(ssm_state, x["step_ssm_state"], 1e-5)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("mixer_halved", {"bimamba_type": "v2", "if_divide_out": True}),
        ("mixer_halved", {"bimamba_type": "v2", "if_devide_out": True, "use_fast_path": False}),
        ("mixer_summed", {"bimamba_type": "v2"}),
        ("mixer_summed", {"bimamba": True}),
    ],
)
def test_golden_mixer_of_two_directions(ours, golden, case, options):
    file = golden("norm_and_conv")
    mixer = ours("mamba_ssm.modules.mamba_simple").Mamba(32, d_state=16, **options)
    mixer.load_state_dict(file.part("mixer.state."))
    close(mixer(file.tensors[f"{case}.x"]), file.tensors[f"{case}.out"], 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"bimamba_type": "v1"}, {"bimamba_type": "v2", "if_divide_out": True}], ids=str
)
def test_mixer_gradients(ours, options):
    torch.manual_seed(0)
    mixer = ours("mamba_ssm").Mamba(8, d_state=3, bias=True, init_layer_scale=0.5, **options)
    tensors = {"x": torch.randn(2, 9, 8).requires_grad_(), **dict(mixer.named_parameters())}
    wide = doubled(tensors)
    p = wide.__getitem__
    xz = F.linear(p("x"), p("in_proj.weight"), p("in_proj.bias")).transpose(1, 2)

    def direction(xz, b, decays):
        names = ("conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight")
        weights = [p(name.format(b)) for name in names]
        return inner(xz, *weights, decays[0], p("D_b" if b else "D"), p(f"dt_proj{b}.bias"), *decays[1:])

    decays = [-torch.exp(p(name)) for name in ("A_log", "A_b_log") if name in wide]
    if options.get("bimamba_type") == "v2":
        y = (direction(xz, "", decays[:1]) + direction(xz.flip(-1), "_b", decays[1:]).flip(-1)) / 2
    else:
        y = direction(xz, "", decays)
    expected = F.linear(y.transpose(1, 2), p("out_proj.weight"), p("out_proj.bias")) * p("gamma")
    same_gradients(mixer(tensors["x"]), tensors, expected, wide)


def test_mixer_in_bf16_and_under_autocast(ours):
    torch.manual_seed(0)
    mixer = ours("mamba_ssm").Mamba(16, bimamba_type="v2")
    x = torch.randn(2, 7, 16)
    exact = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mixer(x)
    mixed = mixer.bfloat16()(x.bfloat16())
    for found in (cast, mixed):
        assert found.dtype == torch.bfloat16
        close(found, exact, 2**-5)  # projections of projections, each rounded to 8 bits
    mixed.float().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in mixer.parameters())


def test_mixer_starts_as_released(ours):
    mixer = ours("mamba_ssm").Mamba(32, bimamba_type="v2", dt_min=0.01, dt_max=0.2)
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.0099 <= steps.min() < steps.max() <= 0.201
    assert torch.equal(mixer.A_b_log.exp().round(), torch.arange(1.0, 17).expand(64, -1))
    assert mixer.A_log._no_weight_decay and mixer.D_b._no_weight_decay and mixer.dt_proj.bias._no_reinit
    assert mixer.dt_rank == 2 and mixer.conv1d.padding == (3,)
    assert "A_b_log" in ours("mamba_ssm").Mamba(32, bimamba_type="v1").state_dict()


def test_mixer_refuses_by_name(ours):
    Mamba = ours("mamba_ssm").Mamba
    with pytest.raises(ValueError, match="bimamba_type must be one of none, v1, v2, got 'v3'"):
        Mamba(16, bimamba_type="v3")
    with pytest.raises(ValueError, match="dt_init must be 'constant' or 'random', got 'zero'"):
        Mamba(16, dt_init="zero")
    two = Mamba(16, bimamba_type="v2", layer_idx=0)
    with pytest.raises(NotImplementedError, match="'v2' needs all tokens at once"):
        two.step(torch.ones(1, 1, 16), *two.allocate_inference_cache(1, 8))
    with pytest.raises(ValueError, match="one token"):
        Mamba(16).step(torch.ones(1, 2, 16), *two.allocate_inference_cache(1, 8))
    with pytest.raises(ValueError, match="needs a layer_idx"):
        Mamba(16)(torch.ones(1, 2, 16), ours("mamba_ssm.utils.generation").InferenceParams(8, 1))


# ------------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("module", ["layernorm", "layer_norm"])
@pytest.mark.parametrize("case", ["rms", "rms_first", "layer"])
def test_golden_norms(ours, golden, module, case):
    x = golden("norm_and_conv").part(f"{case}.")
    norms = ours(f"mamba_ssm.ops.triton.{module}")
    options = {"residual": x.get("residual"), "eps": 1e-5, "residual_in_fp32": True}
    function = norms.layer_norm_fn if case == "layer" else norms.rms_norm_fn
    out, stream = function(x["x"], x["weight"], x.get("bias"), prenorm=True, **options)
    close(out, x["out"])
    assert torch.equal(stream, x["residual_out"])
    assert torch.equal(function(x["x"], x["weight"], x.get("bias"), **options), out)
    if case != "layer":
        layer = norms.RMSNorm(48, eps=1e-5)
        layer.load_state_dict({"weight": x["weight"]})
        assert torch.equal(layer(x["x"], x.get("residual"), prenorm=True)[0], out)
        assert torch.equal(norms.layer_norm_fn(x["x"], x["weight"], None, is_rms_norm=True, **options), out)


@pytest.mark.parametrize("module", ["layernorm", "layer_norm"])
@pytest.mark.parametrize("function", ["layer_norm_fn", "rms_norm_fn", "RMSNorm"])
@pytest.mark.parametrize("first", [True, False])
def test_norm_gradients(ours, module, function, first):
    norms = ours(f"mamba_ssm.ops.triton.{module}")
    x = leaves(1, x=(2, 5, 12), weight=(12,), bias=(12,), residual=(2, 5, 12))
    if first:
        x.pop("residual")
    if function == "RMSNorm":
        x.pop("bias")
    wide = doubled(x)
    if function == "RMSNorm":
        layer = norms.RMSNorm(12)
        layer.weight = torch.nn.Parameter(x["weight"].detach())
        x["weight"] = layer.weight
        out, stream = layer(x["x"], x.get("residual"), prenorm=True)
    else:
        out, stream = getattr(norms, function)(**x, eps=1e-5, prenorm=True)
    total = wide["x"] + wide.get("residual", 0)
    centred = total - total.mean(-1, keepdim=True) if function == "layer_norm_fn" else total
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * wide["weight"] + wide.get("bias", 0)
    same_gradients(torch.cat([out, stream]), x, torch.cat([normed, total]), wide)


def test_norm_dtypes(ours):
    norms = ours("mamba_ssm.ops.triton.layernorm")
    x, residual, weight = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8), torch.ones(8)
    out, stream = norms.rms_norm_fn(x, weight, None, residual, prenorm=True)
    assert (out.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(stream, x.float() + residual)
    first = norms.rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)[1]
    assert first.dtype == torch.float32 and norms.rms_norm_fn(x, weight, None, prenorm=True)[1] is x
    assert norms.rms_norm_fn(x, weight, None, x, prenorm=True)[1].dtype == torch.bfloat16


def test_norms_refuse_by_name(ours):
    norms = ours("mamba_ssm.ops.triton.layer_norm")
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(NotImplementedError, match="dropout_p must be 0"):
        norms.RMSNorm(8, dropout_p=0.1)
    with pytest.raises(NotImplementedError, match="do not take x1"):
        norms.rms_norm_fn(x, weight, None, x1=x)


# ------------------------------------------------------------------------------------------------------- convolution


@pytest.mark.parametrize("case", ["l1_w4", "l3_w4", "l37_w2", "l37_w3", "l37_w4"])
def test_golden_convolution(ours, golden, case):
    x = golden("norm_and_conv").part(f"conv_{case}.")
    conv, raw = ours("causal_conv1d").causal_conv1d_fn, ours("causal_conv1d_cuda").causal_conv1d_fwd
    arguments = (x["x"], x["weight"], x["bias"])
    found = [conv(*arguments, activation="silu"), conv(*arguments, "silu"), conv(*arguments, None, "silu")]
    found += [raw(*arguments, True), raw(*arguments, None, True), raw(*arguments, None, None, None, True)]
    for out in found:
        close(out, x["out"])
        assert out.is_contiguous()
    last = conv(x["x"].transpose(1, 2).contiguous().transpose(1, 2), *arguments[1:], activation="swish")
    close(last, x["out"])
    assert x["x"].shape[2] == 1 or last.stride(1) == 1  # channel-last in, channel-last out


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_gradients_in_all_generations(ours, silu, with_bias):
    x = leaves(2, x=(2, 6, 9), weight=(6, 4), bias=(6,))
    if not with_bias:
        x.pop("bias")
    wide = doubled(x)
    expected = F.conv1d(F.pad(wide["x"], (3, 0)), wide["weight"][:, None], wide.get("bias"), groups=6)
    expected = F.silu(expected) if silu else expected
    same_gradients(ours("causal_conv1d").causal_conv1d_fn(**x, activation="silu" if silu else None), x, expected, wide)
    dout = torch.randn(2, 6, 9)
    theirs = torch.autograd.grad(expected, list(wide.values()), dout.double())
    backward = ours("causal_conv1d_cuda").causal_conv1d_bwd
    arguments = (x["x"], x["weight"], x.get("bias"), dout)
    for states in ((), (None,), (None, None, None)):
        both = torch.full((2, 12, 9), torch.nan)
        dx = both[:, :6]  # as mamba_ssm hands in half of the gradient of xz
        flags = (False, silu) if len(states) == 3 else (silu,)
        grads = backward(*arguments, *states, dx, *flags)
        assert len(grads) == (4 if len(states) == 3 else 3)
        close(dx, theirs[0])
        for a, b in zip(grads, theirs, strict=False):
            close(a, b)
        assert with_bias or grads[2] is None
    module = ours("causal_conv1d.cpp_functions")
    close(module.causal_conv1d_bwd_function(*arguments, None, None, None, None, False, silu)[0], theirs[0])
    close(module.causal_conv1d_fwd_function(*arguments[:3], None, None, None, silu), expected)


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("kept", [3, 4, 6])
def test_convolution_goes_on_from_its_states(ours, taps, kept):
    x = {name: t.detach() for name, t in leaves(4, x=(2, 6, 11), weight=(6, taps), bias=(6,)).items()}
    update, raw = ours("causal_conv1d").causal_conv1d_update, ours("causal_conv1d_cuda").causal_conv1d_update
    long = ours("causal_conv1d.cpp_functions").causal_conv1d_update_function
    whole = F.silu(F.conv1d(F.pad(x["x"], (taps - 1, 0)), x["weight"][:, None], x["bias"], groups=6))
    state, rest = torch.zeros(2, 6, kept), (x["weight"], x["bias"])
    found = [update(x["x"][..., 0], state, *rest, "silu")[..., None], update(x["x"][..., 1:6], state, *rest, "silu")]
    found += [raw(x["x"][..., 6], state, *rest, True)[..., None], raw(x["x"][..., 7:9], state, *rest, True, None)]
    found += [long(x["x"][..., 9:], state, *rest, True, None, None)]
    close(torch.cat(found, dim=2), whole)
    assert torch.equal(state, x["x"][..., -kept:])
    with pytest.raises(NotImplementedError, match="does not take cache_seqlens"):
        update(x["x"][..., 0], state, *rest, cache_seqlens=torch.zeros(2))
    with pytest.raises(ValueError, match=f"conv_state .B, E, {taps - 1} or more"):
        update(x["x"][..., 0], state[:1], *rest)


def test_convolution_refuses_by_name(ours):
    conv, raw = ours("causal_conv1d").causal_conv1d_fn, ours("causal_conv1d_cuda")
    x, weight = torch.ones(1, 6, 9), torch.ones(6, 4)
    with pytest.raises(NotImplementedError, match="does not take seq_idx"):
        conv(x, weight, seq_idx=torch.zeros(1, 9))
    with pytest.raises(NotImplementedError, match="does not take return_final_states"):
        conv(x, weight, return_final_states=True)
    with pytest.raises(ValueError, match="activation must be None, 'silu' or 'swish', got 'gelu'"):
        conv(x, weight, activation="gelu")
    with pytest.raises(NotImplementedError, match="4, 5 or 7 arguments, got 8"):
        raw.causal_conv1d_fwd(x, weight, None, None, None, None, None, True)
    with pytest.raises(NotImplementedError, match="does not take initial_states"):
        raw.causal_conv1d_fwd(x, weight, None, None, x, None, True)


# -------------------------------------------------------------------------------------------------- scan extensions


@pytest.mark.parametrize("case", ["groups4", "n16", "no_z"])
def test_golden_scan_extensions(ours, golden, case):
    file = golden("selective_scan")
    x = file.part(f"{case}.")
    head, tail = [x[key] for key in ("u", "delta", "A", "B", "C", "D")], (x["delta_bias"], True)
    allowed = max(4 * file.checks["max_abs_float32_minus_float64"][case], 1e-5 * x["out"].abs().max())
    results = ours("selective_scan_cuda").fwd(*head, x.get("z"), *tail)
    assert len(results) == (3 if "z" in x else 2)
    assert (results[-1 if "z" in x else 0] - x["out"]).abs().max() <= allowed
    assert (results[1][:, :, -1, 1::2] - x["last_state"]).abs().max() <= allowed  # as selective_scan_fn reads it
    core, _ = ours("selective_scan_cuda_core").fwd(*head, *tail, 1)
    oflex, _ = ours("selective_scan_cuda_oflex").fwd(*head, *tail, 1, True)
    for plain in (core, oflex):
        gated = plain * F.silu(x["z"]) if "z" in x else plain
        assert (gated - x["out"]).abs().max() <= allowed


@pytest.mark.parametrize("groups", [0, 4])
def test_scan_extension_gradients(ours, groups):
    x = scan_leaves(groups)
    wide = doubled(x)
    head = [x[key].detach() for key in ("u", "delta", "A", "B", "C", "D")]
    z, bias = x["z"].detach(), x["delta_bias"].detach()
    dout = torch.randn(2, 12, 13)
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
    extension = ours("selective_scan_cuda")
    out, states, gated = extension.fwd(*head, z, bias, True)
    dz = torch.full((2, 24, 13), torch.nan)[:, 12:]  # as mamba_ssm hands in half of the gradient of xz
    *grads, out_z = extension.bwd(*head, z, bias, dout, states, out, dz, True, True)
    expected = torch.autograd.grad(recurrence(**wide)[0], [wide[key] for key in order], dout.double())
    for a, b in zip(grads, expected, strict=True):
        close(a, b, 1e-5)
    assert grads[-1] is dz and torch.equal(out_z, gated)
    assert len(extension.bwd(*head, z, bias, dout, states, out, None, True, False)) == 8
    wide.pop("z")
    expected = torch.autograd.grad(recurrence(**wide)[0], [wide[key] for key in order[:-1]], dout.double())
    for name in ("selective_scan_cuda_core", "selective_scan_cuda_oflex"):
        grads = ours(name).bwd(*head, bias, dout, states, True, 1)
        for a, b in zip(grads, expected, strict=True):
            close(a, b, 1e-5)
    grads = extension.bwd(*head[:5], None, None, None, dout, states, out, None, True, False)
    assert len(grads) == 7 and grads[5] is grads[6] is None


def test_scan_extension_with_one_step_for_several_channels(ours):
    """VMamba's oflex takes a delta of fewer rows than there are channels."""
    x = scan_leaves(4)
    x |= {name: t.detach()[..., :3, :].requires_grad_() for name, t in x.items() if name == "delta"}
    x["delta_bias"] = x["delta_bias"].detach()[:3].requires_grad_()
    x.pop("z")
    wide = doubled(x)
    steps = {"delta": wide["delta"].repeat_interleave(4, 1), "delta_bias": wide["delta_bias"].repeat_interleave(4)}
    expected = recurrence(**{**wide, **steps})[0]
    arguments = [t.detach() for t in x.values()]
    extension = ours("selective_scan_cuda_oflex")
    out, states = extension.fwd(*arguments, True, 1, True)
    close(out, expected)
    dout = torch.randn(2, 12, 13)
    grads = extension.bwd(*arguments, dout, states, True, 1)
    for a, b in zip(grads, torch.autograd.grad(expected, list(wide.values()), dout.double()), strict=True):
        close(a, b, 1e-5)


def test_scan_extension_of_one_state(ours):
    x = leaves(7, u=(2, 12, 9), delta=(2, 12, 9), A=(12,), B=(2, 3, 9), C=(2, 3, 9), D=(12,), delta_bias=(12,))
    wide = doubled(x)
    whole = {"A": wide["A"][:, None], "B": wide["B"][:, :, None], "C": wide["C"][:, :, None]}
    expected, state = recurrence(**{**wide, **whole})
    arguments = [t.detach() for t in x.values()]
    extension = ours("selective_scan_cuda_ndstate")
    out, states = extension.fwd(*arguments, True, 1)
    close(out, expected)
    close(states[:, :, -1, 1::2], state)
    dout = torch.randn(2, 12, 9)
    grads = extension.bwd(*arguments, dout, states, True, 1)
    for a, b in zip(grads, torch.autograd.grad(expected, list(wide.values()), dout.double()), strict=True):
        close(a, b, 1e-5)


def test_scan_extensions_in_bf16(ours):
    x = {key: t.detach() for key, t in scan_leaves(4).items()}
    head = [x[key].bfloat16() if key in "uBC" or key == "delta" else x[key] for key in ("u", "delta", *"ABCD")]
    oflex = ours("selective_scan_cuda_oflex")
    wide, states = oflex.fwd(*head, x["delta_bias"], True, 1, True)
    narrow, _ = oflex.fwd(*head, x["delta_bias"], True, 1, False)
    core, _ = ours("selective_scan_cuda_core").fwd(*head, x["delta_bias"], True, 1)
    assert (wide.dtype, narrow.dtype, core.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16()) and torch.equal(core, narrow)
    grads = oflex.bwd(*head, x["delta_bias"], torch.randn(2, 12, 13), states, True, 1)
    assert [g.dtype for g in grads[:6]] == [t.dtype for t in head]


# ---------------------------------------------------------------------------------------------- released signatures

# the arguments of the releases in their order, as callers hand them in by position; ours may have more, with defaults
SCAN_ARGUMENTS = "u delta A B C D z delta_bias delta_softplus return_last_state"
INNER_ARGUMENTS = "B C D delta_bias B_proj_bias C_proj_bias delta_softplus"
CONV_WEIGHTS = "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight"
OUT = "out_proj_weight out_proj_bias"
CORE = "u delta A B C D delta_bias"
MIXER = (
    "d_model d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias use_fast_path "
    "layer_idx device dtype"
)
RMS_2 = "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm residual_in_fp32"
RELEASED = [
    (SCAN, "selective_scan_fn", SCAN_ARGUMENTS),
    (SCAN, "selective_scan_ref", SCAN_ARGUMENTS),
    (
        *(SCAN, "mamba_inner_fn"),
        f"{CONV_WEIGHTS} {OUT} A {INNER_ARGUMENTS} checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight "
        "b_c_dt_rms_eps",
    ),
    (SCAN, "mamba_inner_ref", f"{CONV_WEIGHTS} {OUT} A {INNER_ARGUMENTS}"),
    (SCAN, "mamba_inner_fn_no_out_proj", f"{CONV_WEIGHTS} A {INNER_ARGUMENTS}"),
    (SCAN, "bimamba_inner_fn", f"{CONV_WEIGHTS} {OUT} A A_b {INNER_ARGUMENTS}"),
    (SCAN, "bimamba_inner_ref", f"{CONV_WEIGHTS} {OUT} A A_b {INNER_ARGUMENTS}"),
    ("mamba_ssm.modules.mamba_simple", "Mamba", f"{MIXER} bimamba_type if_divide_out init_layer_scale"),
    ("mamba_ssm.modules.mamba_simple", "Mamba.forward", "self hidden_states inference_params T"),
    ("mamba_ssm.modules.mamba_simple", "Mamba.step", "self hidden_states conv_state ssm_state"),
    (
        *("mamba_ssm.ops.triton.layernorm", "layer_norm_fn"),
        "x weight bias residual eps prenorm residual_in_fp32 is_rms_norm",
    ),
    ("mamba_ssm.ops.triton.layernorm", "rms_norm_fn", "x weight bias residual prenorm residual_in_fp32 eps"),
    ("mamba_ssm.ops.triton.layernorm", "RMSNorm", "hidden_size eps device dtype"),
    ("mamba_ssm.ops.triton.layer_norm", "layer_norm_fn", f"{RMS_2} is_rms_norm return_dropout_mask"),
    ("mamba_ssm.ops.triton.layer_norm", "rms_norm_fn", f"{RMS_2} return_dropout_mask"),
    ("mamba_ssm.ops.triton.layer_norm", "RMSNorm", "hidden_size eps dropout_p device dtype"),
    ("mamba_ssm.ops.triton.layer_norm", "RMSNorm.forward", "self x residual prenorm residual_in_fp32"),
    (
        *("causal_conv1d", "causal_conv1d_fn"),
        "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    ),
    (
        *("causal_conv1d", "causal_conv1d_update"),
        "x conv_state weight bias activation cache_seqlens conv_state_indices",
    ),
    (
        *("causal_conv1d.cpp_functions", "causal_conv1d_fwd_function"),
        "x weight bias seq_idx initial_states final_states_out silu_activation",
    ),
    (
        *("causal_conv1d.cpp_functions", "causal_conv1d_bwd_function"),
        "x weight bias dout seq_idx initial_states dfinal_states dx return_dinitial_states silu_activation",
    ),
    ("selective_scan_cuda", "fwd", "u delta A B C D z delta_bias delta_softplus"),
    (
        *("selective_scan_cuda", "bwd"),
        "u delta A B C D z delta_bias dout x out dz delta_softplus recompute_out_z",
    ),
    ("selective_scan_cuda_core", "fwd", f"{CORE} delta_softplus nrows"),
    ("selective_scan_cuda_core", "bwd", f"{CORE} dout x delta_softplus nrows"),
    ("selective_scan_cuda_oflex", "fwd", f"{CORE} delta_softplus nrows out_float"),
    ("selective_scan_cuda_oflex", "bwd", f"{CORE} dout x delta_softplus nrows"),
    ("selective_scan_cuda_ndstate", "fwd", f"{CORE} delta_softplus nrows"),
    ("selective_scan_cuda_ndstate", "bwd", f"{CORE} dout x delta_softplus nrows"),
]
# the first values of optional arguments that the releases give
DEFAULTS = {
    "selective_scan_fn": {"D": None, "z": None, "delta_softplus": False, "return_last_state": False},
    "mamba_inner_fn": {"B": None, "D": None, "delta_bias": None, "delta_softplus": True, "checkpoint_lvl": 1},
    "bimamba_inner_fn": {"B": None, "D": None, "delta_softplus": True},
    "Mamba": {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "dt_min": 0.001, "bimamba_type": "none"},
    "layer_norm_fn": {"eps": 1e-6, "prenorm": False, "residual_in_fp32": False, "is_rms_norm": False},
    "RMSNorm": {"eps": 1e-5},
    "causal_conv1d_fn": {"bias": None, "activation": None},
}


@pytest.mark.parametrize(("module", "name", "arguments"), RELEASED, ids=lambda text: text.split()[0])
def test_released_signatures(ours, module, name, arguments):
    found = ours(module)
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters
    names = list(parameters)
    wanted = arguments.split()
    assert names[: len(wanted)] == wanted
    assert all(parameters[extra].default is not inspect.Parameter.empty for extra in names[len(wanted) :])
    for argument, value in DEFAULTS.get(name, {}).items():
        assert parameters[argument].default == value


# ------------------------------------------------------------------------------------------------------ whole scripts

SCRIPT = """
    import sys

    import causal_conv1d_cuda
    import selective_scan_cuda
    import selective_scan_cuda_core
    import selective_scan_cuda_ndstate
    import selective_scan_cuda_oflex
    import torch
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from mamba_ssm import Mamba
    from mamba_ssm.modules.mamba2 import Mamba2
    from mamba_ssm.modules.mamba_simple import Mamba as Same
    from mamba_ssm.ops.selective_scan_interface import (
        bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj, mamba_inner_ref, selective_scan_fn,
        selective_scan_ref,
    )
    from mamba_ssm.ops.triton.layer_norm import RMSNorm as Newer
    from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    from mamba_ssm.utils.generation import GenerationMixin
    from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

    assert Mamba is Same and __name__ == "__main__"
    torch.manual_seed(int(sys.argv[sys.argv.index("--seed") + 1]))


    class Scan(torch.autograd.Function):
        # as VMamba calls its extension
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, delta_bias):
            out, states, *rest = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, True, 1, True)
            ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
            return out

        @staticmethod
        def backward(ctx, dout):
            *arguments, states = ctx.saved_tensors
            grads = selective_scan_cuda_oflex.bwd(*arguments, dout, states, True, 1)
            core = selective_scan_cuda_core.bwd(*arguments, dout, states, True, 1)
            assert all(torch.equal(a, b) for a, b in zip(grads, core))
            return tuple(grads)


    class Net(torch.nn.Module, GenerationMixin):
        def __init__(self):
            super().__init__()
            self.norm, self.last = RMSNorm(16), Newer(16)
            kinds = enumerate(("none", "v1", "v2"))
            self.mixers = torch.nn.ModuleList(
                [Mamba(16, bimamba_type=kind, if_divide_out=True, layer_idx=i) for i, kind in kinds]
            )
            self.taps = torch.nn.Parameter(torch.randn(16, 4))

        def forward(self, x):
            residual = None
            for mixer in self.mixers:
                x, residual = rms_norm_fn(
                    x, self.norm.weight, None, residual=residual, prenorm=True, residual_in_fp32=True, eps=1e-5
                )
                x = mixer(x)
            x = self.last(x, residual=residual)
            x = causal_conv1d_fn(x=x.transpose(1, 2), weight=self.taps, activation="silu")
            A = -torch.ones(16, 2)
            few = x[:, None, :2]
            y = Scan.apply(x, x, A, few, few, self.taps[:, 0], self.taps[:, 1])
            return (y + selective_scan_fn(x, x, A, few, few, delta_softplus=True)).mean(-1)


    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    images = torch.randn(2, 9, 16)
    losses = []
    for _ in range(5):
        loss = net(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    m = net.mixers[1]
    xz = m.in_proj(images).transpose(1, 2)
    shared = (m.conv1d.weight, m.conv1d.bias, m.x_proj.weight, m.dt_proj.weight)
    A, A_b = -torch.exp(m.A_log), -torch.exp(m.A_b_log)
    last = {"D": m.D, "delta_bias": m.dt_proj.bias, "delta_softplus": True}
    both = bimamba_inner_fn(xz, *shared, m.out_proj.weight, None, A, A_b, None, None, **last)
    assert torch.allclose(both, m(images), atol=1e-6)
    one = mamba_inner_fn(xz, *shared, m.out_proj.weight, None, A, None, None, **last)
    assert torch.allclose(one, mamba_inner_ref(xz, *shared, m.out_proj.weight, None, A, **last), atol=1e-6)
    bare = mamba_inner_fn_no_out_proj(xz, *shared, A, None, None, **last)
    assert torch.allclose(one, bare.transpose(1, 2) @ m.out_proj.weight.t(), atol=1e-6)
    x, z = xz.detach().chunk(2, dim=1)
    u = causal_conv1d_cuda.causal_conv1d_fwd(x, m.conv1d.weight[:, 0], m.conv1d.bias, None, None, None, True)
    dt, B, C = (m.x_proj.weight @ u).split([1, 16, 16], dim=1)
    head = [u, m.dt_proj.weight @ dt, A, B, C, m.D, z, m.dt_proj.bias]
    taps = m.conv1d.weight[:, 0], m.conv1d.bias
    for generation in ((True,), (None, True), (None, None, None, True)):
        assert torch.equal(causal_conv1d_cuda.causal_conv1d_fwd(x, *taps, *generation), u)
    last = causal_conv1d_update(x[..., -1], x[..., -5:-1].clone(), *taps, "silu")
    assert torch.allclose(last, u[..., -1], atol=1e-6)
    one_state = selective_scan_cuda_ndstate.fwd(u, *head[1:2], A[:, 0], B[:, :1], C[:, :1], None, None, True)[0]
    assert one_state.shape == u.shape
    normed = layer_norm_fn(images, torch.ones(16), torch.zeros(16), eps=1e-5)
    assert torch.allclose(normed, torch.nn.functional.layer_norm(images, (16,)), atol=1e-5)
    out, states, gated = selective_scan_cuda.fwd(*head, True)
    assert torch.allclose(gated, bare, atol=1e-6)
    assert torch.allclose(gated, selective_scan_ref(*head, True), atol=1e-6)
    assert len(selective_scan_cuda.bwd(*head, torch.ones_like(out), states, out, None, True, False)) == 8
    try:
        Mamba2(16)
    except NotImplementedError as refusal:
        assert "mamba_ssm.modules.mamba2.Mamba2" in str(refusal)
    print("trained", sys.argv[1:])
"""


def run(*arguments, folder):
    """A clean process that knows this copy of mambatrim, in a folder."""
    package = str(Path(compat.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_script_that_knows_nothing_of_us_runs_and_trains(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text(textwrap.dedent(SCRIPT))
    done = run("-m", "mambatrim.compat", "code/train.py", "--seed", "3", "-h", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained ['--seed', '3', '-h']\n" and not done.stderr
    without = run("code/train.py", folder=tmp_path)
    assert without.returncode == 1 and "No module named 'causal_conv1d_cuda'" in without.stderr


def test_a_script_finds_its_neighbours_and_shows_its_own_errors(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "neighbour.py").write_text("from mamba_ssm import Mamba\n\n\ndef fail():\n    Mamba('wide')\n")
    (tmp_path / "code" / "main.py").write_text("import neighbour\n\nneighbour.fail()\n")
    done = run("-m", "mambatrim.compat", "code/main.py", folder=tmp_path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Traceback") and 'File "code/main.py", line 3' in lines[1]
    assert "runpy" not in done.stderr and "neighbour.py" in done.stderr
    (tmp_path / "exit.py").write_text("import sys\nsys.exit(7)\n")
    assert run("-m", "mambatrim.compat", "exit.py", folder=tmp_path).returncode == 7
    (tmp_path / "wrong.py").write_text("def f(:\n")
    wrong = run("-m", "mambatrim.compat", "wrong.py", folder=tmp_path)
    assert wrong.returncode == 1 and "SyntaxError" in wrong.stderr and "runpy" not in wrong.stderr
    missing = run("-m", "mambatrim.compat", "nowhere.py", folder=tmp_path)
    assert missing.returncode == 2 and "there is no script 'nowhere.py'" in missing.stderr


def test_a_package_beside_the_script_is_the_real_one(tmp_path):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import causal_conv1d_cuda, selective_scan_cuda\nreal = True\n")
    (tmp_path / "main.py").write_text("import mamba_ssm\n\nprint(mamba_ssm.real)\n")
    assert run("-m", "mambatrim.compat", str(tmp_path / "main.py"), folder="/").stdout == "True\n"


def test_the_page_on_own_models_runs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "own-model.md").read_text()
    page = page.partition("## Run a CUDA-only script on a CPU\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    (command,) = [text.split() for language, text in blocks if language == "sh"]
    script, program = (text for language, text in blocks if language == "python")
    (tmp_path / "train.py").write_text(script)
    done = run(*command[1:], folder=tmp_path)
    assert command[0] == "python" and done.returncode == 0, done.stderr
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(losses) == 3 and losses[2] < losses[0]
    done = run("-c", f"{program}\nprint(selective_scan_fn.__module__)", folder=tmp_path)
    assert done.stdout.startswith("mambatrim.compat"), done.stderr
