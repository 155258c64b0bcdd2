"""The mixer as one kernel against its composition: all instruction sets, layouts, dtypes, and what it must refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import mambatrim
from mambatrim import kernels
from mambatrim.kernels import Mixer, Over, Virtual, cpu, mixer
from mambatrim.kernels.linear import products
from test_kernels import backend as backend
from test_kernels import close

NEEDS_KERNELS = pytest.mark.skipif(bool(cpu.missing()), reason="the kernels were not compiled")


def make(columns=24, channels=40, states=16, rank=3, taps=4, directions=2, dtype=torch.float32, seed=0) -> Mixer:
    """A mixer with random parameters, the projections in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    lines = []
    for _ in range(directions):
        lines += [0.5 * normal(channels, 1, taps), normal(channels)]
        lines += [(normal(rank + 2 * states, channels) / channels**0.5).to(dtype), normal(channels, rank).to(dtype)]
        lines += [normal(channels) - 1, 0.5 * normal(channels, states), normal(channels)]
    weights = [(normal(2 * channels, columns) / columns**0.5).to(dtype), (normal(columns, channels) / 6).to(dtype)]
    return Mixer(1 + 0.1 * normal(columns), *weights, lines, [s % 2 == 1 for s in range(directions)], 1e-5, 0.5)


def stream(batch=2, length=19, columns=24, seed=1):
    return torch.randn(batch, length, columns, generator=torch.Generator().manual_seed(seed))


def exact(x, parameters, over=kernels.AS_IT_STANDS):
    """The definition in double precision."""
    lines = [one.double() for one in parameters.lines]
    wide = Mixer(*(one.double() for one in parameters[:3]), lines, *parameters[4:])
    repeats, *virtual = over
    virtual = [None if one is None else Virtual(one.source, one.share.double()) for one in virtual]
    steps = kernels.compose(x.double(), wide, Over(None if repeats is None else repeats.double(), *virtual))
    return x + steps.update, steps.dt_mean


def positions(batch, rows, steps, seed=2):
    """A virtual sequence of random runs; every row stands somewhere, and some positions are gone."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(rows + 1, (batch, steps - rows), generator=generator)
    source = torch.cat([torch.arange(rows).expand(batch, -1), more], dim=1).sort(dim=1).values.roll(steps // 3, dims=1)
    count = torch.zeros(batch, rows + 1).scatter_add(1, source, torch.ones(batch, steps))[:, :-1]
    return Virtual(source, 1 / count)


@pytest.fixture
def one_kernel(backend, monkeypatch):
    """Fails where the composition runs though the kernels are there."""

    def refuse(*arguments):
        raise AssertionError("the mixer was not made by one kernel")

    if backend != "pytorch":
        monkeypatch.setattr(mixer, "compose", refuse)
        monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    else:
        monkeypatch.setattr(mixer, "_takes", lambda *_: False)
    return backend


SHAPES = [  # batch, length, columns, channels, states, rank, taps, directions
    (2, 19, 24, 40, 16, 3, 4, 2),
    (1, 1, 8, 16, 8, 1, 4, 1),
    (3, 50, 33, 17, 5, 4, 3, 3),
    (1, 5, 192, 384, 16, 12, 4, 2),
    (4, 13, 50, 100, 1, 2, 8, 4),
    (9, 300, 20, 200, 16, 2, 4, 2),  # more than are taken at a time
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_composition(one_kernel, shape):
    batch, length, columns, *rest = shape
    parameters, x = make(columns, *rest), stream(batch, length, columns)
    with torch.no_grad():
        y, dt_mean = kernels.mix(x, [parameters])
    for found, wanted in zip((y, dt_mean), exact(x, parameters), strict=True):
        close(found, wanted, 1e-5)


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("convolved", [True, False])
@pytest.mark.parametrize("scanned", [True, False])
def test_over_a_reduced_sequence(one_kernel, repeated, convolved, scanned):
    parameters, x = make(), stream(3, 17)
    virtual = positions(3, 17, 41)
    repeats = torch.rand(3, 17, generator=torch.Generator().manual_seed(3)) * 3 if repeated else None
    over = Over(repeats, virtual if convolved else None, virtual if scanned else None)
    with torch.no_grad():
        y, dt_mean = kernels.mix(x, [parameters], over)
    for found, wanted in zip((y, dt_mean), exact(x, parameters, over), strict=True):
        close(found, wanted, 1e-5)


@pytest.mark.parametrize("virtual", [True, False])
def test_in_bf16_it_is_as_near_as_the_composition(one_kernel, virtual):
    parameters, x = make(64, 128, rank=4, dtype=torch.bfloat16), stream(2, 33, 64)
    over = Over(None, positions(2, 33, 50), None) if virtual else kernels.AS_IT_STANDS
    wanted, _ = exact(x, parameters, over)
    composed = x + kernels.compose(x, parameters, over).update
    with torch.no_grad():
        y, dt_mean = kernels.mix(x, [parameters], over)
    assert y.dtype == dt_mean.dtype == torch.float32
    error, usual = ((each - wanted).square().mean().sqrt() for each in (y, composed))
    assert 0 < error <= 1.2 * usual


def test_an_image_does_not_depend_on_its_batch(one_kernel):
    if one_kernel == "pytorch":
        pytest.skip("matrix libraries choose by the number of rows")
    parameters, x = make(20, 200), stream(9, 300, 20)
    with torch.no_grad():
        y, dt_mean = kernels.mix(x, [parameters])
        for b in range(9):
            alone = kernels.mix(x[b : b + 1], [parameters])
            assert torch.equal(alone[0], y[b : b + 1]) and torch.equal(alone[1], dt_mean[b : b + 1])


def test_what_is_no_number_stays_in_its_image(one_kernel):
    parameters, x = make(), stream(3)
    with torch.no_grad():
        clean, _ = kernels.mix(x, [parameters])
        x[1, 7, 3] = float("nan")
        y, _ = kernels.mix(x, [parameters])
    assert y[1].isnan().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
def test_nothing_gives_nothing(one_kernel, shape):
    with torch.no_grad():
        y, dt_mean = kernels.mix(torch.ones(shape), [make()])
    assert y.shape == shape and dt_mean.shape == (shape[0], 2, shape[1])


def test_memory_that_is_no_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(cpu, "call", lambda name, record: (_ for _ in ()).throw(MemoryError(name)))
    if cpu.compiled():
        with pytest.raises(MemoryError, match="mixers"), torch.no_grad():
            kernels.mix(stream(), [make()])


# ---------------------------------------------------------------------------------------- what goes to the composition


def test_gradients_flow_through_the_composition():
    parameters, x = make(), stream().requires_grad_()
    y, _ = kernels.mix(x, [parameters])
    (found,) = torch.autograd.grad(y.square().sum(), x)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(wide, parameters)[0].square().sum(), wide)
    close(found, wanted, 1e-5)


@pytest.mark.parametrize("index", range(7))
def test_parameters_that_lie_otherwise_give_the_same(index):
    parameters, x = make(), stream()
    lines = list(parameters.lines)
    spread = torch.stack([lines[index], lines[index]], dim=-1)[..., 0]
    assert spread.dim() == 0 or not spread.is_contiguous()
    lines[index] = spread
    with torch.no_grad():
        for found, wanted in zip(
            kernels.mix(x, [parameters._replace(lines=lines)]), kernels.mix(x, [parameters]), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype):
    parameters, x = make(), stream()
    lines = [one.to(dtype) if k % 7 in (2, 3) else one for k, one in enumerate(parameters.lines)]
    other = parameters._replace(
        in_proj=parameters.in_proj.to(dtype), out_proj=parameters.out_proj.to(dtype), lines=lines
    )
    with torch.no_grad():
        torch.testing.assert_close(
            kernels.mix(x, [other])[0].float(), kernels.mix(x, [parameters])[0], rtol=2e-2, atol=2e-2
        )


def test_autocast_multiplies_in_bf16():
    parameters, x = make(), stream()
    with torch.no_grad():
        plain, _ = kernels.mix(x, [parameters])
        with torch.autocast("cpu", torch.bfloat16):
            cast, _ = kernels.mix(x, [parameters])
    assert not torch.equal(plain, cast)
    torch.testing.assert_close(cast, plain, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"in_proj": torch.ones(80, 23)}, (ValueError, RuntimeError)),
        ({"out_proj": torch.ones(24, 39)}, (ValueError, RuntimeError)),
        ({"norm": torch.ones(23)}, ValueError),
        ({"lines": [*make().lines[:5], torch.ones(41, 16), *make().lines[6:]]}, ValueError),
        ({"lines": [torch.ones(41, 1, 4), *make().lines[1:]]}, ValueError),
        ({"lines": [*make().lines[:5], torch.ones(40), *make().lines[6:]]}, (ValueError, IndexError)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, error):
    with torch.no_grad(), pytest.raises(error):
        kernels.mix(stream(), [make()._replace(**change)])


def test_a_sequence_that_does_not_fit_is_refused():
    for over in (
        Over(torch.ones(2, 18)),
        Over(None, Virtual(torch.zeros(2, 30, dtype=torch.int64), torch.ones(2, 18))),
        Over(None, None, Virtual(torch.zeros(2, 30), torch.ones(2, 19))),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=r"repeats|share|source"):
            kernels.mix(stream(), [make()], over)


# -------------------------------------------------------------------------------------------- the operator, the model


PAIR = [make(), make(seed=5)]


def test_one_after_another(one_kernel):
    x = stream()
    for count in (1, 2, 3, 4):
        run = [PAIR[i % 2] for i in range(count)]
        with torch.no_grad():
            y, dt_mean = kernels.mix(x, run)
            alone = x
            for one in run:
                alone, mean = kernels.mix(alone, [one])
        assert torch.equal(y, alone) and torch.equal(dt_mean, mean)


def test_those_that_are_not_alike_run_too():
    x, other = stream(), make(channels=48, states=8, rank=5, taps=3, seed=5)
    with torch.no_grad():
        y, dt_mean = kernels.mix(x, [make(), other])
        wanted, mean = kernels.mix(kernels.mix(x, [make()])[0], [other])
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(dt_mean, mean)


def test_blocks_that_are_watched_or_changed_are_called():
    model = mambatrim.create_model("vim_cifar10")
    images, seen = torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        wanted = model(images)
        hooks = [
            model.layers[3].register_forward_hook(lambda *_: seen.append("block")),
            model.layers[5].mixer.register_forward_pre_hook(lambda *_: seen.append("mixer")),
        ]
        torch.testing.assert_close(model(images), wanted)
        assert seen == ["block", "mixer"]
        for hook in hooks:
            hook.remove()
        forward = model.layers[4].forward
        model.layers[4].forward = lambda *arguments: (seen.append("own"), forward(*arguments))[1]
        torch.testing.assert_close(model(images), wanted)
        assert seen[2:] == ["own"]


def test_opcheck():
    x, virtual = stream(), positions(2, 19, 30)
    for over in (kernels.AS_IT_STANDS, Over(torch.ones(2, 19)), Over(None, virtual, virtual)):
        torch.library.opcheck(torch.ops.mambatrim.mixers, (x, *mixer._flat(PAIR, over)))


def test_the_operator_counts_what_it_stands_for():
    parameters, x, virtual = make(), stream(), positions(2, 19, 30)
    for over in (kernels.AS_IT_STANDS, Over(torch.ones(2, 19), virtual), Over(None, virtual, virtual)):
        counts = []
        for run in (
            lambda over=over: torch.ops.mambatrim.mixers(x, *mixer._flat([parameters], over)),
            lambda over=over: kernels.compose(x, parameters, over),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                run()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


@NEEDS_KERNELS
def test_a_model_is_made_of_it(monkeypatch):
    calls, call = [], cpu.call
    monkeypatch.setattr(cpu, "call", lambda name, record: (calls.append(name), call(name, record)))
    model = mambatrim.create_model("vim_cifar10")
    images = torch.randn(2, 3, 32, 32)
    for method, step in (("mtr", "ranked_step"), ("vsm", "clustered_step")):
        fast = mambatrim.reduce(model, method=method, flops_reduction=0.4)
        calls.clear()
        with torch.no_grad():
            fast(images)
        # and what is left: the stem, the layout of vsm, the class token, its norm and the classifier
        places = [block for block in fast.reducer.schedule.places if block + 1 < model.depth]
        assert calls.count("mixers") == 1 + len(places) and calls.count(step) == len(places)
        assert set(calls) <= {"embed", "mixers", step, "inverse", "take_rows", "norm_forward", "product"}


@NEEDS_KERNELS
def test_parameters_that_are_made_anew_are_seen():
    """Nothing is remembered of a weight: neither its values nor where it lies."""
    model = mambatrim.create_model("vim_cifar10")
    images, weight = torch.randn(1, 3, 32, 32), model.layers[0].mixer.in_proj.weight
    with torch.no_grad():
        before = model(images)
        weight.data.mul_(1.5)
        scaled = model(images)
        model.layers[0].mixer.in_proj.weight = torch.nn.Parameter(weight / 1.5)
        torch.testing.assert_close(model(images), before)
    assert not torch.allclose(scaled, before)


def test_a_parametrized_weight_is_used():
    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = mambatrim.create_model("vim_cifar10")
    images, part = torch.randn(1, 3, 32, 32), model.layers[0].mixer.out_proj
    with torch.no_grad():
        before = model(images)
        part.weight.data /= 2
        torch.nn.utils.parametrize.register_parametrization(part, "weight", Twice())
        torch.testing.assert_close(model(images), before)


# ------------------------------------------------------------------------------------------------------- the products


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 120),
    directions=st.integers(1, 4),
    half=st.booleans(),
    level=st.sampled_from(cpu.LEVELS),
)
def test_products(rows, inputs, outputs, directions, half, level):
    if cpu.missing() or cpu.LEVELS.index(level) > cpu.LEVELS.index(cpu.level()):
        return
    dtype, inputs = (torch.bfloat16, 2 * inputs) if half else (torch.float32, inputs)
    x = torch.randn(directions, 1, rows, inputs).to(dtype)
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(directions)]
    best = cpu.level()
    cpu.level(level)
    try:
        found = products(x, weights)
    finally:
        cpu.level(best)
    for one, weight, y in zip(x, weights, found, strict=True):
        torch.testing.assert_close(y, (one.double() @ weight.double().T).float(), rtol=1e-5, atol=1e-4)


def test_equal_rows_have_equal_products(backend):
    row, weight = torch.randn(1, 1, 1, 90), torch.randn(130, 90)
    (y,) = kernels.project(row.expand(1, 3, 37, 90), [weight])
    assert torch.equal(y, y[:1, :1].expand_as(y))
