"""attach: token reduction in other people's models, equal to our own and to plans that are applied by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn

import mambatrim
from foreign import (
    Classifier,
    MambaVision,
    MambaVisionModelForImageClassification,
    OfficialVim,
    TwoStreamBlock,
)
from mambatrim import adapters, compat, methods
from mambatrim.adapters import MAMBAPY, MAMBAVISION, OFFICIAL_VIM, TRANSFORMERS
from mambatrim.compat.mamba import Mamba
from mambatrim.methods import METHODS
from mambatrim.models.mamba_reg import MambaReg, MambaRegConfig
from mambatrim.models.videomamba import VideoMamba, VideoMambaConfig
from mambatrim.reduction import AS_IT_STANDS, SIGNALS, Schedule, Signals, Tokens
from test_vim import tiny

STEPS = Schedule((0, 3, 0, 4, 2, 0))


def pair(seed: int = 0):
    """Our Vim, and the stand-in of the official class with the same weights."""
    ours = tiny(seed, num_classes=10)
    torch.manual_seed(seed + 1)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs = OfficialVim()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.eval()


def images(count: int = 3, seed: int = 2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, share: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= share * expected.abs().max()


# ----------------------------------------------------------------------------------------------- the official interface


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_official_vim_equals_our_own_dense_and_reduced(seed):
    ours, theirs = pair(seed)
    x = images()
    dense = theirs(x)
    close(dense, ours(x))
    expected = mambatrim.reduce(ours, schedule=STEPS, method="mtr")(x)
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        reduced = theirs(x)
        assert torch.equal(theirs(x), reduced)
    close(reduced, expected)
    assert (reduced - dense).abs().max() > 1e-3 * dense.abs().max()
    assert torch.equal(theirs(x), dense)


@pytest.mark.parametrize("name", [name for name in METHODS if methods.get(name).sequence is AS_IT_STANDS])
@torch.no_grad()
def test_every_method(name):
    ours, theirs = pair()
    method = methods.get(name)
    schedule = Schedule((0, 2, 0, 3, 2, 0))
    expected = mambatrim.reduce(ours, schedule=schedule, method=method)(images())
    with mambatrim.attach(theirs, method=method, schedule=schedule, adapter=OFFICIAL_VIM):
        close(theirs(images()), expected)


@torch.no_grad()
def test_lengths_between_blocks_and_at_the_end():
    _, theirs = pair()
    lengths = []
    probes = [
        layer.mixer.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1])) for layer in theirs.layers
    ]
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        theirs(images())
        last = []
        probe = theirs.layers[-1].register_forward_hook(lambda m, args, out: last.extend(part.shape[1] for part in out))
        theirs(images())
        probe.remove()
    assert lengths[:6] == [17, 17, 14, 14, 10, 8] and last == [17, 17]
    for probe in probes:
        probe.remove()


@torch.no_grad()
def test_mean_of_all_tokens_after_merging_is_the_mean_weighted_by_size():
    _, theirs = pair()
    mean = OfficialVim(place="none").eval()
    state = theirs.state_dict()
    mean.load_state_dict({**state, "pos_embed": state["pos_embed"][:, 1:]}, strict=True)
    with mambatrim.attach(mean, schedule=STEPS, adapter=OFFICIAL_VIM):
        actual = mean(images())
    ours = tiny(num_classes=10)
    ours.load_state_dict(state)
    x = mean.patch_embed(images()) + mean.pos_embed
    tokens, reducer = Tokens.start(x, (4, 4)), mambatrim.Reducer(methods.get("mtr"), STEPS)
    for i, layer in enumerate(ours.blocks()):
        x, captured = layer(tokens.x, reducer.needs(i))
        tokens = reducer(i, tokens.with_x(x), captured)
    rows = ours.norm_f(tokens.x) * tokens.size.unsqueeze(2)
    close(actual, mean.head(rows.sum(dim=1) / 16))


@torch.no_grad()
def test_a_pruned_token_returns_with_the_row_that_it_had():
    _, theirs = pair()
    after = {}
    method = methods.get("prune")

    def note(index):
        def hook(module, args, output):
            after[index] = output[0] + output[1]

        return hook

    probes = [layer.register_forward_hook(note(i)) for i, layer in enumerate(theirs.layers)]  # before the reduction
    schedule = Schedule((0, 5, 0, 0, 0, 0))
    with mambatrim.attach(theirs, method=method, schedule=schedule, adapter=OFFICIAL_VIM):
        probe = theirs.layers[-1].register_forward_hook(note("end"))
        theirs(images(1))
        probe.remove()
    stale = (after["end"] == after[1]).all(dim=2)
    assert stale.sum() == 5 and not stale[0, 8]
    for probe in probes:
        probe.remove()


@torch.no_grad()
def test_runs_of_blocks_give_all_tokens_back_at_their_ends():
    _, theirs = pair()
    halves = replace(OFFICIAL_VIM, scopes=lambda model: [model.layers[:3], model.layers[3:]])
    seen = []
    with mambatrim.attach(theirs, schedule=Schedule((0, 3, 2, 4, 0, 0)), adapter=halves):
        probes = [b.register_forward_hook(lambda m, args, out: seen.append(out[1].shape[1])) for b in theirs.layers]
        theirs(images())
    assert seen == [17, 14, 17, 13, 13, 17]
    for probe in probes:
        probe.remove()


@torch.no_grad()
def test_videomamba_and_mamba_reg():
    torch.manual_seed(0)
    sizes = {
        "image_size": (32, 32),
        "patch": 8,
        "stride": 8,
        "d_model": 32,
        "depth": 6,
        "d_state": 4,
        "num_classes": 10,
    }
    ours = VideoMamba(VideoMambaConfig(**sizes)).eval()
    theirs = OfficialVim(divide=False, place="first").eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with mambatrim.attach(theirs, schedule=STEPS, adapter=adapters.OFFICIAL_VIDEOMAMBA):
        close(theirs(images()), mambatrim.reduce(ours, schedule=STEPS, method="mtr")(images()))

    reg = MambaReg(MambaRegConfig(**sizes, registers=3)).eval()
    blocks = nn.ModuleList(TwoStreamBlock(Mamba(32, 4, bimamba_type="v2", if_divide_out=True), 32) for _ in range(6))
    blocks.load_state_dict(reg.layers.state_dict(), strict=True)
    trunk = nn.Module()
    trunk.layers, trunk.cls_positions = blocks, torch.tensor(reg.special_tokens())
    expected = mambatrim.reduce(reg, schedule=STEPS, method="mtr").forward_features(images())
    with mambatrim.attach(trunk, schedule=STEPS, adapter=adapters.OFFICIAL_MAMBA_REG):
        hidden, residual = reg.embed(images()).x, None
        for block in blocks:
            hidden, residual = block(hidden, residual)
    close(hidden + residual, expected.dense())


@torch.no_grad()
def test_signals_are_those_of_our_own_mixer():
    ours, theirs = pair()
    x = torch.randn(2, 13, 32)
    mixer = ours.blocks()[0].mixer
    update, expected = mixer(x, tuple(SIGNALS))
    close(theirs.layers[0].mixer(x), update)
    found = adapters.mamba1_signals(theirs.layers[0].mixer, x, tuple(SIGNALS))
    assert set(found) == set(SIGNALS) - {"hidden", "update"}
    for name, value in found.items():
        close(value, expected[name])
    shared = Mamba(32, 4, bimamba_type="v1")
    both = adapters.mamba1_signals(shared, x, ("dt_mean", "y_gated"))
    assert torch.equal(both["dt_mean"][:, 0], both["dt_mean"][:, 1])
    close(shared.out_proj(both["y_gated"].sum(dim=1)), shared(x))


# ------------------------------------------------------------------------------------------------------ plain residuals


def mambapy_classifier(**options):
    mambapy = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    trunk = mambapy.Mamba(mambapy.MambaConfig(d_model=32, n_layers=6, d_state=4, **options))

    class Wrapped(Classifier):
        def run(self, x):
            return self.trunk(x)

    return Wrapped(trunk, trunk.layers, nn.Identity(), 32).eval()


def transformers_classifier():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 2, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 6}
    trunk = transformers.MambaModel(transformers.MambaConfig(**sizes, use_cache=False))

    class Wrapped(Classifier):
        def run(self, x):
            return self.trunk(inputs_embeds=x).last_hidden_state

    return Wrapped(trunk, trunk.layers, trunk.norm_f, 32).eval()


PLAIN = {
    "mambapy": (mambapy_classifier, MAMBAPY),
    "mambapy with inner norms": (lambda: mambapy_classifier(inner_layernorms=True), MAMBAPY),
    "transformers": (transformers_classifier, TRANSFORMERS),
}


def by_hand(model: Classifier, x: torch.Tensor, method, schedule: Schedule) -> torch.Tensor:
    """The plans of `method` applied between the blocks, on tensors alone: step sizes by the mixer's own modules."""
    blocks, norm = model.parts
    x = model.embed(x)
    size = torch.ones(x.shape[:2])
    where = torch.arange(17).expand(len(x), -1)  # original position of each row
    for block, r in zip(blocks, schedule.removed, strict=True):
        mixer, given = block.mixer, block.norm(x)
        x = block(x)
        if not r:
            continue
        u = mixer.in_proj(given).chunk(2, dim=-1)[0].transpose(1, 2)
        u = torch.nn.functional.silu(mixer.conv1d(u)[..., : x.shape[1]]).transpose(1, 2)
        dt, _, _ = mixer.x_proj(u).split([mixer.dt_proj.in_features, 4, 4], dim=-1)
        dt = dt if getattr(mixer, "dt_layernorm", None) is None else mixer.dt_layernorm(dt)
        steps = torch.nn.functional.softplus(mixer.dt_proj(dt)).mean(dim=-1)  # (B, L)
        rows, sizes, places = [], [], []
        for i in range(len(x)):
            patch = where[i] != 8
            ids = where[i][patch] - (where[i][patch] > 8).long()
            values = {"hidden": x[i : i + 1, patch], "dt_mean": steps[i : i + 1, None, patch]}
            plan = method.plan(Signals(size[i : i + 1, patch], ids[None], (4, 4), values), r)
            merged = plan.merge(x[i : i + 1, patch], size[i : i + 1, patch])
            kept = where[i][patch][plan.keep[0]]
            order = torch.cat([kept, torch.tensor([8])]).argsort()
            rows.append(torch.cat([merged[0], x[i][~patch]])[order])
            sizes.append(torch.cat([plan.sum(size[i : i + 1, patch])[0], torch.ones(1)])[order])
            places.append(torch.cat([kept, torch.tensor([8])])[order])
        x, size, where = torch.stack(rows), torch.stack(sizes), torch.stack(places)
    return model.head(norm(x)[where == 8])


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_plain_residual_models_equal_plans_by_hand(kind):
    build, adapter = PLAIN[kind]
    model, x = build(), images()
    dense = model(x)
    close(by_hand(model, x, methods.get("mtr"), Schedule.none(6)), dense)
    with mambatrim.attach(model, schedule=STEPS, adapter=replace(adapter, special=adapters.middle)):
        reduced = model(x)
    close(reduced, by_hand(model, x, methods.get("mtr"), STEPS))
    assert (reduced - dense).abs().max() > 1e-3 * dense.abs().max()
    assert torch.equal(model(x), dense)


def mambavision(golden, hub: bool):
    """A stand-in of the official class, or of the one on the Hub, and the file of official weights and outputs."""
    file = golden("mambavision_e8_d1242_img64")
    model = MambaVisionModelForImageClassification() if hub else MambaVision()
    (model.model if hub else model).load_state_dict(file.part("state."), strict=True)
    return model.eval(), file


def window_by_hand(blocks, steps, x):
    """One stage on windows (B, side side, C): the plan that MTR makes after each block, and all tokens at the end."""
    count = x.shape[1]
    size, ids, origin = torch.ones(x.shape[:2]), torch.arange(count).expand(len(x), -1), None
    for block, r in zip(blocks, steps, strict=True):
        given = block.norm1(x)
        x = block(x)
        if r:
            dt = adapters.MAMBAVISION.signals(block.mixer, given, ("dt_mean",))["dt_mean"]
            signals = Signals(size, ids, adapters.square(count), {"hidden": x, "dt_mean": dt})
            plan = methods.get("mtr").plan(signals, r)
            x, size, ids = plan.merge(x, size), plan.sum(size), plan.select(ids)
            origin = plan if origin is None else origin.then(plan)
    return x if origin is None else origin.unmerge(x)


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("images", ["", "second."])
@torch.no_grad()
def test_mambavision(golden, hub, images):
    """Official logits dense; reduced those of plans by hand inside the windows, one of them or several and padded."""
    model, file = mambavision(golden, hub)
    x = file.tensors[f"{images}input"]

    def logits():
        out = model(x)
        return out["logits"] if hub else out

    dense = logits()
    close(dense, file.tensors[f"{images}logits"])
    with mambatrim.attach(model, schedule=Schedule((4, 3, 0, 0, 1, 0)), adapter=MAMBAVISION):
        reduced = logits()
        if hub:  # maps for segmentation come whole from every stage
            taken = []
            probe = model.model.levels[2].register_forward_hook(lambda m, args, out: taken.append(out[1].shape))
            assert torch.equal(logits(), reduced) and taken == [file.tensors[f"{images}stages.2.out"].shape]
            probe.remove()
    assert torch.equal(logits(), dense)
    stages = (model.model if hub else model).levels[2:]
    for stage, steps in zip(stages, ((4, 3, 0, 0), (1, 0)), strict=True):
        stage.run = partial(window_by_hand, stage.blocks, steps)
    close(reduced, logits())
    assert (reduced - dense).abs().max() > 1e-3 * dense.abs().max()


@torch.no_grad()
def test_mambavision_signals_and_its_blocks_of_attention(golden):
    model, file = mambavision(golden, hub=False)
    given = []
    probe = model.levels[2].blocks[1].mixer.register_forward_hook(lambda m, args, out: given.append((m, args[0])))
    model(file.tensors["input"])
    probe.remove()
    found = adapters.MAMBAVISION.signals(*given[0], tuple(SIGNALS))
    close(found["dt"][:, 0].transpose(1, 2), file.tensors["blocks.2.1.delta"])
    close(found["y"][:, 0].transpose(1, 2), file.tensors["blocks.2.1.scan_out"])
    with pytest.raises(ValueError, match="block 3 has no scan"):
        mambatrim.attach(model, schedule=Schedule((0, 0, 0, 5, 0, 0)), adapter=MAMBAVISION)
    with pytest.raises(ValueError, match="for the 6 blocks of MambaVision"):
        mambatrim.attach(model, schedule=Schedule.none(9), adapter=MAMBAVISION)


# -------------------------------------------------------------------------------------------------------------- removal


class Renamed(TwoStreamBlock):
    """A block whose mixer is called `mamba`, as in many networks for segmentation."""

    def forward(self, hidden, residual=None):
        stream = hidden if residual is None else hidden + residual
        return self.mamba(self.norm(stream)), stream


@torch.no_grad()
def test_nothing_is_left():
    _, theirs = pair()
    x = images()
    dense = theirs(x)
    before = {name: {k: copy.copy(v) for k, v in vars(m).items()} for name, m in theirs.named_modules()}
    handle = mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM)
    assert theirs.state_dict().keys() == OfficialVim().state_dict().keys()
    theirs(x)
    during = [(set(vars(m)), set(vars(m)["_buffers"])) for m in theirs.modules()]
    handle.remove()
    handle.remove()
    assert during == [(set(was), set(was["_buffers"])) for was in before.values()]
    for name, module in theirs.named_modules():
        for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks"):
            assert dict(vars(module)[hooks]) == dict(before[name][hooks]) == {}
    assert torch.equal(theirs(x), dense)
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM) as handle:
        pass
    handle.remove()
    assert torch.equal(theirs(x), dense)


def test_gradients_and_a_forward_that_fails_half_way():
    ours, theirs = pair()
    x = images()
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        stop = theirs.layers[3].register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            theirs(x)
        stop.remove()
        theirs(x).sum().backward()
    mambatrim.reduce(ours, schedule=STEPS, method="mtr")(x).sum().backward()
    close(theirs.layers[0].mixer.in_proj.weight.grad, ours.layers[0].mixer.in_proj.weight.grad, 1e-4)


@torch.no_grad()
def test_blocks_that_call_their_mixer_otherwise():
    _, theirs = pair()
    x = images()
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        expected = theirs(x)
    for layer in theirs.layers:
        layer.mamba = layer.mixer
        del layer.mixer
        layer.__class__ = Renamed
    with pytest.raises(ValueError, match="has no Mamba blocks that OFFICIAL_VIM knows"):
        mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM)
    own = replace(OFFICIAL_VIM, mixer=attrgetter("mamba"), scopes=lambda model: [model.layers])
    with pytest.raises(ValueError, match="has no Mamba blocks that OFFICIAL_VIM knows"):
        mambatrim.attach(theirs, schedule=STEPS, adapter=replace(own, mixer=attrgetter("mamba.mixer")))
    with mambatrim.attach(theirs, schedule=STEPS, adapter=own):
        assert torch.equal(theirs(x), expected)


@torch.no_grad()
def test_other_image_sizes_and_copies():
    _, theirs = pair()
    x = images()
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        reduced = theirs(x)
        twin = copy.deepcopy(theirs)
    assert torch.equal(twin(x), reduced) and not torch.equal(theirs(x), reduced)


# ---------------------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def small():
    """A Vim of two blocks, which is soon compiled, and a compiler that knows of nothing yet."""
    torch.compiler.reset()
    torch.manual_seed(0)
    yield OfficialVim(d_model=16, depth=2).eval()
    torch.compiler.reset()


FEW = Schedule((3, 0))


@torch.no_grad()
def test_a_model_compiles_after_attaching(small):
    """In one graph; what is compiled sees the removal too."""
    x = images(2)
    dense = small(x)
    with mambatrim.attach(small, schedule=FEW, adapter=OFFICIAL_VIM):
        reduced = small(x)
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        close(compiled(x), reduced)
        close(compiled(x), reduced)
    assert (reduced - dense).abs().max() > 1e-3 * dense.abs().max()
    close(compiled(x), dense)
    close(small(x), dense)


def test_gradients_of_a_compiled_model(small):
    x = images(2)
    with mambatrim.attach(small, schedule=FEW, adapter=OFFICIAL_VIM):
        small(x).square().sum().backward()
        expected = {name: p.grad for name, p in small.named_parameters()}
        small.zero_grad()
        torch.compile(small, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for name, parameter in small.named_parameters():
        close(parameter.grad, expected[name], 1e-4)


class Interrupted(TwoStreamBlock):
    """Does what no graph can hold, so that every block is compiled by itself, and two of a class are taken for one."""

    def forward(self, hidden, residual=None, inference_params=None):
        torch._dynamo.graph_break()
        return super().forward(hidden, residual, inference_params)


@torch.no_grad()
def test_a_model_that_compiles_in_pieces(small):
    model = OfficialVim(d_model=16, depth=4).eval()
    for layer in model.layers:
        layer.__class__ = Interrupted
    x = images(2)
    # the third block runs what was compiled for the second, which removes nothing
    with mambatrim.attach(model, schedule=Schedule((0, 0, 3, 0)), adapter=OFFICIAL_VIM):
        close(torch.compile(model, backend="eager")(x), model(x))


@torch.no_grad()
def test_a_model_that_was_compiled_before(small):
    """Its compiled form is refused; where the module is taken instead it stays dense, until the compiler forgets it."""
    x = images(2)
    dense, compiled = small(x), torch.compile(small, backend="eager")
    close(compiled(x), dense)
    with pytest.raises(ValueError, match="OptimizedModule is compiled, and would not see the reduction: attach first"):
        mambatrim.attach(compiled, schedule=FEW, adapter=OFFICIAL_VIM)
    with mambatrim.attach(small, schedule=FEW, adapter=OFFICIAL_VIM):
        reduced = small(x)
        close(compiled(x), dense)
        torch.compiler.reset()
        close(compiled(x), reduced)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_refuses_in_one_sentence():
    ours, theirs = pair()

    def refused(match, model=theirs, schedule=STEPS, adapter=OFFICIAL_VIM, method="mtr"):
        with pytest.raises(ValueError, match=match) as error:
            mambatrim.attach(model, method=method, schedule=schedule, adapter=adapter)
        assert "\n" not in str(error.value)

    refused("is compiled", torch.compile(theirs))
    within = copy.deepcopy(theirs)
    within.layers[2].compile()
    refused("is compiled", within)
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        refused("has a reduction already")
        refused("has a reduction already", nn.Sequential(theirs))
    refused("for the 6 blocks of OfficialVim", schedule=Schedule.none(7))
    refused("for the 6 blocks of OfficialVim", schedule=(0, 0, 0, 0, 0, 0))
    refused("has no Mamba blocks that OFFICIAL_VIM knows", nn.Sequential(nn.Linear(3, 3)))
    refused("has 2 lists of Mamba blocks", nn.ModuleDict({"a": theirs, "b": OfficialVim()}))
    refused("only as it stands, and method 'vsm' wants .*sequence=AS_IT_STANDS", method="vsm")
    refused("use mambatrim.reduce", ours)
    refused("unknown method 'tomme'", method="tomme")
    refused("a factory has to be called first", method=methods.mtr)
    roped = OfficialVim()
    roped.if_rope = True
    refused("a Vim with if_rope", roped)
    twice = OfficialVim()
    twice.layers[1] = twice.layers[0]
    refused("uses a block twice", twice)
    assert not any(module._forward_hooks for module in (*theirs.modules(), *ours.modules()))


class Shrinking(nn.Module):
    """Drops a token between its blocks."""

    def __init__(self, cut: int) -> None:
        super().__init__()
        self.cut, self.layers = cut, OfficialVim().layers

    def forward(self, hidden):
        residual = None
        for i, layer in enumerate(self.layers):
            hidden, residual = layer(hidden, residual)
            if i == self.cut:
                hidden, residual = hidden[:, 1:], residual[:, 1:]
        return hidden


@torch.no_grad()
def test_refuses_in_the_forward():
    x = torch.randn(2, 17, 32)
    bare = replace(OFFICIAL_VIM, special=adapters.none)
    model = Shrinking(2)
    with (
        mambatrim.attach(model, schedule=STEPS, adapter=bare),
        pytest.raises(ValueError, match="block 3 returned 13 tok"),
    ):
        model(x)
    with mambatrim.attach(model, schedule=STEPS, adapter=OFFICIAL_VIM), pytest.raises(ValueError, match="if_cls_token"):
        model(x)
    wrong = replace(bare, read=adapters.stream)
    with mambatrim.attach(model, schedule=STEPS, adapter=wrong), pytest.raises(ValueError, match="the residual stream"):
        model(x)
    vim = OfficialVim()
    with mambatrim.attach(vim, schedule=STEPS, adapter=OFFICIAL_VIM):
        del vim.layers[2]
        with pytest.raises(ValueError, match="block 3 ran out of turn"):
            vim(images())
    reg = replace(OFFICIAL_VIM, special=adapters.OFFICIAL_MAMBA_REG.special)
    vim = OfficialVim()
    with mambatrim.attach(vim, schedule=STEPS, adapter=reg), pytest.raises(ValueError, match="cls_positions"):
        vim(images())
    assert OFFICIAL_VIM.special(OfficialVim(place="first"), 17) == (0,)
    double = OfficialVim()
    double.use_double_cls_token = True
    assert OFFICIAL_VIM.special(double, 18) == (0, 17)
    assert adapters.square(16) == (4, 4) and adapters.square(12) == (1, 12)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_on_own_models():
    page = (Path(__file__).parents[1] / "docs" / "own-model.md").read_text()

    def run(title: str) -> dict:
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        scope: dict = {}
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            exec(compile(block, f"own-model.md, {title}", "exec"), scope)
        return scope

    try:
        scope = run("Convert or attach your own model")
    finally:
        compat.uninstall()
    assert scope["Mamba"] is Mamba and torch.equal(scope["logits"], scope["model"](scope["images"]))
    scope = run("By hand")
    assert scope["y"].shape[1] == 52 and scope["z"].shape == scope["x"].shape
    assert torch.equal(scope["plan"].select(scope["z"]), scope["y"])
