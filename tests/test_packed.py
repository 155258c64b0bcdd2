"""Packed models: the kernel on packed mixers, the model around it, the recording of what it does, and the stem."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

import mambatrim
from mambatrim import kernels
from mambatrim.kernels import Over, cpu, embedding, merging, replay
from mambatrim.models.layers import PatchEmbed, cast
from mambatrim.models.mamba_reg import MambaReg, MambaRegConfig
from mambatrim.models.packed import MOST_REPLAYS
from mambatrim.models.videomamba import VideoMamba, VideoMambaConfig
from mambatrim.models.vim import Vim, VimConfig
from test_kernels import BUILT
from test_kernels import backend as backend
from test_mixer import SHAPES, make, positions, stream

pytestmark = pytest.mark.skipif(not BUILT, reason="the kernels were not compiled")
SMALL = {"patch": 4, "stride": 4, "d_model": 32, "depth": 4, "num_classes": 5}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def images(batch=2, *sides, seed=0):
    return torch.randn(batch, 3, *(sides or (32, 32)), generator=torch.Generator().manual_seed(seed))


def random_model(kind="vim"):
    torch.manual_seed(0)
    if kind == "vim":
        model = Vim(VimConfig(image_size=(32, 32), **SMALL))
    elif kind == "mamba_reg":
        model = MambaReg(MambaRegConfig(image_size=(32, 32), registers=3, narrow=2, **SMALL))
    else:
        model = VideoMamba(VideoMambaConfig(image_size=(32, 32), frames=4, **SMALL))
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def model():
    return random_model()


# ---------------------------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_mixers_give_the_same_bits(backend, shape):
    if backend == "pytorch":
        pytest.skip("nothing is packed without the kernels")
    batch, length, columns, *rest = shape
    mixers, x = [make(columns, *rest, seed=seed) for seed in range(3)], stream(batch, length, columns)
    packed, packing = kernels.pack(mixers)
    for first, end in ((0, 3), (1, 2), (1, 3)):
        found = kernels.mix_packed(x, packed[first:end], packing)
        assert all(map(torch.equal, found, kernels.mix(x, mixers[first:end])))


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("virtual", [(True, True), (True, False), (False, True)])
def test_over_a_reduced_sequence(backend, repeated, virtual):
    if backend == "pytorch":
        pytest.skip("nothing is packed without the kernels")
    sequence = positions(3, 17, 41)
    repeats = 3 * torch.rand(3, 17, generator=torch.Generator().manual_seed(3)) if repeated else None
    over = Over(repeats, *(sequence if there else None for there in virtual))
    mixers, x = [make(), make(seed=5)], stream(3, 17)
    packed, packing = kernels.pack(mixers)
    assert all(map(torch.equal, kernels.mix_packed(x, packed, packing, over), kernels.mix(x, mixers, over)))
    with FlopCounterMode(display=False):  # as an operator
        as_operator = kernels.mix_packed(x, packed, packing, over)
    assert all(map(torch.equal, as_operator, kernels.mix(x, mixers, over)))


def test_in_bf16(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    mixers = [make(64, 128, rank=4, dtype=torch.bfloat16, seed=seed) for seed in range(2)]
    for length in (1, 33):
        packed, packing = kernels.pack(mixers)
        x = stream(2, length, 64)
        assert all(map(torch.equal, kernels.mix_packed(x, packed, packing), kernels.mix(x, mixers)))


def test_its_multiply_adds_are_counted():
    mixers, x = [make(), make(seed=5)], stream()
    packed, packing = kernels.pack(mixers)
    with FlopCounterMode(display=False) as plain:
        kernels.mix(x, mixers)
    with FlopCounterMode(display=False) as counted:
        kernels.mix_packed(x, packed, packing)
    assert counted.get_total_flops() == plain.get_total_flops() > 0


def test_memory_that_lies_otherwise_gives_the_same():
    mixers, x = [make()], stream()
    packed, packing = kernels.pack(mixers)
    other = torch.zeros(packed.numel() + 64, dtype=torch.uint8)[4 : 4 + packed.numel()].view(packed.shape)
    other.copy_(packed)
    assert other.data_ptr() % 64
    assert torch.equal(kernels.mix_packed(x, other, packing)[0], kernels.mix(x, mixers)[0])
    spread = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(kernels.mix_packed(spread, packed, packing)[0], kernels.mix(x, mixers)[0])


@pytest.mark.parametrize(
    ("x", "says"), [(stream(columns=25), "take x"), (stream().double(), "float64"), (stream()[0], "take x")]
)
def test_a_stream_that_does_not_fit_is_refused(x, says):
    with pytest.raises(ValueError, match=says):
        kernels.mix_packed(x, *kernels.pack([make()]))


def test_another_instruction_set_is_refused():
    best = cpu.level()
    if best == "generic":
        pytest.skip("there is one only")
    packed, packing = kernels.pack([make()])
    try:
        cpu.level("generic")
        with pytest.raises(ValueError, match=f"packed for {best}, and generic is in use"):
            kernels.mix_packed(stream(), packed, packing)
    finally:
        cpu.level(best)


@pytest.mark.parametrize(
    "mixers", [[make(), make(channels=41)], [make(dtype=torch.float64)], [make()._replace(norm=None)]]
)
def test_what_no_kernel_takes_cannot_be_packed(mixers):
    with pytest.raises(ValueError, match="only blocks of one shape can be packed"):
        kernels.pack(mixers)


def test_without_the_kernels_nothing_can_be_packed(monkeypatch, model):
    monkeypatch.setattr(cpu, "_load", lambda: (None, "the kernels were not compiled"))
    with pytest.raises(ValueError, match=r"nothing can be packed: The kernels were not compiled, so .* reinstall"):
        mambatrim.pack(model)


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kind", ["vim", "mamba_reg", "videomamba"])
@pytest.mark.parametrize("method", [None, "mtr", "vsm", "tome"])
def test_a_packed_model_gives_the_same_bits(kind, method):
    model = random_model(kind)
    if method is not None:
        model = mambatrim.reduce(model, flops_reduction=0.3, method=method)
    packed, sides = mambatrim.pack(model), model.sides()
    for seed in range(4):
        x = images(1 + seed // 2, *sides, seed=seed)
        assert torch.equal(packed(x), model(x))


def test_other_sizes_and_features(model):
    packed = mambatrim.pack(model)
    for sides in ((40, 24), (16, 64)):
        assert torch.equal(packed(images(1, *sides)), model(images(1, *sides)))
    assert torch.equal(packed.forward_features(images()).x, model.forward_features(images()).x)
    assert all(map(torch.equal, packed.feature_maps(images(), (0, 2)), model.feature_maps(images(), (0, 2))))


def test_it_can_be_reduced_packed_again_and_copied(model):
    packed, x = mambatrim.pack(model), images()
    assert mambatrim.pack(packed) is packed
    wanted = mambatrim.reduce(model, flops_reduction=0.3)(x)
    fast = mambatrim.reduce(packed, flops_reduction=0.3)
    for run in (fast, copy.deepcopy(fast), mambatrim.pack(mambatrim.reduce(model, flops_reduction=0.3))):
        assert torch.equal(run(x), wanted) and torch.equal(run(x), wanted)
    assert torch.equal(packed(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), model(x))
    assert mambatrim.count_flops(fast) == mambatrim.count_flops(mambatrim.reduce(model, flops_reduction=0.3))


def test_it_does_not_follow_the_model(model):
    packed, x = mambatrim.pack(model), images()
    before = packed(x)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    assert torch.equal(packed(x), before) and not torch.equal(model(x), before)


def test_it_needs_no_context_and_has_no_gradients(model):
    packed = mambatrim.pack(model)
    with torch.enable_grad():
        assert not packed(images()).requires_grad
        with pytest.raises(ValueError, match="a packed model has no gradients"):
            packed(images().requires_grad_())


def test_it_compiles_whole(model):
    packed = mambatrim.pack(mambatrim.reduce(model, flops_reduction=0.3))
    torch.compiler.reset()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        torch.testing.assert_close(compiled(images(seed=seed)), packed(images(seed=seed)))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda packed: packed.state_dict(), "no weights to save"),
        (lambda packed: packed.load_state_dict(random_model().state_dict()), "takes no weights"),
        (lambda packed: packed.layers[0].register_forward_hook(print), "take no hooks"),
        (lambda packed: packed.layers[0].register_forward_pre_hook(print), "take no hooks"),
        (lambda packed: packed.layers[0](images()), "with their model only"),
        (lambda packed: torch.export.export(packed, (images(),)), "cannot be exported"),
        (lambda packed: mambatrim.reduce(packed, flops_reduction=0.3, method="utr"), "no signal 'y'"),
        (lambda packed: packed.double()(images().double()), None),
    ],
)
def test_what_it_cannot_do_is_said(model, use, says):
    packed = mambatrim.pack(model)
    if says is None:
        use(packed)
        return
    with pytest.raises(ValueError, match=says):
        use(packed)


def test_what_cannot_be_packed_is_said(model):
    for other, says in (
        (mambatrim.reduce(model, flops_reduction=0.3, method="utr"), "no signal 'y'"),
        (mambatrim.create_model("local_vim_tiny"), "got LocalVim"),
        (torch.compile(model), "before torch.compile"),
        (nn.Linear(2, 2), "got Linear"),
        (copy.deepcopy(model).half(), "got torch.float16"),
    ):
        with pytest.raises(ValueError, match=says):
            mambatrim.pack(other)
    model.layers[1].mixer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="blocks with hooks"):
        mambatrim.pack(model)


# ------------------------------------------------------------------------------------------------------- the recording


def recordings(packed) -> list[replay.Replay | None]:
    return [known.replay for known in packed.layers._replays.values()]


@pytest.mark.parametrize("kind", ["vim", "mamba_reg", "videomamba"])
@pytest.mark.parametrize("method", [None, "mtr", "vsm"])
def test_what_is_all_kernels_is_recorded(kind, method):
    model = random_model(kind)
    packed = mambatrim.pack(model if method is None else mambatrim.reduce(model, flops_reduction=0.3, method=method))
    x = images(1, *model.sides())
    first = packed(x)
    (found,) = recordings(packed)
    assert found is not None and found._right is None
    again = packed(x)
    assert found._right is True and torch.equal(first, again)
    kept = packed(images(1, *model.sides(), seed=1))
    assert torch.equal(packed(x), first) and not torch.equal(kept, first)  # results are not overwritten


@pytest.mark.parametrize("method", ["tome", "random", "stm"])
def test_what_is_not_is_run_as_it_is(model, method):
    packed = mambatrim.pack(mambatrim.reduce(model, flops_reduction=0.3, method=method))
    for seed in range(3):
        packed(images(seed=seed))
    assert recordings(packed) == [None]


def test_changes_are_seen(model):
    packed, x = mambatrim.pack(model), images()
    for _ in range(3):
        packed(x)
    packed.head.weight.mul_(2)
    doubled = random_model()
    doubled.head.weight.mul_(2)
    assert torch.equal(packed(x), doubled(x))
    packed.head.weight.data = 2 * packed.head.weight.data
    doubled.head.weight.mul_(2)
    assert torch.equal(packed(x), doubled(x))
    packed.head = nn.Linear(32, 7)
    doubled.head = packed.head
    assert torch.equal(packed(x), doubled(x))
    seen = []
    hook = packed.norm_f.register_forward_hook(lambda *_: seen.append(1))
    packed(x)
    assert seen == [1]
    hook.remove()
    packed.patch_embed.proj = copy.deepcopy(packed.patch_embed.proj)
    packed.patch_embed.proj.weight.zero_()
    doubled.patch_embed.proj.weight.zero_()
    assert torch.equal(packed(x), doubled(x))


def test_few_recordings_are_kept(model):
    packed = mambatrim.pack(model)
    for batch in range(1, MOST_REPLAYS + 3):
        for _ in range(2):
            assert torch.equal(packed(images(batch)), model(images(batch)))
    assert len(recordings(packed)) == MOST_REPLAYS


def test_large_ones_are_not(model, monkeypatch):
    monkeypatch.setattr(replay, "MOST_BYTES", 10_000)
    packed = mambatrim.pack(model)
    assert torch.equal(packed(images()), model(images())) and recordings(packed) == [None]


@pytest.mark.parametrize("method", [None, "vsm"])
def test_several_threads_at_once(model, method):
    model = model if method is None else mambatrim.reduce(model, flops_reduction=0.3, method=method)
    given = [images(seed=seed) for seed in range(8)]
    wanted = [model(x) for x in given]

    def run(packed, x, start):
        with torch.no_grad():
            start.wait()
            return [packed(x) for _ in range(4)]

    for _ in range(6):
        packed, start = mambatrim.pack(model), Barrier(len(given))
        with ThreadPoolExecutor(len(given)) as pool:
            found = list(pool.map(lambda x, packed=packed, start=start: run(packed, x, start), given))
            assert all(torch.equal(one, y) for some, y in zip(found, wanted, strict=True) for one in some)
        assert recordings(packed)[0] is not None
        assert cpu.direct(given[0]) and not is_in_torch_dispatch_mode()


def test_in_inference_mode_under_autocast_and_with_another_number_of_threads(model):
    packed, threads = mambatrim.pack(model), torch.get_num_threads()
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(packed(images()), model(images()))
        assert torch.equal(packed(images()), model(images()))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(packed(images()), model(images()), rtol=0.1, atol=0.1)
        torch.set_num_threads(threads + 1)
        assert torch.equal(packed(images()), model(images()))
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "x", [images().transpose(2, 3), images().double(), images().to(torch.bfloat16), images()[:0], images(3)[1:]]
)
def test_images_that_lie_otherwise(model, x):
    packed = mambatrim.pack(model)
    for _ in range(3):
        assert torch.equal(packed(x), model(x))


WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


def product(x: Tensor) -> Tensor:
    return kernels.linear(x, WEIGHT)


CONSTANT = torch.ones(1)


@pytest.mark.parametrize(
    ("run", "replays"),
    [
        (product, True),
        (lambda x: kernels.linear(x, torch.ones(6, 8) * 2), True),  # constants are made once
        (lambda x: product(x).view(-1), True),
        (lambda x: product(x) + 1, False),
        (lambda x: product(x.relu()), False),
        (lambda x: product(x.clone()), False),
        (lambda x: product(x[1:]), False),  # a kernel reads from the middle of x
        (lambda x: kernels.linear(x, torch.rand(6, 8)), False),
        (lambda x: kernels.linear(x, WEIGHT * CONSTANT), False),  # nobody said that these are fixed
        (lambda x: product(x).mul_(2), False),
        (lambda x: x, False),
    ],
)
def test_what_depends_on_the_tensor_outside_a_kernel_is_not_replayed(run, replays):
    x = torch.randn(3, 8)
    y, found = replay.record(run, x, [WEIGHT])
    assert torch.equal(y, run(x)) or not replays
    assert (found is not None) is replays
    if found is not None:
        for _ in range(3):
            other = torch.randn(3, 8)
            assert torch.equal(found(run, other), run(other))


def test_a_recording_that_is_wrong_is_never_used():
    def run(x):  # what `tolist` reads is seen by nobody
        return kernels.linear(x, torch.tensor([x[0].tolist()] * 6))

    x = torch.randn(3, 8)
    _, found = replay.record(run, x, [])
    assert found is not None
    for _ in range(3):
        other = torch.randn(3, 8)
        assert torch.equal(found(run, other), run(other))
    assert found._right is False


# ----------------------------------------------------------------------------------------------------------- the stem


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    patch=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)),
    over=st.integers(0, 1),
    columns=st.integers(1, 40),
    video=st.booleans(),
    data=st.data(),
)
@pytest.mark.parametrize("level", cpu.LEVELS[: cpu.LEVELS.index(cpu.level()) + 1] if BUILT else ())
def test_the_stem_as_a_kernel_gives_the_same_bits(level, batch, channels, grid, patch, over, columns, video, data):
    if not video:
        grid, patch = grid[1:], patch[1:]
    stem, generator = PatchEmbed(channels, columns, patch, patch), torch.Generator().manual_seed(columns)
    sides = [count * side + min(over, side - 1) for count, side in zip(grid, patch, strict=True)]
    length = torch.Size(grid).numel()
    special = data.draw(st.integers(0, 3))
    at = sorted(data.draw(st.sets(st.integers(0, length + special - 1), min_size=special, max_size=special)))
    x, own = (torch.randn(*shape, generator=generator) for shape in ((batch, channels, *sides), (1, special, columns)))
    table = torch.randn(1, length + special, columns, generator=generator)
    given_ = (x, stem.proj.weight, stem.proj.bias, own, table)
    best = cpu.level()
    try:
        cpu.level(level)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
            assert embedding.takes(*given_)
            found = stem.sequence(x, own, at, table)
            patched.setattr(embedding, "takes", lambda *_: False)
            assert torch.equal(found, stem.sequence(x, own, at, table))
    finally:
        cpu.level(best)


def test_in_bf16_the_stem_and_the_classifier_round_less(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)
    exact = random_model("mamba_reg")
    model, x = random_model("mamba_reg"), images()
    cast(model, torch.bfloat16)
    for wide, narrow in zip(exact.parameters(), model.parameters(), strict=True):
        wide.copy_(narrow)
    wanted = exact.embed(x).x
    error = (model.embed(x).x - wanted).square().mean()
    packed = mambatrim.pack(model)
    for seed in range(3):
        assert torch.equal(packed(images(seed=seed)), model(images(seed=seed)))
    assert [found is not None and found._right for found in recordings(packed)] == [True]
    logits = (model(x) - exact(x)).square().mean()
    monkeypatch.setattr(embedding, "takes", lambda *_: False)
    assert 0 < error < (model.embed(x).x - wanted).square().mean()
    assert logits < 1e-3 * exact(x).square().mean()


def test_the_stem_is_an_operator_of_a_compiled_model(model):
    graphs = []

    def see(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch.compiler.reset()
    found = torch.compile(model, backend=see, fullgraph=True)(images())
    torch.compiler.reset()
    (graph,) = graphs
    assert sum(node.target is torch.ops.mambatrim.embed for node in graph.nodes) == 1
    assert torch.equal(found, model(images()))
    with FlopCounterMode(display=False) as counted:
        model(images())
    with FlopCounterMode(display=False) as compiled:
        torch.ops.mambatrim.embed(
            images(), model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token, [32], model.pos_embed
        )
    assert (
        counted.get_flop_counts()["Vim"][torch.ops.mambatrim.linear]
        > compiled.get_total_flops()
        == 2 * 2 * 64 * 48 * 32
    )


def test_the_stem_runs_its_hooks_and_has_gradients(model):
    seen, x = [], images()
    wanted = model(x)
    model.patch_embed.register_forward_hook(lambda *_: seen.append("stem"))
    model.patch_embed.proj.register_forward_pre_hook(lambda *_: seen.append("never: the weight is read"))
    torch.testing.assert_close(model(x), wanted)
    assert seen == ["stem"]
    with torch.enable_grad():
        assert all(
            gradient is not None
            for gradient in torch.autograd.grad(model(x).sum(), list(model.patch_embed.parameters()))
        )


def test_one_over_sizes():
    x = torch.randint(1, 100, (3, 70), generator=torch.Generator().manual_seed(0)).to(torch.float32)
    assert torch.equal(merging.inverse(x), 1 / x)
    assert torch.equal(merging.inverse(x[:, ::2]), 1 / x[:, ::2])
