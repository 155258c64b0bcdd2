"""The released variants against the outputs of the published code: decisions exactly, values to rounding.

The files with whole models (ToP-ViM, R-MeeTo) lie beside the repository; the functions' own are in tests/golden.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mambatrim
from mambatrim import methods
from mambatrim.methods import released_tor
from mambatrim.methods.released_tor import CLIPPED
from mambatrim.models.videomamba import VideoMamba, VideoMambaConfig
from mambatrim.models.vim import Vim, VimConfig
from mambatrim.reduction import Assignment, Reducer, Schedule, Signals, Tokens, take_rows
from mambatrim.reduction.matching import cosine, even_odd, strongest
from mambatrim.reduction.scores import OUTPUT, Score, joined


def step(method, x: Tensor, size: Tensor, captured: dict[str, Tensor], r: int, special: tuple[int, ...] = ()) -> Tokens:
    """One step on given rows, as the reducer of a model does it."""
    batch, length, _ = x.shape
    tokens = Tokens(x, size, Assignment.identity(batch, length), (length - len(special),))
    return Reducer(method, Schedule((r,)), special)(0, tokens, captured)


def check(actual: Tensor, expected: Tensor, relative: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative * max(1.0, expected.abs().max().item())


# ------------------------------------------------------------------------------------------------------------- R-MeeTo

RMEETO = {
    "ordered": {},
    "unordered": {"order": methods.as_grouped},
    "even_length": {},
    "cls_first": {},
    "clamped": {},
    "long": {},
    "l1": {"distance": "l1"},
    "l2": {"distance": "l2"},
    "prune": {"combine": methods.pruned},
    "third_best": {"partner": 3},
    "mode_mean": {},
    "none": {},
}


@pytest.mark.parametrize("case", sorted(RMEETO))
def test_rmeeto_merge(golden, case):
    file = golden("rmeeto_merge")
    case_of, about = file.part(f"{case}."), file.config[case]
    (position,), r = (about["token_position"],), about["removed"]
    method = methods.rmeeto_released(**RMEETO[case])
    size = case_of["size"].squeeze(2)
    tokens = step(method, case_of["x"], size, {"update": case_of["metric"]}, r, (position,))
    assert int(tokens.origin.dest[0, position]) == int(case_of["position"][1])
    check(tokens.x, case_of["out"])
    if case != "mode_mean":  # there the code averages sizes too; ours count tokens
        check(tokens.size, case_of["out_size"].squeeze(2))
    equal_sizes = step(method, case_of["x"], torch.ones_like(size), {"update": case_of["metric"]}, r, (position,))
    check(equal_sizes.x, case_of["out_unit_size"])
    if r == 0:
        return
    patches = torch.tensor([i for i in range(case_of["x"].shape[1]) if i != position])
    source, target = patches[2 * case_of["src_idx"]], patches[2 * case_of["dst_idx"] + 1]
    dest, gone = tokens.origin.dest, tokens.x.shape[1]
    arrival = dest.gather(1, target)
    assert torch.equal(dest.gather(1, source), torch.full_like(arrival, gone) if case == "prune" else arrival)
    kept = torch.cat([patches[2 * case_of["unm_idx"]], patches[1::2].expand(len(dest), -1)], dim=1)
    expected = torch.cat([kept, torch.full_like(kept[:, :1], position)], dim=1).sort(dim=1).values
    assert torch.equal(tokens.origin.keep.sort(dim=1).values, expected)


def official(file, state=None, family=(Vim, VimConfig)):
    c, (model, config) = file.config, family
    built = model(
        config(
            image_size=(c["img_size"], c["img_size"]),
            patch=c["patch_size"],
            stride=c["patch_size"],
            d_model=c["embed_dim"],
            depth=c["depth"],
            d_state=c.get("d_state", 16),
            num_classes=c["num_classes"],
        )
    )
    built.load_state_dict((file if state is None else state).part("state."), strict=True)
    return built.eval()


def rmeeto_run(model, images: Tensor, config: dict) -> tuple[Tensor, Tokens, tuple[int, ...]]:
    """Logits, last tokens and token counts under the settings of a fixture."""
    method = methods.rmeeto_released(
        feature={"X": "update"}.get(config["metric"], config["metric"]),
        distance=config["distance"],
        combine=methods.pruned if config["if_prune"] else methods.merged,
        order=methods.restored if config["if_order"] else methods.as_grouped,
    )
    schedule = methods.rmeeto_released_schedule(
        model.depth,
        model.num_patches(),
        config["num_prune"],
        config["merge_interval"],
        config["if_merge_odd"],
        config.get("compare"),
    )
    fast = mambatrim.reduce(model, schedule=schedule, method=method)
    tokens = fast.forward_features(images)
    return fast.forward_head(tokens), tokens, fast.reducer.lengths(model.num_patches() + 1)


def tolerance(file) -> float:
    return 4 * max(file.checks["max_abs_float32_minus_float64"].values())


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("rmeeto_vim_e32_d4_img64", "rmeeto_vim_e32_d4_img64"),
        ("rmeeto_vim_e24_d24_img224", "vim_e24_d24_img224"),
        ("rmeeto_videomamba_image_e32_d4_img64", "rmeeto_videomamba_image_e32_d4_img64"),
    ],
)
@torch.no_grad()
def test_rmeeto_models(golden, name, state):
    file, weights = golden(name), golden(state)
    video = "videomamba" in name
    model = official(file, weights, (VideoMamba, VideoMambaConfig) if video else (Vim, VimConfig))
    images = weights.tensors["input"]
    logits, tokens, counts = rmeeto_run(model, images, file.config)
    assert (logits - file.tensors["logits"]).abs().max() <= tolerance(file)
    assert list(counts) == file.checks["token_counts"]
    check(tokens.size, file.tensors["merge.final_size"].squeeze(2))
    count, position = file.tensors["merge.final"].tolist()
    assert tokens.x.shape[1] == count
    assert (tokens.where(model.special_tokens()) == position).all()
    check(model.norm_f(tokens.x), file.tensors["tokens"], 1e-5)
    tried = 0
    for variant, about in file.checks["variants"].items():
        config = {**file.config, **about["config"]}
        if config["metric"] == "delta":  # before bias and softplus: not one of our signals
            continue
        stored = file.part(f"variants.{variant}.")
        logits, _, counts = rmeeto_run(model, images, config)
        assert list(counts) == stored["token_counts"].tolist(), variant
        assert (logits - stored["logits"]).abs().max() <= tolerance(file), variant
        tried += 1
    assert tried == {4: 1 if video else 9, 24: 2}[model.depth]


# ------------------------------------------------------------------------------------------------------------- ToP-ViM


@torch.no_grad()
def test_topvim(golden):
    file = golden("topvim_e32_d11_img64")
    model = official(file)
    schedule = methods.hsa_released_schedule(11, 16, after=(4, 9))
    assert schedule.lengths(16) == tuple(count - 1 for count in file.checks["token_counts"])
    assert methods.hsa_released_schedule(24, 196).lengths(196)[5::5] == (156, 124, 100, 100)
    fast = mambatrim.reduce(model, schedule=schedule, method="hsa_released")
    assert (fast(file.tensors["input"]) - file.tensors["logits"]).abs().max() <= tolerance(file)
    check(model.norm_f(fast.forward_features(file.tensors["input"]).x), file.tensors["tokens"], 1e-5)
    kept: dict[int, Tensor] = {}
    tokens = fast.embed(file.tensors["input"])
    for i, layer in enumerate(model.layers):
        x, captured = layer(tokens.x, fast.reducer.needs(i))
        before = tokens.origin
        tokens = fast.reducer(i, tokens.with_x(x), captured)
        if tokens.origin is not before:
            kept[i] = before.dest.gather(1, tokens.origin.keep)
            assert torch.equal(kept[i], file.tensors[f"prune.{i}.kept"])
    assert sorted(kept) == [4, 9]
    # in a batch the code is right about the class token of the first image alone
    both = file.part("batch2.")
    assert (fast(both["input"])[0] - both["logits"][0]).abs().max() <= tolerance(file)


# ------------------------------------------------------------------------------------------------------------- ToR_SSM

RAW = joined("update")
TOR = ("n16_keep12", "n16_keep15", "n16_keep4", "n17_keep12")


def tor_step(method, values: Tensor, score: Tensor, r: int) -> Tensor:
    batch, length, _ = values.shape
    return step(method, values, torch.ones(batch, length), {"update": score}, r).x


@pytest.mark.parametrize("case", TOR)
@pytest.mark.parametrize("function", ["pumer", "merge_only", "prune_only"])
def test_tor_ssm(golden, case, function):
    """`values` are merged or pruned by `score`; both streams of the code take the same step."""
    file = golden("tor_ssm")
    values, score, out = (file.tensors[f"{case}{n}"] for n in (".values", ".score", f"_short.{function}.out"))
    method = {
        "pumer": methods.pumer_released,
        "merge_only": methods.utr_released_merge,
        "prune_only": methods.utr_released_prune,
    }[function](RAW)
    check(tor_step(method, values, score, values.shape[1] - out.shape[1]), out)


@pytest.mark.parametrize("case", TOR)
def test_tor_ssm_hybrid(golden, case):
    """Which rows keep their size is the kernel's choice in the code: the stored one is given."""
    file = golden("tor_ssm")
    values, score, rows = (file.tensors[f"{case}.{n}"] for n in ("values", "score", "hybrid_size_rows"))
    out = file.tensors[f"{case}_short.hybrid.out"]
    ids = torch.arange(values.shape[1]).expand(len(values), -1)
    signals = Signals(torch.ones(ids.shape), ids, (values.shape[1],), {"update": score})
    plan = methods.utr_released(feature=RAW).plan(signals, values.shape[1] - out.shape[1])
    plan.check()
    check(released_tor._hybrid(values, plan, rows), out)


@pytest.mark.parametrize("case", [*TOR, "n16_keep16"])
def test_tor_ssm_evit(golden, case):
    """The lowest scores stay, one token more than was asked for: the schedule's count is the code's less one."""
    file = golden("tor_ssm")
    values, score = file.tensors[f"{case}.values"], file.tensors[f"{case}.evit_score"].unsqueeze(2)
    out = file.tensors[f"{case}_short.evit.out"]
    r = values.shape[1] - out.shape[1]
    assert r == max(0, values.shape[1] - int(case.partition("keep")[2]) - 1)
    assert torch.equal(tor_step(methods.evit_released(), values, score, r), out)


@pytest.mark.parametrize("metric", ["clip", "noclip"])
@pytest.mark.parametrize("name", ["evit", "pumer", "prune_only", "merge_only", "hybrid", "default"])
def test_tor_ssm_on_two_streams(golden, name, metric):
    """Hidden states and residual of the code are the update and the rest of our stream; their sum is what is left."""
    file = golden("tor_ssm").part("wrap.")
    hidden, residual = file["hidden"], file["residual"]
    on_hidden, on_residual = ("hybrid", "merge_only") if name == "default" else (name, name)
    expected = file[f"{on_hidden}_{metric}.hidden_out"] + file[f"{on_residual}_{metric}.residual_out"]
    feature, score = (CLIPPED, OUTPUT) if metric == "clip" else (RAW, SUM)
    method = {
        "evit": lambda: methods.evit_released(score),
        "pumer": lambda: methods.pumer_released(feature),
        "prune_only": lambda: methods.utr_released_prune(feature),
        "merge_only": lambda: methods.utr_released_merge(feature),
        "hybrid": lambda: methods.utr_released("hybrid", "hybrid", feature),
        "default": lambda: methods.utr_released(feature=feature),
    }[name]()
    check(tor_step(method, hidden + residual, hidden, hidden.shape[1] - expected.shape[1]), expected)


SUM = Score("sum", ("update",), lambda signals: signals.update.sum(dim=2), lambda d_model, d_inner: d_model)


# ---------------------------------------------------------------------------------------------------------------- ToMe


@pytest.mark.parametrize("case", ["no_cls", "odd"])
def test_tome_without_a_class_token(golden, case):
    """Our ToMe on patches is the code's without a class token, in the order that it leaves them in."""
    file = golden("tome_merge")
    stored, r = file.part(f"{case}."), file.config[case]["removed"]
    size = stored["size"].squeeze(2)
    tokens = step(methods.tome(order=methods.as_grouped), stored["x"], size, {"hidden": stored["metric"]}, r)
    check(tokens.x, stored["out"])
    check(tokens.size, stored["out_size"].squeeze(2))
    check(tokens.dense(), stored["unmerged"])
    source = torch.nn.functional.one_hot(tokens.origin.dest, tokens.x.shape[1]).transpose(1, 2)
    assert torch.equal(source.float(), stored["source"])
    ordered = step(methods.tome(), stored["x"], size, {"hidden": stored["metric"]}, r)
    assert torch.equal(ordered.origin.keep, tokens.origin.keep.sort(dim=1).values)
    check(take_rows(tokens.x, tokens.origin.keep.argsort(dim=1)), ordered.x, 0)


@pytest.mark.parametrize("case", ["cls", "distill", "clamped", "long"])
def test_tome_matching_with_protected_tokens(golden, case):
    """With protected tokens first, which our methods never see, the same matching gives the same links and means."""
    file = golden("tome_merge")
    stored, about = file.part(f"{case}."), file.config[case]
    batch, length, _ = stored["x"].shape
    even, odd = even_odd(batch, length)
    distilled = int(about.get("distill_token", False))
    source, target = even[:, 1:], odd[:, distilled:]
    sources, targets = strongest(source, cosine(stored["metric"], source, target), about["removed"])
    assert torch.equal(sources, 2 * stored["src_idx"])
    assert torch.equal(targets, 2 * stored["dst_idx"] + 1)
    # the order of the code: class token, distillation token, the other even tokens, the other odd ones
    unmerged = 2 * stored["unm_idx"]
    listed = torch.cat([unmerged[:, :1], odd[:, :distilled], unmerged[:, 1:], odd[:, distilled:]], dim=1)
    key = torch.zeros(batch, length, dtype=torch.long).scatter(
        1, listed, torch.arange(listed.shape[1]).expand_as(listed)
    )
    plan = Assignment.from_links(sources, targets, length).arrange(key)
    assert torch.equal(plan.keep, listed)
    size = stored["size"].squeeze(2)
    check(plan.merge(stored["x"], size), stored["out"])
    check(plan.sum(size), stored["out_size"].squeeze(2))
    check(plan.merge(stored["x"], torch.ones_like(size)), stored["out_unit_size"])
    if not distilled:  # the code's unmerge forgets that it moved the distillation token
        check(plan.unmerge(stored["out"]), stored["unmerged"])
