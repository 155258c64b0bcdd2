"""The blocks of a compiled model: an operator that takes the list of blocks, and PyTorch sees no weights."""

import copy
import pickle

import pytest
import torch

import mambatrim
from mambatrim.models import trunk
from mambatrim.models.layers import BiMambaMixer, Block
from mambatrim.models.trunk import Trunk
from mambatrim.models.vim import Vim, VimConfig

pytestmark = pytest.mark.skipif(not trunk.OPAQUE, reason="this PyTorch has no opaque objects")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OF_THE_STEM_AND_THE_HEAD = 8


@pytest.fixture
def small():
    """A Vim of four blocks, and a compiler that knows of nothing yet."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Vim(VimConfig(image_size=(32, 32), patch=4, stride=4, d_model=32, depth=4, num_classes=5)).eval()
    with torch.no_grad():
        model.cls_token.normal_()
        yield model
    torch.compiler.reset()


def compiled(model, graphs=None):
    """The model compiled; every graph that is made goes to `graphs`."""
    lower = torch._dynamo.lookup_backend("aot_eager")

    def see(graph, inputs):
        if graphs is not None:
            graphs.append(graph.graph)
        return lower(graph, inputs)

    return torch.compile(model, backend=see, fullgraph=True)


def calls(graph, name="blocks"):
    return sum(node.target is getattr(torch.ops.mambatrim, name) for node in graph.nodes)


@pytest.mark.parametrize("method", [None, "mtr", "vsm"])
def test_a_compiled_model_hands_over_no_weights(small, method):
    model = small if method is None else mambatrim.reduce(small, method=method, flops_reduction=0.3)
    graphs = []
    run = compiled(model, graphs)
    for images in (IMAGES, torch.randn(2, 3, 32, 32)):
        torch.testing.assert_close(run(images), model(images))
    (graph,) = graphs
    assert calls(graph) == 1 + sum(place < 3 for place in model.reducer.schedule.places) and not calls(graph, "mixers")
    assert sum(node.op == "placeholder" for node in graph.nodes) == 1 + OF_THE_STEM_AND_THE_HEAD


def test_it_compiles_to_machine_code(small):
    fast = mambatrim.reduce(small, flops_reduction=0.3)
    run = torch.compile(fast, fullgraph=True, dynamic=True)
    for batch in (2, 3, 1):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(run(images), fast(images))


def test_code_in_cpp_takes_no_objects(small):
    run = torch.compile(small, fullgraph=True, options={"cpp_wrapper": True})
    torch.testing.assert_close(run(IMAGES), small(IMAGES))


def test_what_changes_after_compiling_is_seen(small):
    graphs, seen = [], []
    run = compiled(small, graphs)

    def same():
        found, wanted = run(IMAGES), small(IMAGES)
        torch.testing.assert_close(found, wanted)
        return found

    before = same()
    small.layers[0].mixer.in_proj.weight.data.mul_(1.5)
    small.layers[1].mixer.out_proj.weight = torch.nn.Parameter(torch.randn(32, 64))
    assert not torch.allclose(same(), before)
    hook = small.layers[2].register_forward_hook(lambda *_: seen.append("block"))
    run(IMAGES)
    assert seen == ["block"]
    hook.remove()
    before = same()
    small.layers[3] = Block(32, BiMambaMixer(32))
    assert not torch.allclose(same(), before)
    assert len(graphs) == 1
    # others are compiled for
    small.layers.append(Block(32, BiMambaMixer(32)))
    same()
    del small.layers[1]
    same()
    small.layers = torch.nn.ModuleList(small.layers)
    same()
    assert calls(graphs[-1]) == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copy_runs_its_own_blocks(small, copied):
    run, wanted = compiled(small), small(IMAGES)
    torch.testing.assert_close(run(IMAGES), wanted)
    other = copy.deepcopy(small)
    other.layers = copied(small.layers)
    torch.testing.assert_close(compiled(other)(IMAGES), wanted)
    other.layers[0] = Block(32, BiMambaMixer(32))
    found = compiled(other)(IMAGES)
    torch.testing.assert_close(found, other(IMAGES))
    assert not torch.allclose(found, wanted)
    # a shallow copy of a module shares the dict of its modules
    torch.testing.assert_close(run(IMAGES), found if copied is copy.copy else wanted)
    assert other.layers.handle is not small.layers.handle


def test_a_part_of_the_list_is_a_list_of_its_own(small):
    part = small.layers[1:3]
    assert isinstance(part, Trunk) and part.handle.blocks(0, 2) == list(small.layers)[1:3]


def test_a_trunk_is_not_kept_by_its_handle(small):
    handle = Trunk(small.layers).handle
    with pytest.raises(RuntimeError, match="the model that was compiled is gone"):
        handle.blocks(0, 1)


def functional(model, images):
    weights = {name: 1.5 * weight for name, weight in model.named_parameters()}
    return torch.func.functional_call(model, weights, (images,))


def in_place(model, images):
    model.layers[0].mixer.in_proj.weight.mul_(1.5)
    return model(images)


NO_SKIP = torch.nn.Parameter(torch.zeros(64), requires_grad=False)


def assigned(model, images):
    model.layers[0].mixer.D = NO_SKIP
    return model(images)


@pytest.mark.parametrize("around", [functional, in_place, assigned])
def test_code_around_the_model_may_give_it_other_weights(small, around):
    """It is part of the same graph, and what it does to weights is known to the compiler alone."""
    before, wanted = small(IMAGES), around(copy.deepcopy(small), IMAGES)
    graphs, other = [], copy.deepcopy(small)
    torch.testing.assert_close(compiled(lambda images: around(other, images), graphs)(IMAGES), wanted)
    assert not torch.allclose(wanted, before) and calls(graphs[0]) == 0


def test_weights_that_are_swapped_around_the_compiled_model_are_seen(small):
    weights = {f"_orig_mod.{name}": 1.5 * weight for name, weight in small.named_parameters()}
    run, wanted = compiled(small), functional(small, IMAGES)
    assert not torch.allclose(run(IMAGES), wanted)
    torch.testing.assert_close(torch.func.functional_call(run, weights, (IMAGES,)), wanted)


class Same(torch.nn.Module):
    """A block of somebody who returns what he got."""

    def forward(self, x, wanted=(), layout=None):
        return x, {}


def test_blocks_of_others(small):
    for at in (1, 3):
        small.layers[at] = Same()
    graphs = []
    run = compiled(mambatrim.reduce(small, schedule=mambatrim.Schedule((9, 0, 0, 0))), graphs)
    torch.testing.assert_close(run(IMAGES), run._orig_mod(IMAGES))
    small.layers[2] = small.layers[1]
    torch.testing.assert_close(run(IMAGES), run._orig_mod(IMAGES))
    assert calls(graphs[0]) == 2


def test_a_block_of_somebody_without_the_signal(small):
    """A sentence, and no empty scores for the step behind it."""
    small.layers[1] = Same()
    fast = mambatrim.reduce(small, method="mtr", schedule=mambatrim.Schedule((0, 9, 0, 0)))
    for run in (fast, compiled(fast)):
        with pytest.raises(ValueError, match="'dt_mean', but|'dt_mean' is needed, but block 1 returned no such signal"):
            run(IMAGES)


def test_gradients_autocast_other_signals_and_exporters_do_without(small):
    def graph(run):
        graphs = []
        run(graphs)
        return calls(graphs[0])

    with torch.enable_grad():
        assert graph(lambda graphs: compiled(small, graphs)(IMAGES).sum().backward()) == 0
        assert small.layers[0].mixer.in_proj.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert graph(lambda graphs: compiled(small, graphs)(IMAGES)) == 0
    fast = mambatrim.reduce(small, method="utr", flops_reduction=0.3)
    assert graph(lambda graphs: torch.testing.assert_close(compiled(fast, graphs)(IMAGES), fast(IMAGES))) == 1
    assert graph(lambda graphs: graphs.append(torch.export.export(small, (IMAGES,)).graph)) == 0


def test_an_older_pytorch(small, monkeypatch):
    monkeypatch.setattr(trunk, "OPAQUE", False)
    graphs = []
    torch.testing.assert_close(compiled(small, graphs)(IMAGES), small(IMAGES))
    assert calls(graphs[0]) == 0 and calls(graphs[0], "mixers") == 1
