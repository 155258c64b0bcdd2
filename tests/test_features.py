"""features: full maps from fewer tokens, for heads that do not know of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mambatrim
from mambatrim.models import MODELS, build
from test_models import GRID


@torch.no_grad()
def test_maps_of_a_flat_model_have_every_token_s_row_where_it_belongs(tiny_model):
    images = torch.randn(2, 3, *tiny_model.sides())
    dense = mambatrim.features(tiny_model, [0, 2, -1])
    unreduced = mambatrim.features(mambatrim.reduce(tiny_model, flops_reduction=0), [0, 2, -1])
    grid = tiny_model.embed(images).grid
    for own, same, shape in zip(dense(images), unreduced(images), dense.shapes(), strict=True):
        assert torch.equal(own, same) and own.shape[1:] == shape == (tiny_model.d_model, *grid)
    # 3 go after the first block, 4 after the third
    fast = mambatrim.reduce(tiny_model, schedule=mambatrim.Schedule((3, 0, 4, 0)))
    first, third, last = mambatrim.features(fast, [0, 2, -1])(images)
    assert torch.equal(first, dense(images)[0])  # nothing was gone before
    tokens = fast.forward_features(images)
    special = set(fast.special_tokens())
    places = [i for i in range(tokens.origin.length) if i not in special]
    for b in range(2):
        rows = last[b].flatten(1).T
        for row, place in zip(rows, places, strict=True):
            assert torch.equal(row, tokens.x[b, tokens.origin.dest[b, place]])
    patches = len(places)
    assert [len(third[b].flatten(1).T.unique(dim=0)) for b in range(2)] == [patches - 3] * 2
    assert [len(last[b].flatten(1).T.unique(dim=0)) for b in range(2)] == [patches - 7] * 2


@torch.no_grad()
@pytest.mark.parametrize("family", GRID)
def test_maps_of_models_on_a_grid(family):
    spec = next(s for s in MODELS.values() if s.family == family)
    make, removed = GRID[family]
    torch.manual_seed(0)
    model = build(replace(spec, config=make(spec.config))).eval()
    images = torch.randn(2, 3, *model.sides())
    dense = mambatrim.features(model)
    unreduced = mambatrim.features(mambatrim.reduce(model, flops_reduction=0))
    reduced = mambatrim.features(mambatrim.reduce(model, schedule=mambatrim.Schedule(removed)))
    assert len(dense.layers) == 4 and dense.layers[-1] == dense.layers[3] == len(model.layers_of_maps()) - 1
    for own, same, fewer, shape in zip(dense(images), unreduced(images), reduced(images), dense.shapes(), strict=True):
        assert torch.equal(own, same) and own.shape == fewer.shape == (2, *shape)
    assert not torch.equal(own, fewer)


@torch.no_grad()
def test_places_of_pruned_tokens_are_zero():
    model = mambatrim.create_model("vim_cifar10", weights="bundled")
    fast = mambatrim.reduce(model, schedule=mambatrim.Schedule.constant(12, 5, after=[3]), method="prune")
    (found,) = mambatrim.features(fast, [-1])(torch.randn(3, 3, 32, 32))
    assert (found == 0).all(1).flatten(1).sum(1).tolist() == [5, 5, 5]


class Head(nn.Module):
    """A segmentation head as it is written for dense maps."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.read = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in widths)

    def forward(self, maps: list[Tensor]) -> Tensor:
        large = maps[0].shape[2:]
        return sum(nn.functional.interpolate(r(m), large) for r, m in zip(self.read, maps, strict=True))


def test_a_head_works_unchanged_trains_compiles_and_exports():
    model = mambatrim.create_model("vim_cifar10", weights="bundled")
    backbone = mambatrim.features(mambatrim.reduce(model, flops_reduction=0.3), layers=[5, 11])
    network = nn.Sequential(backbone, Head([shape[0] for shape in backbone.shapes()]))
    images = torch.randn(2, 3, 32, 32)
    network(images).square().sum().backward()
    assert model.layers[0].mixer.in_proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        expected = network(images)
        assert expected.shape == (2, 4, 8, 8)
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(images), expected, atol=1e-4)
        program = torch.export.export(network, (images,), strict=True)
        assert torch.allclose(program.module()(images), expected, atol=1e-4)


def test_shapes_of_another_size_and_what_is_printed():
    model = mambatrim.create_model("vim_cifar10")
    found = mambatrim.features(model)
    assert found.layers == (2, 5, 8, 11) and "layers=[2, 5, 8, 11]" in repr(found)
    assert found.shapes((32, 64)) == [(160, 8, 16)] * 4


@pytest.mark.parametrize("layers", [[], [12], [-13], [3, 3], [5, 2], ["3"], [True], [1.0]])
def test_wrong_layers_are_named(layers):
    with pytest.raises(ValueError, match="layers must"):
        mambatrim.features(mambatrim.create_model("vim_cifar10"), layers)


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="takes a model of the zoo, before torch.compile; got a Linear"):
        mambatrim.features(nn.Linear(2, 2), [0])


def test_the_page_on_models(tmp_path, monkeypatch):
    """Every block of docs/models.md runs, one after the other, in a folder of its own."""

    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 4
    scope: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"models.md, block {number}", "exec"), scope)
    assert scope["maps"][0].shape == (1, 160, 8, 8)
