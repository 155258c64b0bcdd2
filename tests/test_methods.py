"""Every method of the registry: what its plans guarantee, on any scores, and that it does what its paper says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mambatrim
from mambatrim import methods
from mambatrim.models.vim import Vim, VimConfig
from mambatrim.reduction import SIGNALS, Assignment, Method, Reducer, Schedule, Signals, Tokens, matching, scores

settings.register_profile("mambatrim", deadline=None, max_examples=40)
settings.load_profile("mambatrim")

NAMES = sorted(methods.METHODS)
EVERY_METHOD = pytest.mark.parametrize("name", NAMES)
# every option that a factory has beside its default, as the ablations of the papers use them
ABLATIONS: dict[str, Method] = {
    "forward delta": methods.mtr(methods.delta(methods.forward)),
    "backward delta": methods.mtr(methods.delta(methods.backward)),
    "B": methods.mtr(methods.scan_score("B")),
    "C": methods.mtr(methods.scan_score("C")),
    "class token": methods.mtr(methods.CLASS_TOKEN),
    "random score": methods.mtr(methods.random_score(3)),
    "centrality": methods.mtr(methods.CENTRALITY),
    "mtr prunes": methods.mtr(combine=methods.pruned),
    "mtr plain": methods.mtr(weight=methods.plain),
    "mtr without reordering": methods.mtr(order=methods.as_grouped),
    "mtr symmetric": methods.mtr(groups=methods.EVEN_ODD),
    "mtr all others": methods.mtr(groups=methods.by_rank(methods.all_others)),
    "mtr lowest half": methods.mtr(groups=methods.by_rank(methods.all_others, methods.lowest_half)),
    "mtr centred": methods.mtr(place=methods.centre),
    "mtr proportional": methods.mtr(place=methods.proportional),
    "tome unordered": methods.tome(order=methods.as_grouped),
    "tome windows": methods.tome(split=methods.WINDOWS, weight=methods.plain),
    "rmeeto B l1": methods.rmeeto("B", "l1"),
    "rmeeto C l2": methods.rmeeto("C", "l2", order=methods.as_grouped),
    "rmeeto delta third": methods.rmeeto("dt", partner=3),
    "rmeeto prunes": methods.rmeeto(combine=methods.pruned, weight=methods.plain),
    "rmeeto released unordered": methods.rmeeto_released("B", order=methods.as_grouped),
    "famba unordered": methods.famba(methods.as_grouped),
    "pumer prunes": methods.pumer(methods.pruned),
    "hsa backward": methods.hsa(methods.backward, methods.mean, methods.centre),
    "topk norm": methods.topk(methods.NORM),
    "utr hybrid": methods.utr("hybrid", "hybrid"),
    "utr prune, merge": methods.utr("prune", "merge", "update"),
    "stm unprotected": methods.stm(0),
    "stm protected": methods.stm(2, "update"),
    "dpcknn centres": methods.dpcknn(rest=methods.members_dropped),
    "vsm in rounds": methods.vsm(grouping=methods.IN_ROUNDS),
    "vsm in rounds, by features alone": methods.vsm(distance=0, rows=0, grouping=methods.IN_ROUNDS),
    "kmedoids centres": methods.kmedoids(rest=methods.members_dropped, start=methods.NORM, steps=1),
}
ALL: dict[str, Method] = {**{name: methods.get(name) for name in NAMES}, **ABLATIONS}
UNORDERED = {name for name in ALL if "unordered" in name or "without reordering" in name} | {"rmeeto C l2"}


def some_values(kind: str, seed: int, batch: int, length: int) -> dict[str, Tensor]:
    """Every signal: random, of few different values (ties), or the same for all tokens."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: (6,) if axis == 1 else (2, 5) for name, axis in SIGNALS.items()}
    values = {}
    for name, (*directions, channels) in shapes.items():
        shape = (batch, *directions, length, channels)
        x = torch.randn(shape, generator=g)
        if kind == "ties":
            x = torch.randint(-1, 2, shape, generator=g).float()
        if kind == "constant":
            x = torch.full(shape, 0.5)
        values[name] = x.abs() if name == "dt" else x
    values["dt_mean"] = values["dt"].mean(-1)
    return values


CASES = st.tuples(
    st.sampled_from(["random", "ties", "constant"]),
    st.integers(0, 2**16),
    st.integers(1, 4),
    st.integers(1, 14),
    st.integers(0, 3),
)


@pytest.mark.parametrize("name", sorted(ALL))
@settings(max_examples=25)
@given(case=CASES, data=st.data())
def test_plans_keep_their_promises(name, case, data):
    """Counts, order, special tokens, conserved size, weights: of every method and ablation, on any scores."""
    kind, seed, batch, patches, count = case
    method, g = ALL[name], torch.Generator().manual_seed(seed)
    count = max(count, int("special" in method.needs))
    length = patches + (count if is_exact(method) else min(count, 1))
    special = tuple(torch.randperm(length, generator=g)[: length - patches].tolist())
    r = data.draw(st.integers(0, method.most(patches)))
    size = torch.randint(1, 4, (batch, length), generator=g).float()
    values = some_values(kind, seed, batch, length)
    start = Tokens(values["hidden"], size, Assignment.identity(batch, length), (patches,))
    after = Reducer(method, Schedule((r,)), special)(0, start, values)
    step = after.origin
    assert after.x.shape == (batch, length - r, 6) and torch.isfinite(after.x).all()
    step.arrange(torch.arange(length).expand(batch, -1)).check()
    kept = step.keep
    if name not in UNORDERED and is_exact(method):
        assert (kept.diff(dim=1) > 0).all()
    if special:
        assert torch.equal(after.take(special), values["hidden"][:, list(special)])  # alone, and untouched
        for token in special:
            assert ((kept == token).sum(1) == 1).all()
    for image in range(batch):
        for new in range(length - r):
            assert after.size[image, new] == size[image, step.dest[image] == new].sum()
    if (step.dest < length - r).all():
        assert torch.equal(after.size.sum(1), size.sum(1))  # everything was merged: nothing is lost
    if method.merge is None:
        # a mean lies between its members
        for image in range(batch):
            for new in range(length - r):
                members = values["hidden"][image, step.dest[image] == new]
                assert (after.x[image, new] <= members.amax(0) + 1e-5).all()
                assert (after.x[image, new] >= members.amin(0) - 1e-5).all()


def is_exact(method: Method) -> bool:
    return method.place is methods.exact


@pytest.mark.parametrize("name", [*NAMES, "vsm in rounds"])
def test_plans_are_those_of_every_image_alone(name):
    method = ALL[name]
    values = some_values("random", 5, 4, 17)
    together = method.plan(signals_of(values, 17), 6)
    for image in range(4):
        alone = method.plan(signals_of({k: v[image : image + 1] for k, v in values.items()}, 17), 6)
        assert torch.equal(alone.keep[0], together.keep[image])
        assert torch.equal(alone.dest[0], together.dest[image])


def signals_of(values: dict[str, Tensor], patches: int, grid: tuple[int, ...] = ()) -> Signals:
    batch = len(values["hidden"])
    ids = torch.arange(patches).expand(batch, -1)
    at = {"special_at": torch.full((batch, 1), patches // 2), "special": values["hidden"][:, :1]}
    return Signals(torch.ones(batch, patches), ids, grid or (patches,), {**values, **at})


@pytest.mark.parametrize("name", sorted(ALL))
def test_costs_grow_with_the_tokens_and_are_counted_for_every_step(name):
    method = ALL[name]
    for patches, r in ((196, 39), (196, 195), (5, 1), (2, 1)):
        cost = method.cost(patches, min(r, method.most(patches)), 384, 768)
        assert isinstance(cost, int) and cost >= 0
    assert method.cost(392, 39, 384, 768) >= method.cost(196, 39, 384, 768)
    content_free = {"even_spread", "random_prune"}
    assert (method.cost(196, 39, 384, 768) > 0) == (name not in content_free)


def small_vim() -> Vim:
    torch.manual_seed(0)
    return Vim(VimConfig((48, 48), patch=8, stride=8, d_model=32, depth=6, d_state=4, num_classes=10)).eval()


@torch.no_grad()
def test_all_methods_at_all_targets_on_a_small_model():
    model, images = small_vim(), torch.randn(2, 3, 48, 48)
    dense = model(images)
    for name in NAMES:
        # half of the FLOPs takes more stages where at most half of the patches can go at once
        for target, stages in ((0.2, None), (0.3, None), (0.4, None), (0.5, range(5))):
            schedule = mambatrim.solve(model, target, stages, method=methods.get(name))
            fast = mambatrim.reduce(model, schedule=schedule, method=name)
            assert abs(1 - mambatrim.count_flops(fast).ratio - target) <= 0.005, name
            logits = fast(images)
            assert torch.isfinite(logits).all() and not torch.equal(logits, dense), name


@torch.no_grad()
def test_all_ablations_on_a_small_model():
    model, images = small_vim(), torch.randn(2, 3, 48, 48)
    for name, method in ABLATIONS.items():
        logits = mambatrim.reduce(model, 0.3, method=method)(images)
        assert torch.isfinite(logits).all(), name


def test_methods_are_listed():
    listed = mambatrim.list_methods()
    assert list(listed) == list(methods.METHODS)
    for name, text in listed.items():
        assert re.fullmatch(r"\S.{20,}\. \(.+\)", text), (name, text)
        assert methods.get(name).name == name


def test_every_factory_names_its_source():
    for name, entry in methods.METHODS.items():
        assert len(entry.__doc__) > 40, name
        assert entry().source, name


def test_the_example_of_adding_a_method_runs():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(block.splitlines()) <= 40
    scope: dict[str, object] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), scope)
    method = scope["norm"]
    assert isinstance(method, Method)
    signals = signals_of(some_values("random", 0, 2, 12), 12)
    plan = method.plan(signals, 4)
    plan.check()
    assert torch.equal(plan.keep, methods.mtr(methods.NORM).plan(signals, 4).keep)
    assert mambatrim.reduce(small_vim(), 0.3, method=method)(torch.randn(1, 3, 48, 48)).shape == (1, 10)


# --------------------------------------------------------------------------------------- what the papers say, by hand


def by_hand_parity(feature: list[Tensor], r: int) -> dict[int, int]:
    """ToMe in plain Python: even tokens to their most similar odd one, the r strongest."""
    cos = torch.nn.functional.cosine_similarity
    links = []
    for i in range(0, len(feature), 2):
        best = max(range(1, len(feature), 2), key=lambda j: float(cos(feature[i], feature[j], dim=0)))
        links.append((float(cos(feature[i], feature[best], dim=0)), i, best))
    return {i: j for _, i, j in sorted(links, key=lambda link: -link[0])[:r]}


@pytest.mark.parametrize(("name", "signal"), [("tome", "hidden"), ("rmeeto", "update"), ("famba", "update")])
def test_bipartite_methods(name, signal):
    values = some_values("random", 1, 1, 13)
    plan = methods.get(name).plan(signals_of(values, 13), 4)
    links = by_hand_parity(list(values[signal][0]), 4)
    assert plan.keep[0].tolist() == [i for i in range(13) if i not in links]
    for i, j in links.items():
        assert plan.dest[0, i] == plan.dest[0, j]


def test_more_than_half_goes_in_rounds():
    values = some_values("random", 2, 2, 12)
    signals = signals_of(values, 12)
    method = methods.tome()
    first = method.plan(signals, 6)
    hidden, size = first.merge(values["hidden"], signals.size), first.sum(signals.size)
    second = method.plan(replace(signals, size=size, ids=first.select(signals.ids), values={"hidden": hidden}), 3)
    whole, expected = method.plan(signals, 9), first.then(second)
    assert torch.equal(whole.keep, expected.keep) and torch.equal(whole.dest, expected.dest)
    assert method.plan(signals, 11).survivors == 1
    assert method.cost(12, 9, 8, 16) == method.cost(12, 6, 8, 16) + method.cost(6, 3, 8, 16)


def test_windows_have_one_target_each_and_keep_it():
    grid = (4, 6)
    corners = [row * 6 + column for row in (0, 2) for column in (0, 2, 4)]
    source, target = matching.lattice(torch.arange(24).repeat(2, 1), grid, 6)
    assert target.tolist() == [corners] * 2
    assert sorted(source[0].tolist() + corners) == list(range(24)) and (source.diff(dim=1) > 0).all()
    signals = signals_of(some_values("random", 3, 2, 24), 24, grid)
    for r in (5, 18, 21, 23):
        plan = methods.tomesd().plan(signals, r)
        survive = set(plan.keep[0].tolist())
        assert len(survive & set(corners)) == min(6, 24 - r)
    # where the lattice has more corners than tokens may stay, the coarser ones come first
    assert matching.lattice(torch.arange(24).repeat(1, 1), grid, 2)[1].tolist() == [[0, 4]]
    assert matching.windows((4, 6)) == 6 and matching.windows((3, 5)) == 6 and matching.windows((2, 4, 4)) == 8
    assert matching.windows((7,)) == 4
    # windows of a video lie inside its frames
    frames = matching.lattice(torch.arange(16).repeat(1, 1), (2, 2, 4), 4)[1]
    assert frames.tolist() == [[0, 2, 8, 10]]


def test_evit_keeps_the_largest_outputs_or_fuses_the_rest():
    values = some_values("random", 4, 2, 10)
    score = values["update"].clamp(min=0).sum(-1)
    signals = signals_of(values, 10)
    top = score.argsort(dim=1, descending=True)
    assert torch.equal(methods.evit().plan(signals, 4).keep, top[:, :6].sort(dim=1).values)
    method = methods.evit_fused()
    plan = method.plan(signals, 4)
    assert torch.equal(plan.keep, top[:, :6].sort(dim=1).values)
    mean = plan.merge(values["hidden"], method.weight(signals))
    for image in range(2):
        rest = top[image, 5:]
        expected = (score[image, rest, None] * values["hidden"][image, rest]).sum(0) / score[image, rest].sum()
        place = plan.keep[image].tolist().index(int(top[image, 5]))
        torch.testing.assert_close(mean[image, place], expected)
    released = methods.evit_released().plan(signals, 4)
    assert torch.equal(released.keep, top[:, 4:].sort(dim=1).values)  # just the wrong end


def test_hsa_and_its_released_order():
    values = some_values("random", 5, 1, 9)
    signals = signals_of(values, 9)
    gated = values["y_gated"][0]
    score = gated.clamp(min=0).mean(-1).sum(0)
    assert methods.hsa().plan(signals, 3).keep[0].tolist() == score.topk(6).indices.sort().values.tolist()
    mirrored = [8 - i for i in gated[1].sum(-1).topk(6).indices.tolist()]
    assert methods.hsa_released().plan(signals, 3).keep[0].tolist() == sorted(mirrored)
    backward = methods.hsa(methods.backward, methods.mean)
    assert backward.plan(signals, 3).keep[0].tolist() == gated[1].mean(-1).topk(6).indices.sort().values.tolist()


@pytest.mark.parametrize(("hidden", "residual"), [("hybrid", "merge"), ("prune", "merge"), ("merge", "hybrid")])
def test_utr_on_two_streams_is_the_papers_two_operations(hidden, residual):
    """P_h(update) + P_r(the rest), where each is the plan of that strategy in both streams."""
    values = some_values("random", 6, 2, 12)
    signals = signals_of(values, 12)
    both = methods.utr(hidden, residual)
    plan, r = both.plan(signals, 5), 5
    mixed = both.merge(values["hidden"], plan, signals)
    one = torch.ones(2, 12)
    on_hidden, on_residual = (methods.utr(s, s).plan(signals, r) for s in (hidden, residual))
    assert torch.equal(on_hidden.keep, plan.keep) and torch.equal(on_residual.keep, plan.keep)
    expected = on_hidden.merge(values["update"], one) + on_residual.merge(values["hidden"] - values["update"], one)
    torch.testing.assert_close(mixed, expected)
    assert plan.sum(one).sum() == 24  # bookkeeping: every token is somewhere


def test_utr_by_hand():
    values = some_values("random", 7, 1, 11)
    signals = signals_of(values, 11)
    y = values["y"][0]  # (S, M, E)
    score = y.clamp(min=0).mean(-1).sum(0).tolist()
    order = sorted(range(11), key=lambda i: score[i])
    low, high = order[:5], order[5:]
    feature = y.transpose(0, 1).flatten(1)
    cos = torch.nn.functional.cosine_similarity
    best = {i: max(high, key=lambda j: float(cos(feature[i], feature[j], dim=0))) for i in low}
    strength = {i: float(cos(feature[i], feature[best[i]], dim=0)) for i in low}
    source = sorted(low, key=lambda i: -strength[i])[:3]
    plan = methods.utr_merge().plan(signals, 3)
    assert plan.keep[0].tolist() == [i for i in range(11) if i not in source]
    assert all(plan.dest[0, i] == plan.dest[0, best[i]] for i in source)
    hybrid = methods.utr("hybrid", "hybrid").plan(signals, 3)
    weak = sorted(source, key=lambda i: score[i])[:2]  # half of three, rounded up
    assert [int(hybrid.dest[0, i]) == 8 for i in source] == [i in weak for i in source]
    assert (methods.utr_prune().plan(signals, 3).dest[0, source] == 8).all()


def test_stm_merges_neighbours_and_spares_those_of_the_class_token():
    values = some_values("random", 8, 2, 12)
    signals = signals_of(values, 12)
    plan = methods.stm(protect=2).plan(signals, 4)
    plan.check()
    assert (plan.dest.diff(dim=1) >= 0).all() and (plan.dest.diff(dim=1) <= 1).all()  # runs of neighbours
    for near in (4, 5, 6, 7):  # the class token stands before patch 6
        assert ((plan.dest == plan.dest[:, near : near + 1]).sum(1) == 1).all()
    rows = torch.nn.functional.normalize(values["hidden"], dim=-1)
    alike = (rows[:, :-1] * rows[:, 1:]).sum(-1)
    free = methods.stm(protect=0).plan(signals, 4)
    for image in range(2):
        joined = [i for i in range(11) if free.dest[image, i] == free.dest[image, i + 1]]
        assert joined == alike[image].topk(4).indices.sort().values.tolist()
    # protected neighbours go when nobody else is left
    assert methods.stm(protect=12).plan(signals, 11).survivors == 1


def test_runs_stand_at_their_middle():
    from mambatrim.methods.sequential import runs

    plan = runs(torch.tensor([[1, 2, 5], [7, 6, 5]]), 8)
    assert plan.dest.tolist() == [[0, 0, 0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 4, 4, 4]]
    assert plan.keep.tolist() == [[1, 3, 4, 6, 7], [0, 1, 2, 3, 5]]
    plan.check()


def test_mame_weighs_by_the_timescale():
    values = some_values("random", 9, 1, 8)
    signals = signals_of(values, 8)
    method = methods.mame()
    torch.testing.assert_close(method.weight(signals), values["dt"].mean(-1).sum(1))
    plan = method.plan(signals, 3)
    score = values["dt"].mean(-1).sum(1)[0]
    assert set(range(8)) - set(plan.keep[0].tolist()) <= set(score.topk(4, largest=False).indices.tolist())


def test_clusters_find_clusters():
    """Three clouds far apart: whatever is left after a step that leaves three are these clouds."""
    g = torch.Generator().manual_seed(0)
    cloud = torch.arange(30).repeat(2, 1) % 3
    cloud[:, 3:] = cloud[:, 3:][:, torch.randperm(27, generator=g)]
    hidden = 50.0 * torch.nn.functional.one_hot(cloud, 3) + torch.randn(2, 30, 3, generator=g)
    values = {"hidden": hidden, "update": torch.rand(2, 30, 4, generator=g)}
    values["update"][:, :3] = 9.0  # k-medoids begins with one of each
    for method in (methods.dpcknn(), methods.kmedoids()):
        plan = method.plan(signals_of(values, 30), 27)
        plan.check()
        for image in range(2):
            for new in range(3):
                assert len(set(cloud[image, plan.dest[image] == new].tolist())) == 1
    medoids = methods.kmedoids().plan(signals_of(values, 30), 27).keep
    for image in range(2):
        for token in medoids[image].tolist():
            members = hidden[image, cloud[image] == cloud[image, token]]
            effort = torch.cdist(members, members).sum(1)
            own = torch.cdist(members, hidden[image, token][None]).sum()
            torch.testing.assert_close(own, effort.min())


def test_even_spread_and_centrality():
    values = some_values("random", 0, 1, 9)
    assert methods.even_spread().plan(signals_of(values, 9), 6).keep.tolist() == [[1, 4, 7]]
    assert methods.even_spread().plan(signals_of(values, 9), 8).keep.tolist() == [[4]]
    assert methods.central().plan(signals_of(values, 9, (3, 3)), 4).keep.tolist() == [[1, 3, 4, 5, 7]]


def test_famba_layers():
    built = {name: methods.famba_schedule(12, 3, name).removed for name in ("all", "alternate", "lower", "upper")}
    assert built["all"] == (3,) * 11 + (0,)
    assert built["alternate"] == (0, 3) * 5 + (0, 0)
    assert built["lower"] == (3,) * 6 + (0,) * 6
    assert built["upper"] == (0,) * 7 + (3,) * 4 + (0,)
    assert methods.famba_schedule(6, 1, "lower", bound=2).removed == (1, 1, 0, 0, 0, 0)


def test_released_schedule_of_rmeeto():
    """r = 5 removes 71 tokens before block 22, and r = 11 is as it should be: figures of the repository's code."""
    five = methods.rmeeto_released_schedule(24, 196, 5)
    assert {i + 1: r for i, r in enumerate(five.removed) if r} == {**dict.fromkeys(range(2, 22, 2), 5), 22: 71}
    eleven = methods.rmeeto_released_schedule(24, 196, 11)
    assert {i + 1: r for i, r in enumerate(eleven.removed) if r} == dict.fromkeys(range(2, 24, 2), 11)
    assert 196 - sum(eleven.removed) == 75
    assert sum(methods.rmeeto_released_schedule(24, 196, 0).removed) == 98
    assert methods.rmeeto_released_schedule(4, 16, 3, interval=1, compare=None).removed == (3, 3, 3, 0)


@torch.no_grad()
def test_rmeeto_released_lets_the_class_token_drift():
    """After 11 merges of 11 it is at 34 of 76, where the middle is 37.5."""
    method = methods.rmeeto_released()
    tokens = Tokens.start(torch.randn(1, 197, 4), (14, 14))
    reducer = Reducer(method, Schedule.constant(11, 11, range(11)), (98,))
    for block in range(11):
        tokens = reducer(block, tokens, {"update": tokens.x})
    assert int(tokens.where((98,))) == 34 and tokens.x.shape[1] == 76


def test_class_token_score_and_its_mistake():
    values = some_values("random", 1, 2, 7)
    signals = signals_of(values, 7)
    expected = torch.nn.functional.cosine_similarity(values["hidden"], values["hidden"][:, :1], dim=-1)
    torch.testing.assert_close(methods.CLASS_TOKEN.pool(signals), expected)
    none = replace(signals, values={**values, "special": values["hidden"][:, :0]})
    with pytest.raises(ValueError, match="needs a model with a class token"):
        methods.CLASS_TOKEN.pool(none)


def test_special_signals_are_the_reducers_own():
    seen: list[Signals] = []

    def plan(signals: Signals, r: int) -> Assignment:
        seen.append(signals)
        return Assignment.from_prune(torch.arange(r).repeat(2, 1), signals.size.shape[1])

    reducer = Reducer(Method("spy", ("special", "special_at", "hidden"), plan), Schedule((2, 1)), (7, 2, 0))
    assert reducer.needs(0) == ("hidden",)
    tokens = Tokens.start(torch.arange(9.0).reshape(1, 9, 1).repeat(2, 1, 3), (6,))
    tokens = reducer(0, tokens, {"hidden": tokens.x})
    reducer(1, tokens, {"hidden": tokens.x})
    assert seen[0].special[..., 0].tolist() == [[7.0, 2.0, 0.0]] * 2
    assert seen[0].special_at.tolist() == [[5, 1, 0]] * 2
    assert seen[1].special_at.tolist() == [[3, 0, 0]] * 2
    with pytest.raises(ValueError, match="'special' was not declared"):
        _ = signals_without().special


def signals_without() -> Signals:
    return Signals(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), (2,), {})


def test_directions_and_channels():
    values = some_values("random", 2, 1, 5)
    signals = signals_of(values, 5)
    dt = values["dt"]
    torch.testing.assert_close(methods.delta(methods.forward).pool(signals), dt[:, 0].mean(-1))
    torch.testing.assert_close(methods.delta(methods.backward).pool(signals), dt[:, 1].mean(-1))
    torch.testing.assert_close(
        methods.scan_score("B", methods.forward, methods.positive_mean).pool(signals),
        values["B"][:, 0].clamp(min=0).mean(-1),
    )
    assert methods.delta(methods.backward).name == "backward delta" and methods.scan_score("C").name == "C"
    torch.testing.assert_close(scores.averaged("C").read(signals), values["C"].mean(1))
    with pytest.raises(ValueError, match="scan in one direction only"):
        methods.backward(dt[:, :1].mean(-1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: methods.tome(feature="hiden"), "did you mean 'hidden'"),
        (lambda: methods.tome(split="windows"), "must be PARITY or WINDOWS, got 'windows'"),
        (lambda: methods.tome(order="kept"), "restored or as_grouped, got 'kept'"),
        (lambda: methods.tome(weight=1), "by_size or plain, got 1"),
        (lambda: methods.rmeeto(feature="hidden"), "unknown feature of rmeeto 'hidden'"),
        (lambda: methods.rmeeto(distance="l3"), "unknown distance of rmeeto 'l3'"),
        (lambda: methods.rmeeto(partner=0), "2 for the next, ..., got 0"),
        (lambda: methods.rmeeto(combine="prune"), "merged or pruned, got 'prune'"),
        (lambda: methods.rmeeto_released(feature="dt"), "unknown feature of rmeeto_released 'dt'"),
        (lambda: methods.evit(score="norm"), "score of evit must be a Score"),
        (lambda: methods.evit(rest="fused"), "dropped or fused, got 'fused'"),
        (lambda: methods.hsa(directions="both"), "both, forward or backward, got 'both'"),
        (lambda: methods.scan_score("hidden"), "dt, B, C, y or y_gated, got 'hidden'"),
        (lambda: methods.utr(hidden="hybird"), "did you mean 'hybrid'"),
        (lambda: methods.utr_released(residual="merge"), "unknown residual strategy of utr_released 'merge'"),
        (lambda: methods.stm(protect=-1), "from 0 up, got -1"),
        (lambda: methods.dpcknn(neighbours=0), "from 1 up, got 0"),
        (lambda: methods.kmedoids(steps=1.5), "from 0 up, got 1.5"),
        (lambda: methods.kmedoids(start="norm"), "must be a Score such as OUTPUT"),
        (lambda: methods.mtr(groups="even"), r"by_rank\(\) or EVEN_ODD, got 'even'"),
        (lambda: methods.by_rank(candidates=3), "only_r or lowest_half, got 3"),
        (lambda: methods.famba_schedule(6, 1, "middle"), "unknown layers of famba_schedule 'middle'"),
        (lambda: methods.famba_schedule(6, 1, "lower", 6), "from 0 to 5, got 6"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build()
