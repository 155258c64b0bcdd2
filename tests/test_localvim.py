"""LocalVim against outputs of the official code, and what becomes of its orders, gate and rotation when tokens go."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mambatrim
from mambatrim import Schedule
from mambatrim.models import checkpoint
from mambatrim.models.layers import cast
from mambatrim.models.localvim import VARIANTS, LocalVim, LocalVimConfig
from mambatrim.models.orders import local_order, walk
from mambatrim.reduction import Assignment, Tokens

NAMES = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")
STEPS = Schedule((3, 0, 5, 0))
_LISTS = ("h", "v_flip", "w2", "w7_flip"), ("h_flip", "v", "w2_flip", "w7"), ("h", "h_flip", "v", "w2"), NAMES[4:]


def from_fixture(file: Any) -> LocalVim:
    c = file.config
    config = LocalVimConfig(
        image_size=(c["img_size"], c["img_size"]),
        patch=c["patch_size"],
        stride=c["patch_size"],
        d_model=c["embed_dim"],
        depth=c["depth"],
        num_classes=c["num_classes"],
        directions=tuple(map(tuple, c["directions"])),
        class_token=c.get("if_cls_token", False),
    )
    model, state = LocalVim(config).eval(), file.part("state.")
    for name, table in model.named_buffers():
        if name in state:  # made, and then loaded: both are the official tables
            assert (table - state[name]).abs().max() <= 1e-6
    model.load_state_dict(state, strict=True)
    return model


def tiny(class_token: bool = False, **changes: Any) -> LocalVim:
    torch.manual_seed(0)
    config = LocalVimConfig(
        **{"image_size": (32, 32), "patch": 4, "stride": 4, "d_model": 32, "depth": 4, "d_state": 4, "num_classes": 10}
        | {"directions": _LISTS, "class_token": class_token}
        | changes
    )
    model = LocalVim(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def images(batch: int = 2, *sides: int) -> Tensor:
    return torch.randn(batch, 3, *(sides or (32, 32)), generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------------- golden files


@pytest.mark.parametrize(
    "name",
    [
        "localvim_e24_d3_img56",
        "localvim_mid_e24_d3_img56",
        "localvim_e24_d3_img32",
        "localvim_mid_e24_d3_img32",
    ],
)
@torch.no_grad()
def test_localvim_is_the_official_one(golden, form, name):
    file = golden(name)
    model, stored = from_fixture(file), file.tensors
    error = file.checks["max_abs_float32_minus_float64"]
    left = {key for key in stored if not key.startswith("state.") and not key.endswith("input")}

    def check(key: str, actual: Tensor, expected: Tensor) -> None:
        left.discard(key)
        # mistakes are known that change a logit by 2e-5 where its own error is 1e-6
        bound = 5e-6 if "logits" in key else max(4 * error["any"], 1e-5 * expected.abs().max().item())
        difference = (actual - expected).abs().max().item()
        assert actual.shape == expected.shape and difference <= bound, f"{key}: {difference:.2e} > {bound:.2e}"

    for of in ("", "second.") if "second.input" in stored else ("",):
        tokens = model.embed(stored[f"{of}input"])
        places = model.places(tokens)
        for i, layer in enumerate(model.blocks()):
            here = f"{of}layers.{i}."
            if f"{here}residual" in stored:
                check(f"{here}residual", places.rotate(tokens.x), stored[f"{here}residual"])
            x, captured = layer(tokens.x, places, ("update", "dt", "dt_mean", "y_gated"))
            check(f"{here}hidden", captured["update"], stored[f"{here}hidden"])
            for j, direction in enumerate(layer.mixer.directions):
                way = places.walks[direction]
                forward, reverse = (f"{here}order.{j}.{word}" for word in ("forward", "reverse"))
                visits = torch.where(way.visits[0] == x.shape[1], -1, way.visits[0])
                last = len(visits) - 1
                assert torch.equal(visits.flip(0) if way.reverse else visits, stored[forward])
                assert torch.equal(last - way.leave[0] if way.reverse else way.leave[0], stored[reverse])
                left -= {forward, reverse}
                if f"{here}delta.{j}" in stored:  # (B, E, steps), in the order of the scan
                    steps = torch.arange(len(visits))[stored[forward] >= 0]
                    delta = stored[f"{here}delta.{j}"][:, :, steps].transpose(1, 2)
                    check(f"{here}delta.{j}", captured["dt"][:, j, stored[forward][steps]], delta)
                    check(f"{here}mean.{j}", captured["dt_mean"][:, j], captured["dt"][:, j].mean(-1))
                if f"{here}scan_out.{j}" in stored:
                    out = stored[f"{here}scan_out.{j}"][:, :, stored[reverse]].transpose(1, 2)
                    check(f"{here}scan_out.{j}", captured["y_gated"][:, j], out)
            tokens = tokens.with_x(x)
        if not of:
            check("tokens", model.norm_f(tokens.x), stored["tokens"])
        check(f"{of}features", model.pool(tokens), stored[f"{of}features"])
        check(f"{of}logits", model(stored[f"{of}input"]), stored[f"{of}logits"])
    assert not left


@pytest.mark.parametrize("name", VARIANTS)
def test_published_keys_shapes_and_counts(golden_keys, name):
    with torch.device("meta"):
        model = LocalVim(VARIANTS[name].config)
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == golden_keys(name)["state"]
    entry = VARIANTS[name].checkpoint
    assert entry is not None and entry.entries == len(ours)
    assert entry.parameters == sum(p.numel() for p in model.parameters()) == golden_keys(name)["num_parameters"]
    assert checkpoint.detect_family(model.state_dict()) == (VARIANTS[name].family,)
    assert len(model.config.directions) == 20 and all(set(four) <= set(NAMES) for four in model.config.directions)


@pytest.mark.parametrize(("name", "paper"), [("local_vim_tiny", 1.482), ("local_vim_small", 4.771)])
def test_flops_of_the_published_sizes(name, paper):
    with torch.device("meta"):
        model = LocalVim(VARIANTS[name].config)
    assert mambatrim.count_flops(model, convention="paper").total / 1e9 == pytest.approx(paper, abs=0.0005)


# ------------------------------------------------------------------------------------------------------------ reduction


@pytest.mark.parametrize("grid", [(8, 8), (5, 8), (3, 3), (1, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_an_order_of_survivors_is_the_whole_order_without_the_others(grid, name):
    length = grid[0] * grid[1]
    survivors = torch.arange(length)[torch.rand(length, generator=torch.Generator().manual_seed(3)) < 0.6]
    if len(survivors) == 0:
        survivors = torch.tensor([0])
    order = local_order(name.removesuffix("_flip"), grid)
    way = walk(name, grid, survivors[None], None)
    whole = order.visits().tolist()
    here = {int(token): position for position, token in enumerate(survivors)}
    # padding stays, what is gone goes, the rest keeps its order
    expected = [here.get(token, len(survivors)) for token in whole if token in here or token == length]
    assert way.visits[0].tolist() == expected
    leaving = sorted(range(len(survivors)), key=lambda p: int(order.leave[survivors[p]]))
    assert [int(way.leave[0, p]) for p in leaving] == sorted(int(s) for s in way.enter[0])
    assert way.reverse == name.endswith("_flip")


def test_everywhere_the_class_token_is_in_the_middle():
    """At index (L - 1) // 2 of every sequence, as it is scanned, also where patches are gone."""
    grid, middle = (5, 6), 15
    for survivors in (list(range(31)), [0, 3, 4, 8, 15, 16, 30], [15, 20, 21, 22], [2, 15]):
        origin = torch.tensor([survivors])
        patch = torch.where(origin > middle, origin - 1, origin)
        for name in NAMES:
            way = walk(name, grid, patch, origin == middle)
            seen = way.visits[0].flip(0) if way.reverse else way.visits[0]
            assert int((seen == survivors.index(middle)).nonzero()) == (len(survivors) - 1) // 2
            without = walk(name, grid, patch[origin != middle][None], None)
            tokens = [t - (t > survivors.index(middle)) for t in way.visits[0].tolist() if t != survivors.index(middle)]
            assert tokens == without.visits[0].tolist()


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_nothing_to_remove_is_bit_identical(class_token):
    model = tiny(class_token)
    assert torch.equal(mambatrim.reduce(model, flops_reduction=0)(images()), model(images()))


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_the_predicted_counts_are_executed(class_token):
    model = tiny(class_token)
    fast, seen = mambatrim.reduce(model, schedule=STEPS), []
    hooks = [b.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1])) for b in fast.blocks()]
    tokens = fast.forward_features(images())
    for hook in hooks:
        hook.remove()
    assert tuple(seen) == mambatrim.count_flops(fast).lengths
    assert seen[0] == 64 + class_token and seen[-1] == seen[0] - 8
    assert (tokens.size.sum(1) == tokens.origin.length).all()
    if class_token:
        assert (tokens.size.gather(1, tokens.where((32,))) == 1).all()


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_an_image_is_reduced_alike_alone_and_in_a_batch(class_token):
    fast = mambatrim.reduce(tiny(class_token), schedule=STEPS)
    together = fast.forward_features(images(3))
    for i in range(3):
        alone = fast.forward_features(images(3)[i : i + 1])
        assert torch.equal(alone.origin.dest[0], together.origin.dest[i])
        assert torch.allclose(alone.x[0], together.x[i], atol=1e-5)


@torch.no_grad()
def test_tokens_that_are_merged_alike_change_no_mean():
    """Twins merged into one count twice: gate and pooling see what they saw."""
    model = tiny()
    tokens = model.embed(images())
    x = tokens.x.clone()
    x[:, 5] = x[:, 9]
    twins = Tokens(x, tokens.size, tokens.origin, tokens.grid)
    step = Assignment.from_links(torch.full((2, 1), 5), torch.full((2, 1), 9), 64)
    merged = twins.reduce(step, twins.size)
    assert merged.x.shape[1] == 63 and (merged.size.max(1).values == 2).all()
    assert torch.allclose(model.pool(merged), model.pool(twins), atol=1e-6)
    gate = model.blocks()[0].mixer.attn
    inner = torch.randn(2, 64, 64)
    inner[:, 5] = inner[:, 9]
    whole = gate(inner, model.places(twins).share)
    assert torch.allclose(gate(step.select(inner), model.places(merged).share), step.select(whole), atol=1e-6)


@torch.no_grad()
def test_survivors_keep_their_own_rotation():
    model = tiny()
    tokens = model.embed(images())
    keep = torch.tensor([[3, 10, 11, 40, 63], [0, 1, 2, 30, 31]])
    fewer = tokens.reduce(Assignment.from_keep(keep, 64), tokens.size)
    rotated = model.places(tokens).rotate(tokens.x)
    assert torch.equal(model.places(fewer).rotate(fewer.x), rotated.gather(1, keep[..., None].expand(-1, -1, 32)))


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_signals_agree_with_each_other(class_token, form):
    model = tiny(class_token)
    tokens = model.embed(images())
    names = ("hidden", "update", "dt", "dt_mean", "B", "C", "y", "y_gated")
    for layer in model.blocks():
        places = model.places(tokens)
        x, captured = layer(tokens.x, places, names)
        assert tuple(sorted(captured)) == tuple(sorted(names)) and layer(tokens.x, places)[1] == {}
        length = 64 + class_token
        assert captured["dt"].shape == captured["y"].shape == (2, 4, length, 64)
        assert captured["B"].shape == captured["C"].shape == (2, 4, length, 4)
        assert torch.allclose(captured["dt"].mean(-1), captured["dt_mean"], rtol=1e-5)
        gated = sum(layer.mixer.attn(captured["y_gated"][:, j], places.share) for j in range(4))
        assert torch.allclose(layer.mixer.out_proj(gated), captured["update"], atol=1e-5)
        assert torch.equal(captured["hidden"], x)


@torch.no_grad()
def test_time_steps_of_all_directions_stand_at_their_tokens():
    """Without taps that look aside, a token's time step depends on that token alone, in every direction."""
    model = tiny()
    mixer = model.blocks()[0].mixer
    for j in range(4):
        mixer.get_parameter(f"conv1d_{j}.weight")[:, :, :-1] = 0
    tokens = model.embed(images())
    places = model.places(tokens)
    x = torch.randn(2, 64, 32)
    other = x.clone()
    other[:, 17] += 1
    before, after = (mixer(value, places, ("dt_mean",))[1]["dt_mean"] for value in (x, other))
    changed = ((before - after).abs() > 1e-6).any(0)  # (S, L)
    assert changed[:, 17].all() and changed.sum() == 4


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_feature_maps_have_every_token_s_row_where_it_belongs(class_token):
    model = tiny(class_token)
    fast = mambatrim.reduce(model, schedule=STEPS)
    whole, few = fast.forward_features(images(), unmerge=True), fast.forward_features(images())
    assert whole.x.shape[1] == 64 + class_token
    assert torch.allclose(fast.forward_head(whole), fast.forward_head(few), atol=1e-6)
    first, last = fast.feature_maps(images(), layers=[0, 3])
    assert first.shape == last.shape == (2, 32, 8, 8)


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_another_input_size_in_passing_and_for_good(class_token):
    model = tiny(class_token)
    x = images(2, 38, 22)  # no multiple of the patch: filled up
    assert model.num_patches((38, 22)) == 60 and model.embed(x).grid == (10, 6)
    sized = copy.deepcopy(model)
    sized.resize((38, 22))
    assert torch.allclose(sized(x), model(x), atol=1e-6)
    fresh = LocalVim(sized.config)
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in sized.state_dict().items()}
    fast = mambatrim.reduce(sized, schedule=STEPS)
    assert torch.isfinite(fast(x)).all()


@torch.no_grad()
def test_bf16_is_near_fp32(form):
    model = tiny(d_model=64)
    half, exact = copy.deepcopy(model), model(images())
    cast(half, torch.bfloat16)
    assert half.embed(images()).x.dtype == half(images()).dtype == torch.float32
    assert (half(images()) - exact).abs().max() <= 0.05 * exact.abs().max()
    assert torch.isfinite(mambatrim.reduce(half, schedule=STEPS)(images())).all()


def test_gradients_reach_every_parameter(form):
    for class_token in (False, True):
        model = tiny(class_token).train()
        model(images()).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("class_token", [False, True])
@torch.no_grad()
def test_compiles_and_exports_whole(class_token):
    fast = mambatrim.reduce(tiny(class_token), schedule=STEPS)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images()), fast(images()), atol=1e-5)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (images(),), dynamic_shapes={"images": {0: batch}}, strict=True)
    assert torch.allclose(program.module()(images(5)), fast(images(5)), atol=1e-5)


@torch.no_grad()
def test_a_share_of_the_flops_is_saved():
    with torch.device("meta"):
        model = LocalVim(VARIANTS["local_vim_tiny"].config)
    fast = mambatrim.reduce(model, flops_reduction=0.4)
    assert mambatrim.count_flops(fast).ratio == pytest.approx(0.6, abs=0.005)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="directions must be 4 for each of 4 layers"):
        tiny(directions=_LISTS[:2])
    with pytest.raises(ValueError, match="images must be"):
        tiny()(torch.randn(3, 32, 32))
