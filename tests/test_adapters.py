"""attach: token reduction in other people's models, equal to our own and to plans that are applied by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import mambatrim
from foreign import Classifier, OfficialVim, TwoStreamBlock, VisionStages
from mambatrim import adapters, methods
from mambatrim.adapters import MAMBAPY, MAMBAVISION, OFFICIAL_VIM, TRANSFORMERS
from mambatrim.compat.mamba import Mamba
from mambatrim.methods import METHODS
from mambatrim.models.mamba_reg import MambaReg, MambaRegConfig
from mambatrim.models.videomamba import VideoMamba, VideoMambaConfig
from mambatrim.reduction import SIGNALS, Schedule, Signals, Tokens
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
    expected = mambatrim.reduce(ours, schedule=STEPS)(x)
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        reduced = theirs(x)
        assert torch.equal(theirs(x), reduced)
    close(reduced, expected)
    assert (reduced - dense).abs().max() > 1e-3 * dense.abs().max()
    assert torch.equal(theirs(x), dense)


@pytest.mark.parametrize("name", METHODS)
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
        close(theirs(images()), mambatrim.reduce(ours, schedule=STEPS)(images()))

    reg = MambaReg(MambaRegConfig(**sizes, registers=3)).eval()
    blocks = nn.ModuleList(TwoStreamBlock(Mamba(32, 4, bimamba_type="v2", if_divide_out=True), 32) for _ in range(6))
    blocks.load_state_dict(reg.layers.state_dict(), strict=True)
    trunk = nn.Module()
    trunk.layers, trunk.cls_positions = blocks, torch.tensor(reg.special_tokens())
    expected = mambatrim.reduce(reg, schedule=STEPS).forward_features(images())
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


@torch.no_grad()
def test_mambavision_stages(golden):
    file = golden("mambavision_e8_d1242_img64")
    model = VisionStages().eval()
    renamed = {"levels.2.blocks.": "levels.0.blocks.", "levels.3.blocks.": "levels.1.blocks."}
    state = {new + key: t for old, new in renamed.items() for key, t in file.part(f"state.{old}").items()}
    state["downsample.weight"] = file.tensors["state.levels.2.downsample.reduction.0.weight"]
    model.load_state_dict(state, strict=True)
    start, dense = file.tensors["stages.1.down"], file.tensors["stages.3.out"]
    close(model(start), dense, 1e-4)

    given = []
    probe = model.levels[0].blocks[1].mixer.register_forward_hook(lambda m, args, out: given.append((m, args[0])))
    model(start)
    probe.remove()
    found = adapters.MAMBAVISION.signals(*given[0], tuple(SIGNALS))
    close(found["dt"][:, 0].transpose(1, 2), file.tensors["blocks.2.1.delta"], 1e-4)
    close(found["y"][:, 0].transpose(1, 2), file.tensors["blocks.2.1.scan_out"], 1e-4)

    before = model(start)
    with mambatrim.attach(model, schedule=Schedule((0, 5, 0, 0, 1, 0)), adapter=MAMBAVISION):
        reduced = model(start)
    x = start.flatten(2).transpose(1, 2)  # a window is all of it
    blocks = model.levels[0].blocks
    x = blocks[0](x)
    steps = adapters.MAMBAVISION.signals(blocks[1].mixer, blocks[1].norm1(x), ("dt_mean",))["dt_mean"]
    x = blocks[1](x)
    signals = Signals(torch.ones(2, 16), torch.arange(16).expand(2, -1), (4, 4), {"hidden": x, "dt_mean": steps})
    plan = methods.get("mtr").plan(signals, 5)
    x = plan.unmerge(blocks[3](blocks[2](plan.merge(x, torch.ones(2, 16)))))
    x = model.downsample(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
    block, last = model.levels[1].blocks
    steps = adapters.MAMBAVISION.signals(block.mixer, block.norm1(x), ("dt_mean",))["dt_mean"]
    x = block(x)
    signals = Signals(torch.ones(2, 4), torch.arange(4).expand(2, -1), (2, 2), {"hidden": x, "dt_mean": steps})
    plan = methods.get("mtr").plan(signals, 1)
    x = plan.unmerge(last(plan.merge(x, torch.ones(2, 4))))
    close(reduced, x.transpose(1, 2).unflatten(2, (2, 2)))
    assert torch.equal(model(start), before)
    with pytest.raises(ValueError, match="block 3 has no scan"):
        mambatrim.attach(model, schedule=Schedule((0, 0, 0, 5, 0, 0)), adapter=MAMBAVISION)


# --------------------------------------------------------------------------------------------------- removal, refusals


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
    mambatrim.reduce(ours, schedule=STEPS)(x).sum().backward()
    close(theirs.layers[0].mixer.in_proj.weight.grad, ours.layers[0].mixer.in_proj.weight.grad, 1e-4)


@torch.no_grad()
def test_other_image_sizes_and_copies():
    _, theirs = pair()
    x = images()
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        reduced = theirs(x)
        twin = copy.deepcopy(theirs)
    assert torch.equal(twin(x), reduced) and not torch.equal(theirs(x), reduced)


@torch.no_grad()
def test_a_model_that_is_compiled_after_attaching_says_so():
    """Hooks inside a traced frame see nothing of each other: refused, not wrong."""
    _, theirs = pair()
    x = images()
    with mambatrim.attach(theirs, schedule=STEPS, adapter=OFFICIAL_VIM):
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=r"not under torch\.compile"):
            torch.compile(theirs, backend="eager")(x)
        torch._dynamo.reset()


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
    for title in ("Convert or attach your own model", "By hand"):
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert blocks, title
        scope: dict = {}
        for block in blocks:
            exec(compile(block, f"own-model.md, {title}", "exec"), scope)
        if title == "By hand":
            assert scope["x"].shape == scope["given"].shape
