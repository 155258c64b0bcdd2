"""Patches that go before block 0, right behind the patch embedding: what runs, what is counted, and who refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import mambatrim
from mambatrim import methods
from mambatrim.compare import in_stages
from mambatrim.flops import count_flops, solve
from mambatrim.models import MODELS, build
from mambatrim.models.vim import Vim
from mambatrim.reduction import STEM, Assignment, Method, Reducer, Schedule, Signals
from mambatrim.visualize import trace
from test_models import GRID
from test_vim import tiny

TWO_PLACES = Schedule((0, 2, 0, 0), stem=3)


@torch.no_grad()
def test_the_first_block_sees_the_reduced_sequence_in_every_flat_family(tiny_model):
    if not tiny_model.reduces_stem:  # LocalVim, whose scans have orders of their own
        with pytest.raises(ValueError, match="patches cannot go before block 0 of"):
            mambatrim.reduce(tiny_model, schedule=TWO_PLACES, method="tome")
        return
    images = torch.randn(2, 3, *tiny_model.sides())
    fast = mambatrim.reduce(tiny_model, schedule=TWO_PLACES, method="tome")
    seen: list[int] = []
    for layer in fast.layers:
        layer.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    out = fast.forward_features(images)
    whole = out.origin.length
    assert seen == [whole - 3, whole - 3, whole - 5, whole - 5] == list(count_flops(fast).lengths)
    assert out.size.sum(1).tolist() == [whole] * 2
    assert fast.forward_features(images, unmerge=True).x.shape == (2, whole, tiny_model.d_model)


@torch.no_grad()
def test_it_is_the_dense_model_on_merged_tokens():
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    given: list[Signals] = []

    def last_two(signals: Signals, r: int) -> Assignment:
        given.append(signals)
        batch, patches = signals.size.shape
        source = torch.full((batch, 1), patches - 1)
        return Assignment.from_links(source, source - 1, patches)

    depth = model.depth
    fast = mambatrim.reduce(model, schedule=Schedule((0,) * depth, 1), method=Method("pair", ("hidden",), last_two))
    x = model.embed(images).x  # the last patches are the last tokens
    merged = torch.cat([x[:, :-2], x[:, -2:].mean(1, keepdim=True)], dim=1)
    for layer in model.layers:
        merged, _ = layer(merged)
    torch.testing.assert_close(fast.forward_features(images).x, merged)
    special = model.special_tokens()
    kept = [i for i in range(x.shape[1]) if i not in special]
    assert torch.equal(given[0].hidden, x[:, kept])


@pytest.mark.parametrize("convention", ["both", "paper", "projections"])
def test_every_block_is_counted_short_and_the_stem_whole(convention):
    model = mambatrim.create_model("vim_cifar10")
    method = methods.vsm()
    fast = mambatrim.reduce(model, schedule=Schedule((0,) * 12, 20), method=method)
    block = model.block_cost(45, convolved=65).total(convention)
    ends = (model.stem_cost() + model.head_cost()).total(convention)
    found = count_flops(fast, convention=convention)
    assert found.total == ends + 12 * block + method.cost(64, 20, 160, 320) and found.lengths == (45,) * 12


@pytest.mark.parametrize("stages", [(STEM,), (STEM, 0), (STEM, 2, 4, 6)])
def test_solve_lands_within_half_a_point(stages):
    model, method = mambatrim.create_model("vim_cifar10"), methods.vsm()
    schedule = solve(model, 0.4, stages, method=method)
    assert schedule.places == stages
    assert abs(1 - count_flops(mambatrim.reduce(model, schedule=schedule, method=method)).ratio - 0.4) <= 0.005
    assert in_stages(stages)(model, 0.4, method) == schedule


@torch.no_grad()
def test_it_compiles_exports_trains_and_gives_maps():
    torch.manual_seed(0)
    model = tiny().eval()
    fast = mambatrim.reduce(model, schedule=Schedule((0, 2, 0, 0, 0, 0), 5), method="vsm")
    images = torch.randn(2, 3, 32, 32)
    expected = fast(images)
    assert not torch.allclose(expected, model(images))
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(images), expected)
    torch.testing.assert_close(torch.export.export(fast, (images,), strict=True).module()(images), expected)
    first, _ = fast.feature_maps(images, [0, 2])
    merged = trace(fast, images)[0]
    assert [len(one.flatten(1).T.unique(dim=0)) for one in first] == [merged.origin.survivors - 1] * 2
    with torch.enable_grad():
        fast(images).sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_picture_names_the_place(monkeypatch):
    module = sys.modules["mambatrim.visualize"]  # the package has the function under this name
    model = mambatrim.create_model("vim_cifar10")
    fast = mambatrim.reduce(model, schedule=Schedule.from_counts(12, {STEM: 20, 3: 10}), method="vsm")
    drawn = {}
    compose = module._compose
    monkeypatch.setattr(module, "_compose", lambda *given: drawn.update(columns=given[1]) or compose(*given))
    module.visualize(fast, Image.new("RGB", (32, 32)))
    assert drawn["columns"] == [
        ("65 tokens", "input: 64 patches + 1 special"),
        ("45 tokens", "before block 0"),
        ("35 tokens", "after block 3"),
    ]


@torch.no_grad()
def test_a_folder_and_a_report_hold_it(tmp_path: Path):
    fast = mambatrim.reduce(mambatrim.create_model("vim_cifar10").eval(), schedule=Schedule((0,) * 12, 20))
    mambatrim.save_pretrained(fast, tmp_path)
    back, images = mambatrim.from_pretrained(tmp_path), torch.randn(1, 3, 32, 32)
    assert back.reducer.schedule == fast.reducer.schedule and torch.equal(back(images), fast(images))
    assert mambatrim.report.result("x", fast, {})["schedule"] == {"removed": [0] * 12, "stem": 20}
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"stem": 20', '"stem": -2'))
    with pytest.raises(ValueError, match="from 0 up, got -2"):
        mambatrim.from_pretrained(tmp_path)


def test_what_is_printed():
    said = [Reducer(methods.vsm(), schedule, (2,), 65).extra_repr() for schedule in (TWO_PLACES, Schedule((0,), 9))]
    assert said == ["vsm, 65 → 62 → 60 before block 0 and after blocks 1", "vsm, 65 → 56 before block 0"]


def test_methods_that_look_at_a_block_are_refused():
    depth, model = 12, mambatrim.create_model("vim_cifar10")
    works = []
    for name in methods.METHODS:
        try:
            fast = mambatrim.reduce(model, schedule=Schedule((0,) * depth, 6), method=name)
            fast(torch.randn(1, 3, 32, 32))
            works.append(name)
        except ValueError as error:
            lacking = [need for need in methods.get(name).needs if need not in ("hidden", "special", "special_at")]
            start = f"patches cannot go before block 0 with method {name!r}: it needs {lacking[0]!r} of a block"
            assert str(error) == f"{start}, and none has run"
    assert {"vsm", "tome", "random"} <= set(works) and "mtr" not in works


@pytest.mark.parametrize("spec", [next(s for s in MODELS.values() if s.family == f) for f in sorted(GRID)])
def test_other_families_refuse(spec):
    model, steps = build(replace(spec, config=GRID[spec.family][0](spec.config))), GRID[spec.family][1]
    with pytest.raises(ValueError, match="patches cannot go before block 0 of"):
        mambatrim.reduce(model, schedule=Schedule((0,) * len(steps), 1), method="tome")
    with pytest.raises(ValueError, match="patches cannot go before block 0 of"):
        solve(model, 0.2, (STEM, 1), method=methods.tome())


def test_too_many_are_named():
    model: Vim = tiny()
    patches = model.num_patches()
    with pytest.raises(ValueError, match=f"removes {patches} of {patches} patches before block 0; at most"):
        mambatrim.reduce(model, schedule=Schedule((0,) * model.depth, patches), method="vsm")
    method = replace(methods.tome(), most=lambda patches: patches // 2)
    with pytest.raises(ValueError, match=f"patches cannot go before block 0; at most {patches // 2} can"):
        mambatrim.reduce(model, schedule=Schedule((0,) * model.depth, patches - 1), method=method)
