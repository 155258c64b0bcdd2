"""MTR and its controls, against a reading of the paper in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrim import methods
from mambatrim.reduction import DELTA, NORM, Signals, inverse, plain, proportional

settings.register_profile("mambatrim", deadline=None, max_examples=40)
settings.load_profile("mambatrim")


def some_signals(seed: int, batch: int, patches: int) -> Signals:
    g = torch.Generator().manual_seed(seed)
    values = {
        "hidden": torch.randn(batch, patches, 6, generator=g),
        "update": torch.randn(batch, patches, 6, generator=g),
        "dt": torch.rand(batch, 2, patches, 12, generator=g),
        "y": torch.randn(batch, 2, patches, 12, generator=g),
    }
    values["dt_mean"] = values["dt"].mean(-1)
    ids = torch.arange(patches).repeat(batch, 1)
    return Signals(torch.ones(batch, patches), ids, (patches,), values)


def by_hand(score: list[float], feature: list[list[float]], r: int, n_targets: int) -> tuple[list[int], dict[int, int]]:
    """Survivors and links of one image."""
    order = sorted(range(len(score)), key=lambda i: score[i])
    source, target = order[:r], order[r : r + n_targets]

    def cosine(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(feature[i], feature[j], strict=True))
        return dot / math.hypot(*feature[i]) / math.hypot(*feature[j])

    return sorted(order[r:]), {i: max(target, key=lambda j: cosine(i, j)) for i in source}


@given(st.integers(0, 2**16), st.integers(2, 17), st.data())
def test_mtr_is_what_the_paper_says(seed, patches, data):
    r = data.draw(st.integers(1, patches - 1))
    signals = some_signals(seed, 2, patches)
    plan = methods.mtr().plan(signals, r)
    plan.check()
    for image in range(2):
        score = [sum(signals.dt[image, s, token].mean().item() for s in (0, 1)) for token in range(patches)]
        survivors, links = by_hand(score, signals.hidden[image].tolist(), r, min(r, patches - r))
        assert plan.keep[image].tolist() == survivors
        for token in range(patches):
            assert survivors[int(plan.dest[image, token])] == links.get(token, token)


def test_keep_is_untouched_and_only_targets_receive():
    signals = some_signals(1, 3, 20)
    plan = methods.mtr().plan(signals, 6)
    score = signals.dt_mean.sum(1)
    received = torch.zeros(3, 14).scatter_add(1, plan.dest, torch.ones(3, 20))
    rank_of = score.argsort(1).argsort(1)
    for image in range(3):
        for new, old in enumerate(plan.keep[image].tolist()):
            assert rank_of[image, old] >= 6  # sources are the lowest six
            assert received[image, new] == 1 or rank_of[image, old] < 12  # Keep stands for itself alone


def test_options_are_functions_and_change_the_plan():
    signals = some_signals(2, 1, 15)
    links = {
        name: methods.mtr(**options).plan(signals, 5).dest.tolist()
        for name, options in {
            "default": {},
            "update": {"feature": "update"},
            "dt": {"feature": "dt"},
            "all": {"groups": methods.by_rank(methods.all_others)},
            "norm": {"score": NORM},
            "inverse": {"score": inverse(DELTA)},
        }.items()
    }
    assert len({str(dest) for dest in links.values()}) == len(links)
    method = methods.mtr(feature="y", weight=plain, place=proportional)
    assert method.needs == ("dt_mean", "y") and method.weight is plain and method.place is proportional
    assert methods.mtr(score=NORM).needs == ("hidden",)


def test_ablations_of_the_paper():
    signals = some_signals(5, 2, 14)
    score = signals.dt_mean.sum(1)
    default = methods.mtr().plan(signals, 4)
    unordered = methods.mtr(order=methods.as_grouped).plan(signals, 4)
    assert torch.equal(unordered.keep, score.argsort(dim=1, descending=True)[:, :10])  # by falling score
    assert torch.equal(unordered.keep.sort(dim=1).values, default.keep)
    back = unordered.arrange(torch.arange(14).expand(2, -1))
    assert torch.equal(back.dest, default.dest)
    pruned = methods.mtr(combine=methods.pruned).plan(signals, 4)
    assert torch.equal(pruned.keep, default.keep) and (pruned.dest == 10).sum() == 8
    # even and odd tokens: the timescale decides nothing
    symmetric = methods.mtr(groups=methods.EVEN_ODD).plan(signals, 4)
    assert torch.equal(symmetric.dest, methods.tome().plan(signals, 4).dest)
    # of the lower half, those most like a token of the upper half
    chosen = methods.mtr(groups=methods.by_rank(methods.all_others, methods.lowest_half)).plan(signals, 4)
    for image in range(2):
        low = score[image].topk(7, largest=False).indices
        high = [i for i in range(14) if i not in low.tolist()]
        rows = torch.nn.functional.normalize(signals.hidden[image], dim=-1)
        best = (rows[low] @ rows[high].T).amax(1)
        gone = set(range(14)) - set(chosen.keep[image].tolist())
        assert gone == set(low[best.topk(4).indices].tolist())


def test_equal_scores_and_zero_tokens_are_settled_by_order():
    signals = some_signals(0, 1, 7)
    signals.values["dt_mean"].fill_(1.0)
    signals.values["hidden"].zero_()
    plan = methods.mtr().plan(signals, 3)
    assert plan.keep.tolist() == [[3, 4, 5, 6]]
    assert plan.dest.tolist() == [[0, 0, 0, 0, 1, 2, 3]]


def test_prune_drops_the_lowest():
    signals = some_signals(3, 2, 9)
    plan = methods.prune().plan(signals, 4)
    lowest = signals.dt_mean.sum(1).topk(4, largest=False).indices
    assert (plan.dest.gather(1, lowest) == 5).all()
    assert methods.prune().needs == ("dt_mean",)


def test_random_draws_by_seed_and_stage_and_not_by_image():
    signals = some_signals(4, 3, 40)
    plans = [methods.random(seed).plan(signals, 10).keep for seed in range(5)]
    assert len({str(keep.tolist()) for keep in plans}) == 5
    assert all((keep == keep[:1]).all() for keep in plans)
    # over many seeds every patch goes about equally often: 10 of 40 in 400 draws, six standard deviations of room
    gone = torch.zeros(40)
    for seed in range(400):
        gone += (methods.random(seed).plan(signals, 10).keep[0, :, None] == torch.arange(40)).sum(0) == 0
    assert (gone - 100).abs().max() < 6 * math.sqrt(400 * 0.25 * 0.75)
    first, second = methods.random(0).plan(signals, 10), methods.random(0).plan(some_signals(4, 3, 39), 10)
    assert first.keep[0, :20].tolist() != second.keep[0, :20].tolist()
    assert methods.random(-3).plan(signals, 10).keep.shape == (3, 30)


def test_costs_follow_the_arithmetic():
    # 196 patches, 39 go: scores 2E each, unit vectors of sources and targets, products, means
    expected = 196 * 2 * 768 + (39 + 39) * 384 + 39 * 39 * 384 + 39 * 384
    assert methods.mtr().cost(196, 39, 384, 768) == expected
    everyone = 196 * 2 * 768 + 196 * 384 + 39 * 157 * 384 + 39 * 384
    assert methods.mtr(groups=methods.by_rank(methods.all_others)).cost(196, 39, 384, 768) == everyone
    assert methods.prune().cost(196, 39, 384, 768) == 196 * 2 * 768
    assert methods.random().cost(196, 39, 384, 768) == expected - 196 * 2 * 768


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: methods.get("mtrr"), "unknown method 'mtrr'; did you mean 'mtr'? known: "),
        (lambda: methods.get("xyzzy"), "unknown method 'xyzzy'; known: "),
        (lambda: methods.mtr(feature="hiden"), "did you mean 'hidden'"),
        (lambda: methods.mtr(score="dt_mean"), "score of mtr must be a Score"),
        (lambda: methods.by_rank(targets="next"), "next_in_rank or all_others, got 'next'"),
        (lambda: methods.mtr(combine="prune"), "merged or pruned, got 'prune'"),
        (lambda: methods.mtr(order="kept"), "restored or as_grouped, got 'kept'"),
        (lambda: methods.mtr(weight="size"), "by_size or plain"),
        (lambda: methods.mtr(place="exact"), "exact, centre or proportional"),
        (lambda: methods.prune(score=1), "score of prune must be a Score"),
        (lambda: methods.random(seed=0.5), "whole number, got 0.5"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build()
