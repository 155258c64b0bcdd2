"""Every kernel against the definition in double precision, against golden data, and as an operator of PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mambatrim import kernels
from mambatrim.kernels import Direction, cpu, reference, scan_operator

BUILT = not cpu.missing()
# instruction sets of this machine, and the PyTorch form that runs where nothing was built
BACKENDS = [*(cpu.LEVELS[: cpu.LEVELS.index(cpu.level()) + 1] if BUILT else ()), "pytorch"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs the test once for every kernel, with memory that is not zeroed but poisoned with NaN."""
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "handles", lambda *tensors: False)
        yield request.param
        return
    best = cpu.level()
    cpu.level(request.param)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield request.param
    torch.use_deterministic_algorithms(False)
    cpu.level(best)


def make(batch, length, channels, states, rank, directions=2, seed=0):
    """Random arguments of a scan: u, directions, z; leaves of autograd."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    lines = []
    for s in range(directions):
        dt = normal(batch, length, rank or channels)
        weight = 0.3 * normal(channels, rank) if rank else None
        tensors = [dt, -torch.exp(0.5 * normal(channels, states)), normal(batch, length, states)]
        tensors += [normal(batch, length, states), normal(channels), normal(channels) - 1, weight]
        lines.append(Direction(*(t if t is None else t.requires_grad_() for t in tensors), reverse=s % 2 == 1))
    u = normal(directions, batch, length, channels).requires_grad_()
    return u, lines, normal(batch, length, channels).requires_grad_()


def definition(u, lines, z, repeats, scale):
    """The same by the reference recurrence in double precision, and leaves to differentiate by."""
    wide = [[t if t is None or isinstance(t, bool) else t.detach().double().requires_grad_() for t in d] for d in lines]
    u, z = (None if t is None else t.detach().double().requires_grad_() for t in (u, z))
    total, means, states = 0, [], []
    for s, (dt, A, B, C, D, bias, weight, reverse) in enumerate(wide):
        out = reference.selective_scan(u[s], dt, A, B, C, D, None, bias, weight, repeats, True, reverse)
        total, means, states = total + out[0], [*means, out[1]], [*states, out[2]]
    y = total * scale if z is None else total * scale * torch.nn.functional.silu(z)
    return (y, torch.stack(means, 1), torch.stack(states)), leaves(u, wide, z)


def leaves(u, lines, z):
    return [t for t in (u, z, *(t for d in lines for t in d)) if isinstance(t, torch.Tensor)]


def close(actual, expected, tolerance=3e-6):
    """Largest error relative to the largest value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-3)
    assert error <= tolerance, f"relative error {error:.2e}"


SHAPES = [
    (2, 37, 48, 16, 3),
    (1, 1, 20, 8, 2),
    (3, 19, 33, 5, 4),
    (1, 150, 17, 1, 1),
    (2, 9, 16, 64, 2),
    (5, 33, 40, 3, 0),
    (17, 6, 70, 16, 5),
    (1, 21, 7, 200, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_scan_and_all_its_gradients(backend, shape, gated):
    u, lines, z = make(*shape)
    z = z if gated else None
    repeats = 2 * torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) if shape[1] % 2 else None
    found = kernels.scan(u, lines, z, repeats, scale=0.5)
    expected, wide = definition(u, lines, z, None if repeats is None else repeats.double(), 0.5)
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted)
    grad = torch.randn(found.y.shape, generator=torch.Generator().manual_seed(2))
    actual = torch.autograd.grad(found.y, leaves(u, lines, z), grad)
    for mine, wanted in zip(actual, torch.autograd.grad(expected[0], wide, grad.double()), strict=True):
        close(mine, wanted, 1e-5)


@pytest.mark.parametrize("directions", [1, 2, 3, 4])
def test_any_number_of_directions(backend, directions):
    u, lines, z = make(2, 13, 24, 4, 2, directions)
    close(kernels.scan(u, lines, z).y, definition(u, lines, z, None, 1.0)[0][0])


def test_one_direction_without_options(backend):
    u, (line,), _ = make(2, 11, 24, 4, 0, directions=1)
    args = [t.detach() for t in (u[0], line.dt.abs(), line.A, line.B, line.C)]
    for reverse in (False, True):
        y, mean, state = kernels.selective_scan(*args, softplus=False, reverse=reverse)
        wide = reference.selective_scan(*(t.double() for t in args), softplus=False, reverse=reverse)
        for actual, expected in zip((y, mean, state), wide, strict=True):
            close(actual, expected)


def test_reversed_direction_is_the_flipped_sequence(backend):
    u, (line,), z = make(2, 23, 32, 8, 3, directions=1)
    turned = line._replace(dt=line.dt.flip(1), B=line.B.flip(1), C=line.C.flip(1), reverse=True)
    forward, backward = kernels.scan(u, [line], z), kernels.scan(u.flip(2), [turned], z.flip(1))
    assert torch.equal(forward.y, backward.y.flip(1))
    assert torch.equal(forward.dt_mean, backward.dt_mean.flip(2))
    assert torch.equal(forward.state, backward.state)


def test_strided_inputs_need_no_copy_of_the_caller(backend):
    u, lines, z = make(2, 12, 20, 4, 3)
    wide_z = torch.randn(2, 12, 40)
    wide_z[..., 20:] = z.detach()
    lines = [
        d._replace(**{n: v.detach() for n, v in d._asdict().items() if isinstance(v, torch.Tensor)}) for d in lines
    ]
    packed = [torch.cat([d.dt, d.B, d.C], -1).split([3, 4, 4], -1) for d in lines]
    views = [d._replace(dt=p[0], B=p[1], C=p[2]) for d, p in zip(lines, packed, strict=True)]
    odd = torch.stack([u.detach(), u.detach()], dim=-1)[..., 0]  # rows with a gap after every element
    found, expected = kernels.scan(odd, views, wide_z[..., 20:]).y, kernels.scan(u.detach(), lines, z.detach()).y
    close(found, expected, 1e-6)
    assert backend == "pytorch" or torch.equal(found, expected)  # matrix products of PyTorch round as the strides go


@pytest.mark.skipif(not BUILT, reason="the kernels were not compiled")
def test_results_do_not_depend_on_threads_or_batch():
    u, lines, z = make(5, 70, 80, 16, 4)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = kernels.scan(u, lines, z)
            results.append([*found, *torch.autograd.grad(found.y.sum(), leaves(u, lines, z))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = kernels.scan(u[:, 3:4], [d._replace(dt=d.dt[3:4], B=d.B[3:4], C=d.C[3:4]) for d in lines], z[3:4])
    assert torch.equal(alone.y, results[0][0][3:4]) and torch.equal(alone.dt_mean, results[0][1][3:4])


def test_bf16_is_the_fp32_result_rounded(backend):
    u, lines, z = make(2, 40, 48, 16, 3)
    half_u, half_z = u.detach().bfloat16(), z.detach().bfloat16()
    found = kernels.scan(half_u, lines, half_z)
    exact = kernels.scan(half_u.float(), lines, half_z.float())
    assert found.y.dtype == torch.bfloat16 and found.state.dtype == found.dt_mean.dtype == torch.float32
    assert torch.equal(found.dt_mean, exact.dt_mean)  # no rounding inside
    assert (found.y.float() - exact.y).abs().max() <= exact.y.abs().max() * 2**-8


def test_bf16_gradients(backend):
    u, lines, z = make(2, 20, 32, 8, 3)
    half = [t.detach().bfloat16().requires_grad_() for t in (u, z)]
    wide = [t.detach().float().requires_grad_() for t in half]
    parameters = [lines[0].A, lines[1].dt_weight]
    mine = torch.autograd.grad(kernels.scan(half[0], lines, half[1]).y.float().sum(), [*half, *parameters])
    theirs = torch.autograd.grad(kernels.scan(wide[0], lines, wide[1]).y.sum(), [*wide, *parameters])
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 2**-6)  # bf16 has 8 bits, and the gradient of the projection sums rounded terms


def test_double_precision_runs_and_is_differentiable():
    u, lines, z = make(1, 5, 3, 2, 1)
    wide = [t.detach().double().requires_grad_() for t in leaves(u, lines, z)]

    def run(u, z, *rest):
        return kernels.scan(u, [Direction(*rest[:7]), Direction(*rest[7:], reverse=True)], z, scale=0.5).y

    assert torch.autograd.gradcheck(run, wide)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**31))
def test_any_shape(length, channels, states, seed):
    u, lines, z = make(1, length, channels, states, 2, seed=seed)
    close(kernels.scan(u, lines, z).y, definition(u, lines, z, None, 1.0)[0][0])


def test_extreme_values_behave_as_in_the_definition(backend):
    u, (line,), _ = make(1, 6, 16, 4, 0, directions=1)
    u, line = u.detach(), Direction(*(t if t is None or isinstance(t, bool) else t.detach().clone() for t in line))
    line.dt[0, 0], line.dt[0, 1], line.dt[0, 2], line.dt[0, 3] = 1e4, -1e4, -200.0, 60.0
    found = kernels.scan(u, [line])
    expected, _ = definition(u, [line], None, None, 1.0)
    assert torch.isfinite(found.y).all()
    close(found.y, expected[0])
    line.dt[0, 4, 3] = float("nan")  # reaches its own channel, from this token on, and nothing else
    y = kernels.scan(u, [line]).y[0]
    assert torch.isnan(y[4:, 3]).all()
    y[4:, 3] = 0
    assert torch.isfinite(y).all()
    line.dt[0, 4, 3] = float("inf")
    assert not torch.isfinite(kernels.scan(u, [line]).y[0, 4, 3])


def test_a_token_without_time_step_changes_no_other(backend):
    """dt = 0 is an identity step: the scan of the rest is the same with and without the token, bit by bit."""
    u, (line,), _ = make(1, 9, 16, 16, 0, directions=1)
    with torch.no_grad():
        dt = torch.nn.functional.softplus(line.dt)
        dt[0, 4] = 0.0
        whole = kernels.selective_scan(u[0], dt, line.A, line.B, line.C, softplus=False)[0]
        rest = [i for i in range(9) if i != 4]
        part = [t[:, rest] for t in (u[0], dt)] + [line.A] + [t[:, rest] for t in (line.B, line.C)]
        assert torch.equal(kernels.selective_scan(*part, softplus=False)[0], whole[:, rest])


# ------------------------------------------------------------------------------------------------------- golden data

CASES = ("groups4", "large_delta", "len1", "n1", "n16", "n8", "no_z", "plain")


@pytest.mark.parametrize("case", CASES)
def test_golden_selective_scan(backend, golden, case):
    file = golden("selective_scan")
    x = file.part(f"{case}.")

    def rows(name):
        if name not in x:
            return None
        return x[name].transpose(1, 2) if x[name].dim() == 3 else x[name].permute(0, 3, 1, 2)

    y, _, state = kernels.selective_scan(
        *(rows("u"), rows("delta"), x["A"], rows("B"), rows("C"), x.get("D"), rows("z"), x.get("delta_bias")),
        softplus=file.config[case]["delta_softplus"],
    )
    allowed = 4 * file.checks["max_abs_float32_minus_float64"][case]
    for actual, expected in ((y.transpose(1, 2), x["out"]), (state, x["last_state"])):
        error, largest = (actual - expected).abs().max(), expected.abs().max()
        assert error <= max(allowed, 1e-5 * largest), f"{error:.2e}"


@pytest.mark.parametrize("case", ["bidir_n1", "bidir_n8", "bidir_n16"])
def test_golden_both_directions(backend, golden, case):
    x = golden("selective_scan").part(f"{case}.")
    lines = [
        Direction(
            *(x[f"{d}.delta"].transpose(1, 2), x[f"{d}.A"], x[f"{d}.B"].transpose(1, 2), x[f"{d}.C"].transpose(1, 2)),
            *(x[f"{d}.D"], x[f"{d}.delta_bias"]),
            reverse=d == "b",
        )
        for d in "fb"
    ]
    u = torch.stack([x[f"{d}.u"].transpose(1, 2) for d in "fb"])
    y = kernels.scan(u, lines, x["f.z"].transpose(1, 2)).y.transpose(1, 2)
    assert (y - x["out"]).abs().max() <= 1e-5 * x["out"].abs().max()


@pytest.mark.parametrize("case", ["l1_w4", "l3_w4", "l37_w2", "l37_w3", "l37_w4"])
def test_golden_convolution(backend, golden, case):
    x = golden("norm_and_conv").part(f"conv_{case}.")
    y = kernels.causal_conv1d(x["x"].transpose(1, 2), [x["weight"]], [x["bias"]])[0].transpose(1, 2)
    assert (y - x["out"]).abs().max() <= 1e-5 * x["out"].abs().max()


@pytest.mark.parametrize("case", ["rms", "rms_first"])
def test_golden_norm(backend, golden, case):
    x = golden("norm_and_conv").part(f"{case}.")
    stream = x["x"] + x.get("residual", 0)
    assert torch.equal(stream, x["residual_out"])
    assert (kernels.rms_norm(stream, x["weight"]) - x["out"]).abs().max() <= 1e-5 * x["out"].abs().max()


# --------------------------------------------------------------------------------------------- convolution and norm


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 30])
@pytest.mark.parametrize("silu", [True, False])
def test_convolution_and_its_gradients(backend, taps, length, silu):
    generator = torch.Generator().manual_seed(taps)
    x = torch.randn(2, length, 50, generator=generator)[..., 9:42].requires_grad_()
    weight = [torch.randn(33, taps, generator=generator).requires_grad_() for _ in range(2)]
    bias = [torch.randn(33, generator=generator).requires_grad_() for _ in range(2)]
    y = kernels.causal_conv1d(x, weight, bias, (False, True), silu)
    wide = [t.detach().double().requires_grad_() for t in (x, *weight, *bias)]
    flip = torch.flip
    rows = torch.nn.functional.pad(wide[0].transpose(1, 2), (taps - 1, 0))
    back = torch.nn.functional.pad(flip(wide[0], [1]).transpose(1, 2), (taps - 1, 0))
    sums = [
        torch.nn.functional.conv1d(r, w[:, None], b, groups=33).transpose(1, 2)
        for r, w, b in zip((rows, back), wide[1:3], wide[3:], strict=True)
    ]
    expected = torch.stack([sums[0], flip(sums[1], [1])])
    expected = torch.nn.functional.silu(expected) if silu else expected
    close(y, expected)
    grad = torch.randn(y.shape, generator=generator)
    mine = torch.autograd.grad(y, [x, *weight, *bias], grad)
    for a, b in zip(mine, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        close(a, b)


@pytest.mark.parametrize("width", [5, 16, 33, 384])
def test_norm_and_its_gradients(backend, width):
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = (1 + 0.1 * torch.arange(width)).requires_grad_()
    y = kernels.rms_norm(x, weight)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-5).sqrt() * wide[1]
    close(y, expected)
    grad = torch.randn(y.shape)
    for a, b in zip(
        torch.autograd.grad(y, [x, weight], grad), torch.autograd.grad(expected, wide, grad.double()), strict=True
    ):
        close(a, b)
    assert kernels.rms_norm(x, weight, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (4, 65, 40), (0, 3, 4)])
def test_products_and_their_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape[:1], shape[1], generator=generator).requires_grad_()
    weight = torch.randn(shape[2], shape[1], generator=generator).requires_grad_()
    y = kernels.linear(x, weight)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = wide[0] @ wide[1].T
    assert y.shape == expected.shape
    if not y.numel():
        return
    close(y, expected)
    grad = torch.randn(y.shape, generator=generator)
    for a, b in zip(
        torch.autograd.grad(y, [x, weight], grad), torch.autograd.grad(expected, wide, grad.double()), strict=True
    ):
        close(a, b)
    with torch.no_grad():
        assert torch.equal(kernels.linear(x, weight), y)
        close(kernels.linear(x.transpose(0, 1), weight).transpose(0, 1), expected)
    assert kernels.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(x, weight).dtype == torch.bfloat16


# ------------------------------------------------------------------------------------- operators of PyTorch, mistakes


@pytest.mark.parametrize("shape", [(2, 7, 40, 21), (1, 1, 1, 1), (3, 65, 96, 44), (2, 600, 33, 5), (0, 3, 4, 4)])
def test_projections_of_all_directions(backend, shape):
    batch, length, inputs, outputs = shape
    x, weights = torch.randn(2, batch, length, inputs), [torch.randn(outputs, inputs) for _ in range(2)]
    found = kernels.project(x, weights)
    assert len(found) == 2
    for one, weight, y in zip(x, weights, found, strict=True):
        torch.testing.assert_close(y, (one.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-4)
    half = kernels.project(x.bfloat16(), [weight.bfloat16() for weight in weights])
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0], found[0], rtol=0.05, atol=0.05 * inputs**0.5)


def test_projections_have_gradients():
    x, weights = torch.randn(2, 1, 5, 8, requires_grad=True), [torch.randn(3, 8, requires_grad=True) for _ in range(2)]
    torch.stack(kernels.project(x, weights)).sum().backward()
    for s in range(2):
        torch.testing.assert_close(x.grad[s], weights[s].sum(0).expand(1, 5, 8))
        torch.testing.assert_close(weights[s].grad, x[s, 0].sum(0).expand(3, 8))


def test_the_logarithm_of_a_in_its_place(backend):
    u, lines, z = make(2, 9, 20, 16, 4)
    logs = [line._replace(A=torch.log(-line.A)) for line in lines]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, found = kernels.scan(u, lines, z), kernels.scan(u, logs, z, log_A=True)
        torch.testing.assert_close(found.y, expected.y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.state, expected.state, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not BUILT, reason="the kernels were not compiled")
def test_where_the_dispatcher_may_be_passed():
    x, weight = torch.randn(3, 8), torch.nn.Parameter(torch.ones(8))
    assert not cpu.direct(x, weight)  # a gradient is wanted
    with torch.no_grad():
        assert cpu.direct(x, weight)
        assert not cpu.direct(x.as_subclass(type("Foreign", (torch.Tensor,), {})))
        with torch.autograd.forward_ad.dual_level():
            assert not cpu.direct(x)
        with FlopCounterMode(display=False):
            assert not cpu.direct(x)
        seen = []
        torch.func.vmap(lambda row: (seen.append(cpu.direct(row)), row)[1])(x)
        assert seen == [False]
        # both ways give the same bits
        torch.testing.assert_close(
            kernels.rms_norm(x, weight), torch.ops.mambatrim.rms_norm(x, weight, 1e-5, x.dtype), rtol=0, atol=0
        )


def scan_arguments(requires_grad=True):
    u, lines, z = make(2, 7, 16, 4, 2)
    if not requires_grad:
        u, z = u.detach(), z.detach()
        lines = [Direction(*(t.detach() if isinstance(t, torch.Tensor) else t for t in d)) for d in lines]
    lists = [[getattr(d, name) for d in lines] for name in ("dt", "A", "B", "C", "D", "dt_bias", "dt_weight")]
    return (u, *lists, z, torch.rand(2, 7), [False, True], True, 0.5)


def test_opcheck():
    torch.library.opcheck(torch.ops.mambatrim.selective_scan, scan_arguments())
    torch.library.opcheck(torch.ops.mambatrim.selective_scan, scan_arguments(requires_grad=False))
    weight = [torch.randn(16, 4, requires_grad=True) for _ in range(2)]
    bias = [torch.randn(16, requires_grad=True) for _ in range(2)]
    x = torch.randn(2, 7, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.mambatrim.causal_conv1d, (x, weight, bias, [False, True], True))
    product = (x, torch.randn(5, 16, requires_grad=True))
    for bias in ((), (torch.randn(5, requires_grad=True),)):
        torch.library.opcheck(torch.ops.mambatrim.linear, (*product, *bias))
    torch.library.opcheck(torch.ops.mambatrim.rms_norm, (x, torch.ones(16, requires_grad=True), 1e-5, torch.float32))


def test_flop_formula():
    with FlopCounterMode(display=False) as counter:
        torch.ops.mambatrim.selective_scan(*scan_arguments(requires_grad=False))
    # two directions, two images, two for a multiply-add: R E L + 9 E N L + 2 E L
    assert counter.get_total_flops() == 2 * 2 * 2 * (2 * 16 * 7 + 9 * 16 * 4 * 7 + 2 * 16 * 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"B": torch.ones(2, 7, 5)}, "B must have shape"),
        ({"dt": torch.ones(2, 6, 2)}, "dt must have shape"),
        ({"A": torch.ones(15, 4)}, "A must have shape"),
        ({"D": None}, "D must be given for all directions"),
        ({"C": torch.ones(2, 7, 4, dtype=torch.int64)}, "C must be of a floating-point dtype"),
        ({"C": torch.ones(2, 7, 4, device="meta")}, "C must be on the device of u"),
    ],
)
def test_mistakes_are_named(change, words):
    u, lines, z = make(2, 7, 16, 4, 2)
    with pytest.raises(ValueError, match=words):
        kernels.scan(u, [lines[0], lines[1]._replace(**change)], z)


def test_more_mistakes():
    u, lines, z = make(2, 7, 16, 4, 2)
    with pytest.raises(ValueError, match="one entry for each of 1 to 4 directions"):
        kernels.scan(u, lines[:1], z)
    with pytest.raises(ValueError, match="z must have shape"):
        kernels.scan(u, lines, z[:, :3])
    with pytest.raises(ValueError, match="1 to 8 taps"):
        kernels.causal_conv1d(z, [torch.ones(16, 9)])
    with pytest.raises(ValueError, match="every weight"):
        kernels.causal_conv1d(z, [torch.ones(15, 4)])
    with pytest.raises(ValueError, match="weight must have the length"):
        kernels.rms_norm(z, torch.ones(3))


@pytest.mark.skipif(not BUILT, reason="the kernels were not compiled")
def test_an_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        cpu.level("mmx")


def test_empty_batch(backend):
    u, lines, z = make(2, 7, 16, 4, 2)
    empty = [d._replace(dt=d.dt[:0], B=d.B[:0], C=d.C[:0]) for d in lines]
    assert kernels.scan(u[:, :0], empty, z[:0]).y.shape == (0, 7, 16)
    assert kernels.causal_conv1d(z[:0], [torch.ones(16, 4)]).shape == (1, 0, 7, 16)
    assert kernels.rms_norm(z[:0], torch.ones(16)).shape == (0, 7, 16)


@pytest.mark.skipif(not BUILT, reason="the kernels were not compiled")
def test_scratch_memory_is_never_read_before_it_is_written():
    """The allocator fills fresh memory with 0xff (NaN): the results stay the same."""
    script = """
        import torch
        from test_kernels import kernels, leaves, make
        u, lines, z = make(3, 21, 35, 5, 2)
        y = kernels.scan(u, lines, z).y
        grads = torch.autograd.grad(y.sum(), leaves(u, lines, z))
        x = kernels.causal_conv1d(z, [torch.ones(35, 4)], [torch.ones(35)])
        w = torch.ones(35, requires_grad=True)
        n = torch.autograd.grad(kernels.rms_norm(z, w).sum(), [z, w])
        print(*(t.double().sum().item() for t in (y, *grads, x, *n)))
    """
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, **extra, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ({}, {"MALLOC_PERTURB_": "255"}, {"MALLOC_PERTURB_": "1"})
    ]
    assert outputs[0] == outputs[1] == outputs[2] and "nan" not in outputs[0]


def test_what_is_missing_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(cpu, "_load", lambda: (None, "the kernels were not compiled when mambatrim was installed"))
    assert "install a C++ compiler" in cpu.missing() and cpu.missing()[0] == "T"
    assert scan_operator._scan_cpu(*scan_arguments(requires_grad=False))[0].shape == (2, 7, 16)
    with pytest.raises(RuntimeError, match="not compiled"):
        cpu.level()
