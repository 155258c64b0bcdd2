"""The compiled kernels at the edges: threads, strange numbers, and arguments that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

import mambatrim
from mambatrim import kernels
from mambatrim.kernels import clustering, cpu, merging, mixer, reference, steps, virtual
from test_kernels import backend as backend
from test_kernels import close, leaves, make
from test_mixer import make as make_mixer

NEEDS_KERNELS = pytest.mark.skipif(bool(cpu.missing()), reason="the kernels were not compiled")
INF, NAN, TINY = float("inf"), float("nan"), 1e-40  # the last is a denormal of fp32


def everything(seed: int = 0) -> list[Tensor]:
    """Results and gradients of all three kernels on inputs of their own."""
    u, lines, z = make(3, 41, 70, 16, 4, seed=seed)
    found = kernels.scan(u, lines, z)
    results = [*found, *torch.autograd.grad(found.y.sum(), leaves(u, lines, z))]
    x, taps = u[0].detach().requires_grad_(), torch.full((70, 4), 0.3, requires_grad=True)
    convolved = kernels.causal_conv1d(x, [taps, taps], reverse=(False, True))
    weight = torch.linspace(0.5, 2, 70, requires_grad=True)
    normed = kernels.rms_norm(x, weight)
    for y, inputs in ((convolved, (x, taps)), (normed, (x, weight))):
        results += [y, *torch.autograd.grad(y.square().sum(), inputs)]
    return [t.detach() for t in results] + step(seed)


def sequence(batch: int, rows: int) -> kernels.Virtual:
    """Every row stands at four positions, in two runs."""
    source = torch.arange(4 * rows).div(2, rounding_mode="floor").remainder(rows).repeat(batch, 1)
    return kernels.Virtual(source, torch.full((batch, rows), 0.25))


@torch.no_grad()
def step(seed: int) -> list[Tensor]:
    """Results of the kernels between and behind reductions."""
    u, lines, z = make(3, 41, 70, 16, 4, seed=seed)
    over, x, order = sequence(3, 41), u[0], torch.arange(41).repeat(3, 1)
    even, odd = order[:, ::2], order[:, 1::2]
    nearest, similarity = merging.nearest(x, even, odd)
    plan = merging.links(even, nearest, 41)
    merged = merging.merge(x, similarity.new_ones(3, 41), similarity.new_ones(3, 41), plan, (order, order))
    clusters = kernels.agglomerate(x, torch.ones(3, 41), order[:, :, None] * 0.02, 19)
    convolved = kernels.causal_conv1d(x, [torch.full((70, 4), 0.3)], virtual=over)
    before = steps.Before(x.contiguous(), torch.ones(3, 41), order, order, (20,))
    ranked = steps.ranked_step(before, x.abs().mean(2)[:, None], 9, 9)
    clustered = steps.clustered_step(before, 9, 1, 0.1, 0.1, (5, 8))
    mixed = kernels.mix(x, [make_mixer(70, 96), make_mixer(70, 96, seed=seed)], kernels.Over(None, over, over))
    results = [*kernels.scan(u, lines, z, virtual=over), convolved, nearest, similarity, *plan, *merged[:2], *clusters]
    return [*results, *ranked, *clustered, *mixed]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def threads():
    """Sets the threads of PyTorch, and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@NEEDS_KERNELS
def test_results_are_the_same_on_any_number_of_threads(threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(everything())
    assert same(results[0], results[1]) and same(results[0], results[2])


@NEEDS_KERNELS
@pytest.mark.parametrize("each", [1, 2])
def test_several_python_threads_at_once_get_what_each_gets_alone(threads, each):
    threads(each)
    alone = [everything(seed) for seed in range(4)]
    start = Barrier(4)

    def run(seed: int) -> list[list[Tensor]]:
        start.wait()
        return [everything(seed) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone, pool.map(run, range(4)), strict=True):
            assert all(same(expected, again) for again in found)


@NEEDS_KERNELS
def test_several_python_threads_share_one_model(threads):
    threads(2)
    model = mambatrim.reduce(mambatrim.create_model("vim_cifar10"), flops_reduction=0.4)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [model(image[None]) for image in images]

        @torch.no_grad()
        def run(index: int) -> Tensor:
            return model(images[index][None])

        with ThreadPoolExecutor(4) as pool:
            assert same(alone, list(pool.map(run, range(4))))


OUT_OF_MEMORY = """
import resource, torch
from mambatrim import kernels
from mambatrim.kernels import cpu

torch.set_num_threads(2)

def run(length):
    x = torch.ones(2, length, 1)
    kernels.selective_scan(x, x, -torch.ones(1, 1), x, x)

run(1000)  # all threads are there
length, vector = 1_000_000, {"generic": 16, "avx2": 32}.get(cpu.level(), 64)
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 4 * length * vector + 32_000_000  # each thread takes 3 length vector
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    run(length)
except MemoryError as error:
    print(error)
"""


@NEEDS_KERNELS
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the address sanitizer needs all addresses")
def test_memory_that_one_thread_does_not_get_is_an_error():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert "not enough memory for the temporaries of scan_forward" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------ strange numbers


def arguments(batch: int = 1, length: int = 9, channels: int = 20, states: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "u": normal(batch, length, channels),
        "dt": normal(batch, length, channels),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": normal(channels),
    }


def agree(actual: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """The same NaN, the same infinities, and otherwise the same numbers to rounding of the largest."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    assert torch.equal(actual[actual.isinf()].sign(), expected[expected.isinf()].sign())
    finite = expected.isfinite()
    if finite.any():
        close(actual[finite], expected[finite], tolerance)


STRANGE = {
    "denormal inputs": {"u": TINY},
    "denormal step sizes": {"dt": -90.0},
    "denormal B": {"B": TINY},
    "huge step sizes": {"dt": 1e30},
    "no step at all": {"dt": -1e30},
    "an infinite input": {"u": INF},
    "an infinite C": {"C": -INF},
    "a closed gate": {"z": -1e4},
    "a wide open gate": {"z": 1e4},
    "NaN in u": {"u": NAN},
    "NaN in dt": {"dt": NAN},
    "NaN in B": {"B": NAN},
    "NaN in z": {"z": NAN},
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_treats_strange_numbers_as_the_definition_does(backend, case, reverse):
    args = arguments()
    ((name, value),) = STRANGE[case].items()
    args[name][0, 4, 1] = value
    found = kernels.selective_scan(**args, reverse=reverse)
    expected = reference.selective_scan(**args, reverse=reverse)
    for actual, wanted in zip(found, expected, strict=True):
        agree(actual, wanted, 1e-5)


def test_denormal_results_are_not_lost(backend):
    """The state decays into the denormal range and is still what the definition says, to a unit of that range."""
    args = arguments(length=40)
    args |= {"dt": torch.full((1, 40, 20), 2.5), "z": torch.ones(1, 40, 20), "D": torch.zeros(20)}
    args["dt_bias"] = torch.zeros(20)
    args["A"] = torch.full((20, 4), -0.9)
    args["u"][:, 1:] = 0
    found, expected = kernels.selective_scan(**args)[2], reference.selective_scan(**args)[2]
    assert 0 < expected.abs().max() < 2.0**-126
    assert (found - expected).abs().max() <= 2.0**-149 * 64


@pytest.mark.parametrize("value", [TINY, INF, -INF, NAN, 1e30, -1e30])
def test_convolution_treats_strange_numbers_as_the_definition_does(backend, value):
    x, weight = arguments()["u"], arguments()["D"][:, None].expand(20, 4).contiguous()
    x[0, 4, 1] = value
    for reverse in (False, True):
        for silu in (False, True):
            found = kernels.causal_conv1d(x, [weight], reverse=(reverse,), silu=silu)[0]
            agree(found, reference.causal_conv1d(x, weight, None, reverse, silu), 1e-5)


@pytest.mark.parametrize("value", [TINY, INF, NAN, 1e18])
def test_norm_treats_strange_numbers_as_the_definition_does(backend, value):
    x, weight = arguments()["u"], arguments()["D"]
    x[0, 4, 1] = value
    agree(kernels.rms_norm(x, weight), reference.rms_norm(x, weight, 1e-5))
    zeros = torch.zeros(2, 20)
    assert torch.equal(kernels.rms_norm(zeros, weight), zeros)


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize("reverse", [False, True])
def test_virtual_scan_treats_strange_numbers_as_the_definition_does(backend, case, reverse):
    args, over = arguments(), sequence(1, 9)
    ((name, value),) = STRANGE[case].items()
    args[name][0, 4, 1] = value
    lists = [[args[key]] for key in ("dt", "A", "B", "C", "D", "dt_bias")]
    operands = (args["u"][None], *lists, [], args["z"], None, [reverse], True, 1.0, *over)
    found, expected = torch.ops.mambatrim.virtual_scan(*operands), virtual._scan_pytorch(*operands)
    for actual, wanted in zip(found, expected, strict=True):
        agree(actual, wanted, 1e-5)


@pytest.mark.parametrize("value", [TINY, INF, -INF, NAN, 1e30, -1e30])
def test_virtual_convolution_treats_strange_numbers_as_the_definition_does(backend, value):
    x, weight, over = arguments()["u"], arguments()["D"][:, None].expand(20, 4).contiguous(), sequence(1, 9)
    x[0, 4, 1] = value
    for reverse in (False, True):
        found = kernels.causal_conv1d(x, [weight], reverse=(reverse,), virtual=over)
        agree(found, virtual._conv_pytorch(x, [weight], [], [reverse], True, *over), 1e-5)


@NEEDS_KERNELS
@pytest.mark.parametrize("value", [TINY, INF, -INF, NAN, 1e30])
def test_matching_treats_strange_numbers_as_the_definition_does(backend, value):
    x, order = arguments(batch=2, length=40)["u"], torch.arange(40).repeat(2, 1)
    x[0, 4, 1] = x[1, 7, 3] = value
    found, wanted = (run(x, order[:, ::2], order[:, 1::2]) for run in (merging.nearest, merging._nearest_pytorch))
    assert torch.equal(found[0], wanted[0])
    agree(found[1], wanted[1])


@NEEDS_KERNELS
@pytest.mark.parametrize("value", [TINY, INF, NAN, 1e30])
def test_clustering_treats_strange_numbers_as_the_definition_does(backend, value):
    x, place = arguments(length=40)["u"], torch.linspace(0, 1, 40)[None, :, None]
    x[0, 4, 1] = value
    for given in (x, x.new_zeros(x.shape)):
        for r in (0, 13, 30):
            found, wanted = (
                run(given, x.new_ones(1, 40), place, r, 1.0) for run in (kernels.agglomerate, clustering._pytorch)
            )
            assert same(list(found), list(wanted))


def test_strange_numbers_in_bf16_stay_what_they_are(backend):
    args = {name: t.bfloat16() if name in ("u", "z") else t for name, t in arguments().items()}
    args["u"][0, 2, 1], args["u"][0, 2, 2], args["u"][0, 2, 3] = INF, NAN, 3e38
    found, expected = kernels.selective_scan(**args)[0], reference.selective_scan(**args)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


# ------------------------------------------------------------------------------------------- arguments that do not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u": torch.ones(1, 9, 20, dtype=torch.int64)}, "u must be of a floating-point dtype"),
        ({"A": torch.ones(20, 4, dtype=torch.int64)}, "A must be of a floating-point dtype"),
        ({"A": torch.ones(19, 4)}, "A must have shape"),
        ({"A": torch.ones(20, 0), "B": torch.ones(1, 9, 0), "C": torch.ones(1, 9, 0)}, "1 to 256 states"),
        ({"A": torch.ones(20, 257), "B": torch.ones(1, 9, 257), "C": torch.ones(1, 9, 257)}, "1 to 256 states"),
        ({"B": torch.ones(1, 8, 4)}, "B must have shape"),
        ({"C": torch.ones(2, 9, 4)}, "C must have shape"),
        ({"dt": torch.ones(1, 9, 21)}, "dt must have shape"),
        ({"D": torch.ones(1, 20)}, "D must have shape"),
        ({"z": torch.ones(9, 20)}, "z must have shape"),
        ({"z": torch.ones(1, 9, 20, device="meta")}, "z must be on the device of u"),
        ({"dt_bias": torch.ones(20, device="meta")}, "dt_bias must be on the device of u"),
        ({"repeats": torch.ones(9)}, "repeats must have shape"),
        ({"dt_weight": torch.ones(20, 3)}, "dt must have shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_scan_says_what_does_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        kernels.selective_scan(**(arguments() | change))


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.ones(9, 20), torch.ones(20, 4), "x must be"),
        (torch.ones(1, 9, 20), torch.ones(19, 4), "every weight"),
        (torch.ones(1, 9, 20), torch.ones(20, 9), "1 to 8 taps"),
        (torch.ones(1, 9, 20), torch.ones(20, 0), "1 to 8 taps"),
    ],
)
def test_convolution_says_what_does_not_fit(x, weight, words):
    with pytest.raises(ValueError, match=words):
        kernels.causal_conv1d(x, [weight])


def test_norm_says_what_does_not_fit():
    with pytest.raises(ValueError, match="weight must have the length"):
        kernels.rms_norm(torch.ones(3, 20), torch.ones(19))


@NEEDS_KERNELS
def test_any_strides_give_the_same_result():
    """Views that no kernel can walk are copied: transposed, stepped, expanded, or laid out as images."""
    args = arguments(batch=2)
    expected = kernels.selective_scan(**args)[0]
    for name in ("u", "dt", "B", "C", "z"):
        x = args[name]
        wide = torch.full((*x.shape, 2), NAN)
        wide[..., 0] = x
        for view in (x.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 0]):
            assert not view.is_contiguous()
            assert torch.equal(kernels.selective_scan(**(args | {name: view}))[0], expected), name
    same_rows = args | {"B": args["B"][:, :1].expand(2, 9, 4), "u": args["u"][:1].expand(2, 9, 20)}
    copies = {name: x.contiguous() for name, x in same_rows.items()}
    assert torch.equal(kernels.selective_scan(**same_rows)[0], kernels.selective_scan(**copies)[0])


@pytest.mark.parametrize("shape", [(0, 9, 20), (2, 0, 20), (2, 9, 0)])
def test_nothing_gives_nothing(backend, shape):
    batch, length, channels = shape
    args = arguments(batch, length, channels)
    y, mean, state = kernels.selective_scan(**args)
    assert y.shape == shape and mean.shape == shape[:2] and state.shape == (batch, channels, 4)
    weight = torch.ones(channels, 4)
    assert kernels.causal_conv1d(torch.ones(shape), [weight]).shape == (1, *shape)
    assert kernels.rms_norm(torch.ones(shape), torch.ones(channels)).shape == shape


# ---------------------------------------------------------------------------------------------------------------- bf16


def test_a_bf16_model_keeps_stream_and_state_in_fp32(monkeypatch):
    """What the kernels are given and give back in every block of a model of bf16 matrix products."""
    model = mambatrim.create_model("vim_cifar10", dtype=torch.bfloat16)
    assert {model.head.weight.dtype, model.layers[0].mixer.in_proj.weight.dtype} == {torch.bfloat16}
    seen = []

    def watched(u, directions, *rest, **options):
        found = scan(u, directions, *rest, **options)
        seen.append((u.dtype, found.y.dtype, found.state.dtype, found.dt_mean.dtype))
        assert all(d.A.dtype == d.D.dtype == d.dt_bias.dtype == torch.float32 for d in directions)
        return found

    scan = kernels.scan
    monkeypatch.setattr(mixer, "scan", watched)
    monkeypatch.setattr(mixer, "_takes", lambda *_: False)  # one kernel would make all of it
    streams = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: streams.append((inputs[0].dtype, output[0].dtype)))
    fast = mambatrim.reduce(model, flops_reduction=0.4)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        assert fast(images).dtype == torch.float32
        assert fast.forward_features(images).x.dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)}
    assert set(streams) == {(torch.float32, torch.float32)} and len(streams) == 2 * model.depth
