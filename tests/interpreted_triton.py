"""The Triton kernels in Triton's interpreter, on CPU tensors, against the definition in double precision.

test_triton.py runs this file in a process of its own with TRITON_INTERPRET=1: Triton reads that when it is first
imported, and it would reach everything else that uses Triton in the same process.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import silu

from test_kernels import close, make
from test_virtual import groups, scan_arguments

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 before Python starts", allow_module_level=True)

from mambatrim.kernels import reference, triton_rows, triton_scan, triton_virtual, virtual
from mambatrim.reduction import POLICIES, Assignment, Tokens

NAMES = ("dt", "A", "B", "C", "D", "dt_bias", "dt_weight")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fills the results of torch.empty with NaN, and makes several chunks, tiles and programs out of small shapes."""
    monkeypatch.setattr(triton_scan, "CHUNK", 3)
    monkeypatch.setattr(triton_rows, "TOKENS", 4)
    monkeypatch.setattr(triton_rows, "PROGRAMS", 3)
    monkeypatch.setattr(triton_virtual, "ROWS", 4)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(x, dtype):
    """fp32 as the interpreter stores it: it cuts bf16 off where a GPU rounds to nearest, and rounds fp16."""
    if dtype == torch.bfloat16:
        return (x.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return x.to(dtype).float()


def wide(x):
    return None if x is None else x.detach().double().requires_grad_()


# batch, length, channels, states, rank, which directions are reversed, gate, D, bias, repeats
CASES = [
    (2, 7, 35, 3, 2, (False, True), True, True, True, True),
    (1, 1, 66, 16, 3, (True, False), True, True, True, False),
    (1, 5, 20, 1, 0, (True,), False, False, False, False),
    (3, 4, 9, 8, 1, (False,), True, False, True, True),
    (1, 3, 40, 20, 0, (True, True), False, True, False, True),
]


def arguments(case):
    """Arguments of the operator, and the same in double precision with the raw step size in place of dt."""
    batch, length, channels, states, rank, reverse, gated, skip, bias, repeated = case
    u, lines, z = make(batch, length, channels, states, rank, len(reverse))
    absent = {name for name, given in (("D", skip), ("dt_bias", bias), ("dt_weight", rank)) if not given}
    lists = [[] if name in absent else [getattr(d, name).detach() for d in lines] for name in NAMES]
    repeats = 2 * torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) if repeated else None
    return (u.detach(), *lists, z.detach() if gated else None, repeats, list(reverse), True, 0.5)


def definition(u, dt, A, B, C, D, bias, weight, z, repeats, reverse, softplus, scale):
    """y, dt_mean and state, and the leaves in the order of the gradients."""
    raw = [wide(x.double() @ w.double().T) for x, w in zip(dt, weight, strict=True)] if weight else list(map(wide, dt))
    u, z, (A, B, C, D, bias) = wide(u), wide(z), [list(map(wide, items)) for items in (A, B, C, D, bias)]
    outputs = [
        reference.selective_scan(
            *(u[s], raw[s], A[s], B[s], C[s], D[s] if D else None, None, bias[s] if bias else None, None),
            *(None if repeats is None else repeats.double(), softplus, reverse[s]),
        )
        for s in range(u.shape[0])
    ]
    y = sum(out[0] for out in outputs) * scale
    y = y if z is None else y * silu(z)
    results = y, torch.stack([out[1] for out in outputs], 1), torch.stack([out[2] for out in outputs])
    return results, [[u], raw, B, C, A, D, bias, [] if z is None else [z]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_and_all_its_gradients(case):
    given = arguments(case)
    expected, groups = definition(*given)
    for mine, wanted in zip(triton_scan.scan_forward(*given), expected, strict=True):
        close(mine, wanted.detach())
    grad = normal(*expected[0].shape, seed=2)
    flat = [leaf for group in groups for leaf in group]
    found = iter(torch.autograd.grad(expected[0], flat, grad.double()))
    for place, (mine, group) in enumerate(zip(triton_scan.scan_backward(grad, *given), groups, strict=True)):
        wanted = [next(found) for _ in group]
        if wanted:
            close(mine, wanted[0] if place in (0, 7) else torch.stack(wanted), 1e-5)
        elif place == 7:
            assert mine.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_fp32_result_stored(dtype):
    u, *lists, z, repeats, reverse, softplus, scale = arguments((1, 4, 33, 4, 2, (False, True), *[True] * 4))
    u, z = u.to(dtype), z.to(dtype)
    rest = (repeats, reverse, softplus, scale)
    half = triton_scan.scan_forward(u, *lists, z, *rest)
    exact = triton_scan.scan_forward(u.float(), *lists, z.float(), *rest)
    assert half[0].dtype == dtype and torch.equal(half[1], exact[1]) and torch.equal(half[2], exact[2])
    close(half[0], stored(exact[0], dtype))
    grad = normal(*half[0].shape).to(dtype)
    found = triton_scan.scan_backward(grad, u, *lists, z, *rest)
    wanted = triton_scan.scan_backward(grad.float(), u.float(), *lists, z.float(), *rest)
    for place, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert mine.dtype == (dtype if place in (0, 1, 7) else torch.float32)
        close(mine, stored(theirs, mine.dtype))


def test_scan_without_softplus_and_with_strided_rows():
    u, dt, A, B, C, D, bias, weight, z, repeats, reverse, _, scale = arguments((2, 4, 9, 4, 0, (True,), *[True] * 4))
    dt = [x.abs() for x in dt]
    packed = torch.cat([dt[0], B[0], C[0], z], -1).split([9, 4, 4, 9], -1)
    found = triton_scan.scan_forward(
        u, [packed[0]], A, [packed[1]], [packed[2]], D, bias, weight, packed[3], repeats, reverse, False, scale
    )
    expected, _ = definition(u, dt, A, B, C, D, bias, weight, z, repeats, reverse, False, scale)
    for mine, wanted in zip(found, expected, strict=True):
        close(mine, wanted.detach())


@pytest.mark.parametrize(
    ("taps", "length", "biased", "smooth", "reverse"),
    [
        (4, 9, True, True, [False, True]),
        (4, 1, True, True, [True]),
        (1, 5, False, True, [False, True]),
        (3, 6, False, False, [True, False, True]),
        (8, 5, True, True, [True]),
    ],
)
def test_convolution_and_its_gradients(taps, length, biased, smooth, reverse):
    x = normal(2, length, 80)[..., 5:72]
    weight = [normal(67, taps, seed=1 + s) for s in range(len(reverse))]
    bias = [normal(67, seed=5 + s) for s in range(len(reverse))] if biased else []
    exact = [list(map(wide, items)) for items in ([x], weight, bias)]
    expected = torch.stack(
        [
            reference.causal_conv1d(exact[0][0], exact[1][s], exact[2][s] if bias else None, turned, smooth)
            for s, turned in enumerate(reverse)
        ]
    )
    close(triton_rows.conv_forward(x, weight, bias, reverse, smooth), expected.detach())
    grad = normal(*expected.shape, seed=9)
    found = triton_rows.conv_backward(grad, x, weight, bias, reverse, smooth)
    flat = [leaf for items in exact for leaf in items]
    wanted = iter(torch.autograd.grad(expected, flat, grad.double()))
    close(found[0], next(wanted))
    for mine, items in zip(found[1:], exact[1:], strict=True):
        if items:
            close(mine, torch.stack([next(wanted) for _ in items]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 33])
def test_norm_and_its_gradients(dtype, width):
    x, weight = normal(2, 4, width), 1 + normal(width, seed=1)
    exact = wide(x), wide(weight)
    expected, y = reference.rms_norm(*exact, 1e-5), triton_rows.norm_forward(x, weight, 1e-5, torch.float32)
    close(y, expected.detach())
    half = triton_rows.norm_forward(x, weight, 1e-5, dtype)
    assert half.dtype == dtype and torch.equal(half.float(), stored(y, dtype))
    grad = normal(2, 4, width, seed=2).to(dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    # a row of one element hardly changes with it: what is left of its gradient is the difference of two equal terms
    for mine, theirs in zip(triton_rows.norm_backward(grad, x, weight, 1e-5), wanted, strict=True):
        assert (mine - theirs).abs().max() <= 3e-6 * max(1.0, theirs.abs().max().item())


def test_nothing_is_launched_for_nothing():
    u, *lists, z, repeats, reverse, softplus, scale = arguments((1, 2, 3, 4, 1, (False,), *[True] * 4))
    empty = (u[:, :0], *lists, z[:0], repeats[:0], reverse, softplus, scale)
    assert triton_scan.scan_forward(*empty)[0].shape == (0, 2, 3)
    gradients = triton_scan.scan_backward(z[:0], *empty)
    assert gradients[4].shape == (1, 3, 4) and not gradients[4].any()
    assert triton_rows.conv_forward(z[:0], [torch.ones(3, 4)], [], [False], True).shape == (1, 0, 2, 3)
    assert not triton_rows.conv_backward(z[None, :0], z[:0], [torch.ones(3, 4)], [], [False], True)[1].any()
    assert triton_rows.norm_forward(z[:0], torch.ones(3), 1e-5, torch.float32).shape == (0, 2, 3)


# ------------------------------------------------------------------------------------------------- virtual sequences


def virtual_case(shape, seed=0, gone=False, dtype=torch.float32):
    """Arguments of the scan, filters and biases of two directions, and the map, in fp32 or with u and z of `dtype`."""
    batch, rows, positions, channels, states, rank = shape
    torch.manual_seed(seed)
    arguments = scan_arguments(batch, rows, channels, states, rank, dtype)
    weight, bias = [torch.randn(channels, 4) for _ in "ab"], [torch.randn(channels) for _ in "ab"]
    return arguments, weight, bias, groups(batch, positions, rows, gone)


VIRTUAL_SHAPES = [(1, 1, 1, 16, 8, 2), (2, 7, 13, 40, 16, 3), (1, 5, 9, 33, 20, 5)]


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("shape", VIRTUAL_SHAPES, ids=str)
def test_virtual_sequence(shape, gone):
    arguments, weight, bias, sequence = virtual_case(shape, gone=gone)
    expected = virtual._scan_pytorch(*arguments, *sequence)
    for mine, wanted in zip(triton_virtual.scan_forward(*arguments, *sequence), expected, strict=True):
        close(mine, wanted, 1e-5)
    x, reverse = arguments[0][0], [False, True]
    mine = triton_virtual.conv_forward(x, weight, bias, reverse, True, *sequence)
    close(mine, virtual._conv_pytorch(x, weight, bias, reverse, True, *sequence))


@pytest.mark.parametrize("reverse", [[True], [True, False]], ids=str)
def test_virtual_sequence_in_every_direction_with_nothing_optional(reverse):
    (u, dt, A, B, C, *_), weight, _, sequence = virtual_case((2, 6, 11, 20, 4, 20))
    many = len(reverse)
    packed = torch.cat([dt[0], B[0], C[0]], -1).split([20, 4, 4], -1)  # rows with strides
    lists = ([packed[0].abs(), dt[1].abs()], A, [packed[1], B[1]], [packed[2], C[1]])
    lists = [items[:many] for items in lists]
    arguments = (u[:many], *lists, [], [], [], None, None, reverse, False, 2.0)
    expected = virtual._scan_pytorch(*arguments, *sequence)
    for mine, wanted in zip(triton_virtual.scan_forward(*arguments, *sequence), expected, strict=True):
        close(mine, wanted, 1e-5)
    x = torch.randn(2, 6, 30)[..., 5:25]
    mine = triton_virtual.conv_forward(x, weight[:many], [], reverse, False, *sequence)
    close(mine, virtual._conv_pytorch(x, weight[:many], [], reverse, False, *sequence))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_virtual_sequence_in_half_precision_is_the_fp32_result_stored(dtype):
    (u, *lists, z, repeats, reverse, softplus, scale), weight, bias, sequence = virtual_case((1, 5, 9, 33, 4, 2))
    u, z, rest = u.to(dtype), z.to(dtype), (repeats, reverse, softplus, scale, *sequence)
    half = triton_virtual.scan_forward(u, *lists, z, *rest)
    exact = triton_virtual.scan_forward(u.float(), *lists, z.float(), *rest)
    assert half[0].dtype == dtype and torch.equal(half[1], exact[1]) and torch.equal(half[2], exact[2])
    close(half[0], stored(exact[0], dtype))
    found, wanted = (
        triton_virtual.conv_forward(x, weight, bias, reverse, True, *sequence) for x in (u[0], u[0].float())
    )
    assert found.dtype == dtype
    close(found, stored(wanted, dtype))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_sequence_policy(policy):
    """What a mixer asks of the kernels: each policy's maps and repeats, or the ordinary kernels where it has none."""
    torch.manual_seed(5)
    rows, positions = 6, 13
    source = groups(2, positions, rows).source
    keep = torch.stack([torch.stack([(image == row).nonzero()[0, 0] for row in range(rows)]) for image in source])
    origin = Assignment(keep, source)
    layout = policy.build(Tokens(torch.randn(2, rows, 4), origin.sum(torch.ones(2, positions)), origin, (positions,)))
    (u, *lists, z, _, reverse, softplus, scale), weight, bias, _ = virtual_case((2, rows, positions, 35, 4, 2))
    given = (u, *lists, z, None if layout is None else layout.repeats, reverse, softplus, scale)
    if layout is None or layout.scanned is None:
        found = triton_scan.scan_forward(*given)
        meant = torch.ops.mambatrim.selective_scan(*given)
    else:
        found = triton_virtual.scan_forward(*given, layout.scanned, layout.share)
        meant = torch.ops.mambatrim.virtual_scan(*given, layout.scanned, layout.share)
    for mine, wanted in zip(found, meant, strict=True):
        close(mine, wanted, 1e-5)
    if layout is not None and layout.convolved is not None:
        mine = triton_virtual.conv_forward(u[0], weight, bias, reverse, True, layout.convolved, layout.share)
        sequence = (layout.convolved, layout.share)
        close(mine, torch.ops.mambatrim.virtual_conv1d(u[0], weight, bias, reverse, True, *sequence))


def test_every_row_in_its_own_place_is_the_ordinary_kernel():
    arguments, weight, bias, _ = virtual_case((2, 7, 7, 40, 16, 3))
    itself = torch.arange(7).repeat(2, 1), torch.ones(2, 7)
    for mine, wanted in zip(
        triton_virtual.scan_forward(*arguments, *itself), triton_scan.scan_forward(*arguments), strict=True
    ):
        close(mine, wanted)
    x, reverse = arguments[0][0], [False, True]
    mine = triton_virtual.conv_forward(x, weight, bias, reverse, True, *itself)
    close(mine, triton_rows.conv_forward(x, weight, bias, reverse, True))


def test_nothing_is_launched_for_no_image():
    (u, *lists, z, repeats, reverse, softplus, scale), weight, bias, sequence = virtual_case((1, 2, 3, 4, 1, 1))
    source, share = sequence.source[:0], sequence.share[:0]
    y, mean, state = triton_virtual.scan_forward(
        u[:, :0], *lists, z[:0], repeats[:0], reverse, softplus, scale, source, share
    )
    assert y.shape == (0, 2, 4) and mean.shape == (0, 2, 2) and state.shape == (2, 0, 4, 1)
    assert triton_virtual.conv_forward(z[:0], weight, bias, reverse, True, source, share).shape == (2, 0, 2, 4)
