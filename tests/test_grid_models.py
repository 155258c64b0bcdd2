"""PlainMamba, VMamba, LocalVMamba, MambaVision: against outputs of the official code, and what is promised of them."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mambatrim.models import checkpoint, localvmamba, mambavision, plainmamba, vmamba
from mambatrim.models.grid import GridModel
from mambatrim.models.layers import cast
from mambatrim.models.localvmamba import LocalVMamba, LocalVMambaConfig
from mambatrim.models.mambavision import MambaVision, MambaVisionConfig, WindowLevel
from mambatrim.models.orders import column_order, from_windows, local_order, row_order, snakes, to_windows
from mambatrim.models.plainmamba import PlainMamba, PlainMambaConfig
from mambatrim.models.vmamba import VMamba, VMambaConfig
from mambatrim.reduction import Tokens

ALL = ("update", "dt", "dt_mean", "y")
ENTRIES = {
    name: (family, spec)
    for family, module in (
        (PlainMamba, plainmamba),
        (VMamba, vmamba),
        (LocalVMamba, localvmamba),
        (MambaVision, mambavision),
    )
    for name, spec in module.VARIANTS.items()
}


class Compare:
    """Tensors against those of a fixture: within four times its own rounding error, or 1e-5 of the largest entry.

    Logits within 5e-6: their rounding error is about 1e-6, and mistakes are known that change them by 2e-5.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error = file.checks["max_abs_float32_minus_float64"]
        self.left = {name for name in file.tensors if not name.startswith("state.") and not name.endswith("input")}

    def __call__(self, name: str, actual: Tensor, expected: Tensor | None = None) -> None:
        self.left.discard(name)
        expected = self.file.tensors[name] if expected is None else expected
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
        own = self.error.get(name, max(self.error.values()))
        allowed = 5e-6 if "logits" in name else max(4 * own, 1e-5 * expected.abs().max().item())
        error = (actual - expected).abs().max().item()
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"

    def stored(self, name: str, actual: Tensor) -> None:
        """Compare where the fixture has it."""
        if name in self.file.tensors:
            self(name, actual)

    def equal(self, name: str, actual: Tensor) -> None:
        """Indices."""
        self.left.discard(name)
        assert torch.equal(actual, self.file.tensors[name]), name


def loaded(model: Any, file: Any) -> Any:
    """With the fixture's weights, as an official checkpoint is loaded."""
    model.load_state_dict(file.part("state."), strict=True)
    assert sum(p.numel() for p in model.parameters()) == file.checks["parameters"]
    return model.eval()


# --------------------------------------------------------------------------------------------------------- golden files


@pytest.mark.parametrize("name", ["mambavision_e8_d1242_img64", "mambavision_ls_e8_d1133_img112"])
@torch.no_grad()
def test_mambavision_is_the_official_one(golden, form, name):
    file = golden(name)
    c = file.config
    config = MambaVisionConfig(
        d_model=c["dim"],
        stem=c["in_dim"],
        depths=tuple(c["depths"]),
        heads=tuple(c["num_heads"][2:]),
        windows=tuple(c["window_size"][2:]),
        layer_scale=c["layer_scale"] is not None,
        num_classes=c["num_classes"],
    )
    model, compare = loaded(MambaVision(config), file), Compare(file)
    for of in ("", "second."):
        x = model.embed(file.tensors[f"{of}input"])
        compare.stored(f"{of}embed", x)
        for s, level in enumerate(model.stages()):
            grid, window = tuple(x.shape[2:]), isinstance(level, WindowLevel)
            whole = None if window else level(x)
            x = to_windows(x, level.window) if window else x
            for b, block in enumerate(level.blocks):
                here = f"{of}blocks.{s}.{b}."
                x, captured = block(x, None, ALL) if window else (block(x), {})
                compare.stored(f"{here}out", x)
                assert ("dt" in captured) == (f"{here}delta" in file.tensors)
                if "dt" in captured:
                    compare(f"{here}delta", captured["dt"][:, 0].transpose(1, 2))
                    compare(f"{here}mean of delta", captured["dt_mean"], captured["dt"].mean(-1))
                    compare.stored(f"{here}scan_out", captured["y"][:, 0].transpose(1, 2))
                if window:
                    compare.stored(f"{here}mixer", captured["update"])
            x = from_windows(x, level.window, grid) if window else x
            assert window or torch.equal(whole, x)
            compare(f"{of}stages.{s}.out", x)
            x = level.downsample(x)
            compare.stored(f"{of}stages.{s}.down", x)
        assert torch.equal(model.run(file.tensors[f"{of}input"], ())[0], x)
        compare.stored(f"{of}tokens", model.norm(x))
        compare(f"{of}features", model.norm(x).mean((2, 3)))
        compare(f"{of}logits", model(file.tensors[f"{of}input"]))
    assert not compare.left


def official(order: Any, reverse: bool) -> tuple[Tensor, Tensor]:
    """One of our orders as the fixtures store it: tokens in the order of the scan, -1 for padding; and the steps."""
    visits = torch.where(order.visits() == len(order.enter), -1, order.visits())
    return (visits.flip(0), order.steps - 1 - order.leave) if reverse else (visits, order.leave)


def orders_of(op: Any, grid: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    if isinstance(op, vmamba.CrossScan):
        return [official(order(grid), reverse) for reverse in (False, True) for order in (row_order, column_order)]
    return [official(local_order(name.removesuffix("_flip"), grid), name.endswith("_flip")) for name in op.names]


def compare_pyramid(model: Any, file: Any, channels_first: bool) -> None:
    compare = Compare(file)

    def there(key: str, image: Tensor) -> None:
        compare.stored(key, image.permute(0, 3, 1, 2) if channels_first else image)

    for of in ("", "second."):
        x = model.embed(file.tensors[f"{of}input"])
        there(f"{of}embed", x)
        for s, stage in enumerate(model.stages()):
            grid = tuple(x.shape[1:3])
            places = model.places(stage.blocks, Tokens.start(x.flatten(1, 2), grid))
            for b, block in enumerate(stage.blocks):
                here = f"{of}blocks.{s}.{b}."
                rows, captured = block(x.flatten(1, 2), places, ALL)
                x = rows.unflatten(1, grid)
                there(f"{here}out", x)
                there(f"{here}mixer", captured["update"].unflatten(1, grid))
                for k, (forward, leave) in enumerate(orders_of(block.op, grid)):
                    compare_direction(compare, here, f"{of}stages.{s}.", k, forward, leave, captured)
            there(f"{of}stages.{s}.out", x)
            x = stage.downsample(x)
            there(f"{of}stages.{s}.down", x)
        there(f"{of}tokens", model.classifier.norm(x))
        compare(f"{of}features", model.classifier.norm(x).mean((1, 2)))
        compare(f"{of}logits", model(file.tensors[f"{of}input"]))
    assert not compare.left


def compare_direction(
    compare: Compare, here: str, stage: str, k: int, forward: Tensor, leave: Tensor, captured: dict[str, Tensor]
) -> None:
    """Orders, time steps and scan outputs of direction k: stored are (B, 4, E, steps), in the order of the scan."""
    stored = compare.file.tensors
    for place in (stage, here):
        for name, order in (("forward", forward), ("inverse", leave), ("reverse", leave)):
            if f"{place}order.{k}.{name}" in stored:
                compare.equal(f"{place}order.{k}.{name}", order)
    if f"{here}delta" in stored:
        steps = torch.arange(len(forward))[forward >= 0]
        delta = stored[f"{here}delta"][:, k, :, steps].transpose(1, 2)
        compare(f"{here}delta", captured["dt"][:, k, forward[steps]], delta)
        compare(f"{here}mean {k}", captured["dt_mean"][:, k], captured["dt"][:, k].mean(-1))
    if f"{here}scan_out" in stored:
        out = stored[f"{here}scan_out"][:, k, :, leave].transpose(1, 2)
        compare(f"{here}scan_out", captured["y"][:, k], out)


@pytest.mark.parametrize(
    "name", ["vmamba_v2_s1_e8_d1232_img64", "vmamba_v2_s2_e8_d1232_img64", "vmamba_v0_e8_d1232_img64"]
)
@torch.no_grad()
def test_vmamba_is_the_official_one(golden, form, name):
    file = golden(name)
    c = file.config
    config = VMambaConfig(
        d_model=c["dims"][0],
        depths=tuple(c["depths"]),
        expand=int(c["ssm_ratio"]),
        d_state=c["ssm_d_state"],
        vanilla=c["forward_type"] == "v0",
        num_classes=c["num_classes"],
    )
    compare_pyramid(loaded(VMamba(config), file), file, channels_first=c["norm_layer"] == "ln2d")


def local_vmamba(file: Any) -> LocalVMamba:
    c = file.config
    config = LocalVMambaConfig(
        d_model=c["dims"][0],
        depths=tuple(c["depths"]),
        directions=tuple(map(tuple, c["directions"])),
        num_classes=c["num_classes"],
    )
    return loaded(LocalVMamba(config), file)


@torch.no_grad()
def test_localvmamba_is_the_official_one(golden, form):
    file = golden("localvmamba_e8_d1232_img56")
    compare_pyramid(local_vmamba(file), file, channels_first=False)


@torch.no_grad()
def test_padding_inside_a_window_order_has_a_time_step(golden):
    """Zeros come after convolution and SiLU: such a step has the time step of its bias alone."""
    file = golden("localvmamba_e8_d1232_img56")
    op = local_vmamba(file).stages()[2].blocks[0].op
    forward = file.tensors["blocks.2.0.order.2.forward"]
    delta = file.tensors["blocks.2.0.delta"][:, 2, :, : len(forward)][:, :, forward < 0]
    assert delta.shape[-1] == 49 - 16
    assert torch.allclose(delta, F.softplus(op.dt_projs_bias[2])[None, :, None].expand_as(delta), atol=1e-6)


@torch.no_grad()
def test_plainmamba_is_the_official_one(golden, form):
    file = golden("plainmamba_e32_d4_img64")
    c = file.config
    config = PlainMambaConfig(
        image_size=(c["img_size"], c["img_size"]),
        d_model=c["embed_dims"],
        depth=c["num_layers"],
        d_state=c["layer_cfgs"]["mamba_cfg"]["d_state"],
        stem_convolutions=c["num_convs_patch_embed"],
        convolved=tuple(c["layers_with_dwconv"]),
        num_classes=c["num_classes"],
    )
    model, compare = loaded(PlainMamba(config), file), Compare(file)
    x, grid = model.embed(file.tensors["input"])
    places = model.places(model.blocks(), Tokens.start(x, grid))
    visits, moves = snakes(grid)
    for i, layer in enumerate(model.blocks()):
        x, captured = layer(x, places, ("dt", "dt_mean", "hidden"))
        compare(f"layers.{i}.hidden", captured["hidden"])
        for k in range(4):  # step t has the time step of token t, and the input of token visits[t]
            compare(f"layers.{i}.delta", captured["dt"][:, k, visits[k]].transpose(1, 2))
        compare(f"layers.{i}.mean", captured["dt_mean"], captured["dt"].mean(-1))
    for of in ("", "second."):
        compare(f"{of}features", model.backbone.ln1(model.forward_features(file.tensors[f"{of}input"]).x).mean(1))
        compare(f"{of}logits", model(file.tensors[f"{of}input"]))
    for k in range(4):
        compare.equal(f"order.{k}.forward", visits[k])
        compare.equal(f"order.{k}.direction", moves[k])
        compare.equal(f"order.{k}.inverse", visits[k].argsort())
    assert not compare.left


@pytest.mark.parametrize("name", ENTRIES)
def test_published_keys_shapes_and_counts(golden_keys, name):
    family, spec = ENTRIES[name]
    with torch.device("meta"):
        model = family(spec.config)
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    entry = spec.checkpoint
    assert entry is not None and entry.entries == len(ours)
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    # trained on more data or for larger images: the same model
    stored = name.replace("_512", "").removesuffix("_21k")
    if "large3" not in name:
        assert ours == golden_keys(stored)["state"] and entry.parameters == golden_keys(stored)["num_parameters"]


# in G: published for VMamba and MambaVision, whose counts leave out the products of tokens with tokens
PUBLISHED = {
    "vmamba_tiny_s1l8": 4.88,
    "vmamba_tiny_s2l5": 4.82,
    "vmamba_small_s2l15": 8.67,
    "vmamba_small_s1l20": 8.57,
    "vmamba_base_s2l15": 15.29,
    "vmamba_base_s1l20": 15.16,
    "vanilla_vmamba_tiny": 5.60,
    "vanilla_vmamba_small": 11.18,
    "vanilla_vmamba_base": 17.95,
    "mambavision_tiny": 4.47,
    "mambavision_tiny2": 5.12,
    "mambavision_small": 7.50,
    "mambavision_base": 14.98,
    "mambavision_large": 34.88,
    "mambavision_large2": 37.55,
}
BOTH = {
    "mambavision_tiny": 4.58,
    "mambavision_tiny2": 5.25,
    "mambavision_small": 7.59,
    "mambavision_base": 15.19,
    "mambavision_large": 35.20,
    "plainmamba_l1": 3.01,
    "plainmamba_l2": 8.07,
    "plainmamba_l3": 14.43,
}


@pytest.mark.parametrize(("name", "convention"), [*((n, "paper") for n in PUBLISHED), *((n, "both") for n in BOTH)])
def test_flops_of_the_published_sizes(name, convention):
    family, spec = ENTRIES[name]
    with torch.device("meta"):
        model = family(spec.config)
    expected = (PUBLISHED if convention == "paper" else BOTH)[name]
    assert model.cost().total(convention) / 1e9 == pytest.approx(expected, abs=0.0051)


# ------------------------------------------------------------------------------------------- every family, at tiny size

_FOUR = ("h", "h_flip", "w2", "v"), ("v_flip", "w7", "w2_flip", "w7_flip"), ("h", "v", "w2", "w7"), ("h",) * 4
TINY = {
    "mambavision": lambda: MambaVision(
        MambaVisionConfig(
            **SMALL, d_model=16, stem=8, depths=(1, 1, 3, 2), heads=(2, 4), windows=(4, 2), layer_scale=True
        )
    ),
    "vmamba": lambda: VMamba(VMambaConfig(**SMALL, d_model=16, depths=(1, 1, 2, 1))),
    "vanilla": lambda: VMamba(VMambaConfig(**SMALL, d_model=16, depths=(1, 1, 2, 1), d_state=4, vanilla=True)),
    "localvmamba": lambda: LocalVMamba(
        LocalVMambaConfig(**SMALL, d_model=16, depths=(1, 1, 1, 1), d_state=4, directions=_FOUR)
    ),
    "plainmamba": lambda: PlainMamba(PlainMambaConfig(**SMALL, d_model=32, depth=3, d_state=4, convolved=(0,))),
}
SMALL = {"image_size": (48, 64), "num_classes": 10}


@pytest.fixture(params=TINY)
def tiny(request) -> GridModel:
    torch.manual_seed(0)
    model = TINY[request.param]()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            # away from symmetric values; variances and scales stay positive
            value.copy_(value.abs() + 0.1 if "running_var" in name else value + 0.05 * torch.randn_like(value))
    return model.eval()


def images(batch: int = 2, *sides: int) -> Tensor:
    return torch.randn(batch, 3, *(sides or SMALL["image_size"]), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_an_image_alone_and_in_a_batch(tiny):
    x = images(3)
    assert torch.allclose(tiny(x[1:2]), tiny(x)[1:2], atol=2e-6)


@torch.no_grad()
def test_any_image_size(tiny):
    for sides in ((48, 64), (33, 70), (64, 17)):
        assert tiny(images(1, *sides)).shape == (1, 10)
    sized = copy.deepcopy(tiny)
    sized.resize((64, 32))
    assert sized.sides() == (64, 32) and sized.config.sides == (64, 32)
    assert torch.allclose(sized(images(1, 64, 32)), tiny(images(1, 64, 32)), atol=1e-6)
    assert tiny.cost((64, 32)) == sized.cost()


@torch.no_grad()
def test_feature_maps_are_the_stream_behind_a_layer(tiny):
    count = len(tiny.layers_of_maps())
    maps = tiny.feature_maps(images(), range(count))
    assert len(maps) == count and maps[0].shape[0] == 2
    final = tiny.forward_features(images())
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), final.x) and maps[-1].shape[2:] == final.grid
    if not isinstance(tiny, PlainMamba):
        assert [m.shape[1] for m in maps] == [16, 32, 64, 128]
    with pytest.raises(ValueError, match="layers must be from 0 to"):
        tiny.feature_maps(images(), [count])


@torch.no_grad()
def test_bf16_is_near_fp32(tiny, form):
    exact, half = tiny(images()), copy.deepcopy(tiny)
    cast(half, torch.bfloat16)
    assert not any(buffer.dtype == torch.bfloat16 for buffer in half.buffers())
    assert half(images()).dtype == torch.float32
    assert (half(images()) - exact).abs().max() <= 0.05 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (tiny(images()) - exact).abs().max() <= 0.05 * exact.abs().max()


def test_gradients_reach_every_parameter(tiny, form):
    tiny.train()(images()).square().sum().backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_compiles_and_exports_whole(tiny):
    x, more = images(), images(5)
    with torch.no_grad():
        expected = tiny(x)
        compiled = torch.compile(tiny, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(tiny, (x,), dynamic_shapes={"images": {0: batch}}, strict=True)
        assert torch.allclose(program.module()(more), tiny(more), atol=1e-5)


@torch.no_grad()
def test_flops_by_closed_form_and_by_counter(tiny, monkeypatch):
    # the counter of torch does not know the matrix product of the other library
    monkeypatch.setattr(sys.modules["mambatrim.kernels.linear"], "_ONEDNN", False)
    with FlopCounterMode(display=False) as counter:
        tiny(images(1))
    counted = counter.get_total_flops() // 2
    gates = [0]  # the counter has a gate of E L for every scan

    def watch(module: nn.Module, inputs: Any, outputs: Any) -> None:
        shape = inputs[0].shape
        length = shape[:-1].numel()
        if isinstance(module, mambavision.MambaVisionMixer):
            gates[0] += length * module.D.numel()
        elif isinstance(module, plainmamba.SnakeMixer):
            # and the projection of the step size for each of the four
            gates[0] += 4 * length * module.D.numel() + 3 * length * module.dt_proj.weight.numel()
        else:
            gates[0] += 4 * length * module.d_inner

    mixers = (mambavision.MambaVisionMixer, plainmamba.SnakeMixer, vmamba.DirectedScan)
    hooks = [m.register_forward_hook(watch) for m in tiny.modules() if isinstance(m, mixers)]
    tiny(images(1))
    for hook in hooks:
        hook.remove()
    if isinstance(tiny, LocalVMamba):
        return  # its padding depends on the grid and is not in the closed form
    # nor does the counter see the products of attention on a CPU, which the published figures leave out too
    expected = tiny.cost().total("paper" if isinstance(tiny, MambaVision) else "both")
    assert counted == expected + gates[0]


def test_mistakes_are_named(tiny):
    with pytest.raises(ValueError, match="images must be"):
        tiny(torch.randn(3, 48, 64))
    with pytest.raises(ValueError, match="an input size is a side, or"):
        tiny.sides((1, 2, 3))
    if isinstance(tiny, LocalVMamba):
        with pytest.raises(ValueError, match="at least 4x4 pixels"):
            tiny(images(1, 3, 8))
        with pytest.raises(ValueError, match="directions must be 4"):
            LocalVMamba(LocalVMambaConfig())


# --------------------------------------------------------------------------------------------------- published files


def test_older_names_of_vmamba(tiny):
    """Files of the first generation and of models with the channels first have other names and shapes."""
    if not isinstance(tiny, VMamba):
        return
    state = tiny.state_dict()
    old: dict[str, Tensor] = {}
    for name, value in state.items():
        if tiny.config.vanilla:
            name = name.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
            name = name.removeprefix("classifier.")
            if ".blocks." in name:
                name = name.replace(".norm.", ".ln_1.").replace(".op.", ".self_attention.")
        elif value.dim() == 2 and name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
            value = value[:, :, None, None]
        old[name] = value
    assert set(old) != set(state) or any(old[name].shape != state[name].shape for name in old)
    back = vmamba.convert(old, tiny.config)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert all(torch.equal(value, state[name]) for name, value in vmamba.convert(state, tiny.config).items())


def test_wrapped_files_of_mambavision(tiny):
    if not isinstance(tiny, MambaVision):
        return
    state = tiny.state_dict()
    wrapped = {f"encoder.{n}": t for n, t in state.items() if not n.endswith("num_batches_tracked")} | {
        "other": images()
    }
    back = mambavision.convert(wrapped, tiny.config)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_weights_are_recognised_and_loaded_strictly(tiny):
    spec = next(s for f, s in ENTRIES.values() if f is type(tiny))
    assert checkpoint.detect_family(tiny.state_dict()) == (spec.family,)
    other = copy.deepcopy(tiny)
    for parameter in other.parameters():
        parameter.data.zero_()
    checkpoint.load(other, tiny.state_dict(), spec)
    assert torch.equal(other(images()), tiny(images()))
    short = dict(tiny.state_dict())
    first = next(iter(short))
    del short[first]
    with pytest.raises(ValueError, match="is missing"):
        checkpoint.load(other, short, spec)


# ----------------------------------------------------------------------------------------------------- orders, windows


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3), (7, 7), (14, 14)])
def test_orders_visit_every_place_once(grid):
    length = grid[0] * grid[1]
    for name in ("h", "v", "w2", "w7"):
        order = local_order(name, grid)
        visits = order.visits()
        assert visits[visits < length].sort().values.tolist() == list(range(length))
        assert torch.equal(visits[order.enter], torch.arange(length)) and order.steps == len(visits)
        assert order.leave.sort().values.tolist() == order.enter.sort().values.tolist()
        assert (grid[0] != grid[1] and name == "v") or torch.equal(order.leave, order.enter)
    visits, moves = snakes(grid)
    assert (visits.sort(dim=1).values == torch.arange(length)).all()
    steps = torch.stack([visits // grid[1], visits % grid[1]], dim=2).diff(dim=1)  # (4, L - 1, 2)
    assert (steps.abs().sum(2) == 1).all()  # a snake never jumps
    where = torch.tensor([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]])
    assert torch.equal(where[moves[:, 1:]], steps) and (moves[:, 0] == 0).all()


def test_only_some_steps_of_plainmamba_meet_their_own_time_step():
    visits, _ = snakes((14, 14))
    assert (visits == torch.arange(196)).sum(1).tolist() == [98, 0, 7, 7]


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 3), (8, 2)])
def test_windows_and_back(grid):
    x = torch.randn(2, 3, *grid)
    windows = to_windows(x, 4)
    assert windows.shape == (2 * -(-grid[0] // 4) * -(-grid[1] // 4), 16, 3)
    assert torch.equal(from_windows(windows, 4, grid), x)
    assert windows.abs().sum() == pytest.approx(x.abs().sum().item(), rel=1e-6)
