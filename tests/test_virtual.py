"""Virtual sequences: the convolution and the scan over positions that exist as rows; and vsm, built on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import mambatrim
from mambatrim import kernels, methods
from mambatrim.flops import count_flops
from mambatrim.kernels import clustering, reference, virtual
from mambatrim.models.layers import BiMambaMixer
from mambatrim.models.vim import Vim, VimConfig
from mambatrim.reduction import (
    AS_IT_STANDS,
    GATHERED,
    POLICIES,
    RUNNING,
    SPREAD,
    STEPPED,
    Assignment,
    Layout,
    Schedule,
    Tokens,
)


def groups(batch: int, positions: int, rows: int, gone: bool = False) -> kernels.Virtual:
    """A random source in which every row stands somewhere."""
    source = torch.randint(0, rows + gone, (batch, positions))
    for image in source:
        image[torch.randperm(positions)[:rows]] = torch.arange(rows)
    count = torch.stack([torch.bincount(image, minlength=rows + 1)[:rows] for image in source])
    return kernels.Virtual(source, 1 / count.float())


def scan_arguments(batch: int, rows: int, channels: int, states: int, rank: int, dtype: torch.dtype) -> tuple:
    def pair(*shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape) for _ in range(2)]

    A = [-4 * torch.rand(channels, states) for _ in range(2)]
    dt, B, C = pair(batch, rows, rank), pair(batch, rows, states), pair(batch, rows, states)
    D, bias, weight = pair(channels), [x - 3 for x in pair(channels)], pair(channels, rank)
    u, z = torch.randn(2, batch, rows, channels, dtype=dtype), torch.randn(batch, rows, channels, dtype=dtype)
    return u, dt, A, B, C, D, bias, weight, z, torch.rand(batch, rows) * 3, [False, True], True, 0.5


SHAPES = [(1, 1, 1, 16, 8, 2), (2, 7, 13, 40, 16, 3), (3, 20, 33, 33, 4, 5)]


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_give_what_the_definition_gives(shape, dtype, gone):
    torch.manual_seed(0)
    batch, rows, positions, channels, states, rank = shape
    sequence = groups(batch, positions, rows, gone)
    arguments = scan_arguments(batch, rows, channels, states, rank, dtype)
    within = 1e-5 if dtype == torch.float32 else 1e-2
    for made, meant in zip(
        torch.ops.mambatrim.virtual_scan(*arguments, *sequence),
        virtual._scan_pytorch(*arguments, *sequence),
        strict=True,
    ):
        torch.testing.assert_close(made, meant, rtol=within, atol=within)
    x, weight, bias = arguments[0][0], [torch.randn(channels, 4) for _ in "ab"], [torch.randn(channels) for _ in "ab"]
    made = kernels.causal_conv1d(x, weight, bias, (False, True), virtual=sequence)
    meant = virtual._conv_pytorch(x, weight, bias, [False, True], True, *sequence)
    torch.testing.assert_close(made, meant, rtol=within, atol=within)


def test_every_row_in_its_own_place_is_the_ordinary_scan():
    torch.manual_seed(1)
    u, dt, A, B, C, D, bias, weight, z, repeats, reverse, *_ = scan_arguments(2, 19, 24, 8, 3, torch.float32)
    directions = [kernels.Direction(*one) for one in zip(dt, A, B, C, D, bias, weight, reverse, strict=True)]
    itself = kernels.Virtual(torch.arange(19).repeat(2, 1), torch.ones(2, 19))
    plain, over = (kernels.scan(u, directions, z, repeats, virtual=v) for v in (None, itself))
    for a, b in zip(plain, over, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_virtual_sequence():
    torch.manual_seed(2)
    sequence = groups(1, 9, 5)
    sequence = kernels.Virtual(sequence.source, sequence.share.double())
    weight, bias = [torch.randn(6, 4).double() for _ in "ab"], [torch.randn(6).double() for _ in "ab"]

    def both(u: torch.Tensor, dt: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        A = -torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).double()
        x = kernels.causal_conv1d(u, weight, bias, (False, True), virtual=sequence)
        directions = [kernels.Direction(dt, A, B, B * 2, reverse=reverse) for reverse in (False, True)]
        return kernels.scan(x, directions, virtual=sequence).y

    leaves = [torch.randn(1, 5, n, dtype=torch.float64, requires_grad=True) for n in (6, 6, 3)]
    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize(
    ("source", "share", "wrong"),
    [
        (torch.zeros(2, 9), torch.ones(2, 5), "source must be"),
        (torch.zeros(1, 9, dtype=torch.int64), torch.ones(2, 5), "source must be"),
        (torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 4), "share must be"),
    ],
)
def test_a_sequence_that_does_not_fit_is_refused(source, share, wrong):
    with pytest.raises(ValueError, match=wrong):
        kernels.causal_conv1d(torch.randn(2, 5, 8), [torch.randn(8, 4)], virtual=kernels.Virtual(source, share))


# ------------------------------------------------------------------------------------------------------- the guarantee


@pytest.mark.parametrize("contiguous", [True, False])
def test_with_the_clock_running_a_mixer_does_what_it_does_on_the_unmerged_sequence(contiguous):
    """The dense mixer on the sequence in which every token is its group's row, with the mean over each group taken
    after the convolution and after the scan, is the mixer with the clock running."""
    torch.manual_seed(3)
    mixer = BiMambaMixer(24, d_state=8).eval()
    sequence = groups(2, 21, 12)
    source = sequence.source.sort(dim=1).values if contiguous else sequence.source
    x = torch.randn(2, 12, 24)
    layout = Layout(sequence.share, convolved=source, scanned=source)

    def spread(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([image[where] for image, where in zip(rows, source, strict=True)])

    def mean(full: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(2, 12, full.shape[2]).scatter_add(1, source[:, :, None].expand_as(full), full)
        return out * sequence.share[:, :, None]

    with torch.no_grad():
        merged, _ = mixer(x, layout=layout)
        hidden, z = mixer.in_proj(spread(x)).chunk(2, dim=-1)
        total = 0
        for suffix, flip in (("", False), ("_b", True)):
            conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
            turned = hidden.flip(1) if flip else hidden
            u = torch.nn.functional.silu(conv(torch.nn.functional.pad(turned.mT, (3, 0)))).mT  # (B, L0, E)
            u = u.flip(1) if flip else u
            u = spread(mean(u))
            dt, B, C = x_proj(u).split([mixer.dt_rank, 8, 8], dim=-1)
            A_log, D = (mixer.A_b_log, mixer.D_b) if flip else (mixer.A_log, mixer.D)
            y, _, _ = reference.selective_scan(
                *(u, dt, -torch.exp(A_log), B, C, D, None, dt_proj.bias, dt_proj.weight), reverse=flip
            )
            total = total + y
        update = mixer.out_proj(mean(0.5 * total * torch.nn.functional.silu(z)))
    torch.testing.assert_close(merged, update, rtol=1e-5, atol=1e-5)


def tiny(**changes) -> Vim:
    torch.manual_seed(4)
    return Vim(VimConfig(image_size=(24, 24), patch=4, stride=4, d_model=32, depth=4, num_classes=10, **changes)).eval()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_nothing_removed_is_the_dense_model_bit_for_bit(policy):
    model, images = tiny(), torch.randn(2, 3, 24, 24)
    same = mambatrim.reduce(model, schedule=Schedule.none(4), method=methods.vsm(sequence=policy))
    with torch.no_grad():
        assert torch.equal(model(images), same(images))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_batches_do_not_change_a_policy(policy):
    model = mambatrim.reduce(tiny(), schedule=Schedule((10, 0, 8, 0)), method=methods.vsm(sequence=policy))
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        one_by_one = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), one_by_one, rtol=1e-5, atol=1e-5)


def test_merging_equal_neighbours_changes_nothing_with_the_clock_running():
    """Where all tokens of a group are equal, and their windows too, a merged block gives the mean of the dense one."""
    model = tiny()
    with torch.no_grad():
        model.pos_embed.zero_()
        for layer in model.blocks():  # a filter of one tap sees no neighbours, so that a group's outputs are equal too
            for conv in (layer.mixer.conv1d, layer.mixer.conv1d_b):
                conv.weight[:, :, :3] = 0
        image = torch.randn(1, 3, 24, 1).expand(1, 3, 24, 24).clone()  # rows of six equal patches
        tokens = model.embed(image)
        block = model.blocks()[0]
        dense = tokens.x + block.mixer(block.norm(tokens.x))[0]
        source = (torch.arange(37)[None] - (torch.arange(37) > 18).long()[None]) // 6  # (1, 37): six rows of patches
        source = torch.where(source > 2, source + 1, source)
        source[0, 18] = 3  # the class token, in the middle
        keep = torch.stack([torch.nonzero(source[0] == row)[0, 0] for row in range(7)])[None]
        merged = tokens.reduce(Assignment(keep, source), tokens.size)
        layout = RUNNING.build(merged)
        update = block.mixer(block.norm(merged.x), layout=layout)[0]
        full = Assignment(keep, source).sum(dense) / merged.size[:, :, None]
        torch.testing.assert_close(merged.x + update, full, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- clustering


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 24),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    exponent=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_compiled_clustering_is_the_definition(batch, rows, seed, share, exponent):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows, 5, generator=generator)
    x[:, :1] = 0  # like nobody
    weight = torch.randint(1, 4, (batch, rows), generator=generator).float()
    place = torch.rand(batch, rows, 2, generator=generator)
    arguments = (x, weight, place, int(share * (rows - 1)), exponent)
    keep, dest = kernels.agglomerate(*arguments)
    assert all(torch.equal(a, b) for a, b in zip((keep, dest), clustering._pytorch(*arguments), strict=True))
    Assignment(keep, dest).check()


@pytest.mark.parametrize("apart", [0.0, 0.02, 1.0])
def test_rows_that_are_too_far_to_be_partners_change_nothing(apart):
    torch.manual_seed(5)
    x = torch.randn(2, 6, 33).repeat_interleave(15, dim=1) + 0.5 * torch.randn(2, 90, 33)
    place = torch.stack([torch.arange(90), torch.arange(90) % 10], dim=1).repeat(2, 1, 1) * apart
    arguments = (x, torch.randint(1, 4, (2, 90)).float(), place, 60, 1.0)
    for made, meant in zip(kernels.agglomerate(*arguments), clustering._pytorch(*arguments), strict=True):
        assert torch.equal(made, meant)


@pytest.mark.parametrize("shuffled", [False, True])
def test_blocks_of_rows_that_are_too_far_change_nothing(shuffled):
    torch.manual_seed(6)
    rows = 600  # of more blocks than a vector has lanes
    x = torch.randn(2, rows, 7)
    place = torch.stack([torch.arange(rows), torch.arange(rows) % 30], dim=1).repeat(2, 1, 1) * 0.02
    if shuffled:
        place = place[:, torch.randperm(rows)]
    arguments = (x, torch.randint(1, 4, (2, rows)).float(), place, 400, 1.0)
    for made, meant in zip(kernels.agglomerate(*arguments), clustering._pytorch(*arguments), strict=True):
        assert torch.equal(made, meant)


def test_images_that_are_made_in_turns_are_those_made_at_once():
    torch.manual_seed(7)
    x, place = torch.randn(5, 300, 2500), torch.arange(300.0).repeat(5, 1)[:, :, None] * 0.02  # 3 MB an image
    made = kernels.agglomerate(x, torch.ones(5, 300), place, 100)
    for b in range(5):
        alone = kernels.agglomerate(x[b : b + 1], torch.ones(1, 300), place[:1], 100)
        assert all(torch.equal(one[b : b + 1], other) for one, other in zip(made, alone, strict=True))


def test_clustering_takes_rows_that_are_no_numbers():
    x = torch.randn(1, 9, 4)
    x[0, 2:5] = torch.nan
    for r in range(9):
        for made in (kernels.agglomerate, clustering._pytorch):
            Assignment(*made(x, torch.ones(1, 9), torch.zeros(1, 9, 1), r, 1.0)).check()


def test_the_operators_are_sound():
    sequence, x = groups(2, 9, 5), torch.randn(2, 5, 16)
    arguments = scan_arguments(2, 5, 16, 8, 3, torch.float32)
    check = torch.library.opcheck
    check(torch.ops.mambatrim.virtual_scan, (*arguments, *sequence))
    check(torch.ops.mambatrim.virtual_conv1d, (x, [torch.randn(16, 4)], [], [True], True, *sequence))
    check(torch.ops.mambatrim.agglomerate, (x, torch.ones(2, 5), torch.zeros(2, 5, 1), 2, 1.0))


def test_the_cheapest_pairs_are_joined():
    x = torch.eye(6)[None] + 0
    x[0, 4], x[0, 5] = x[0, 1], x[0, 0] + 0.01
    keep, dest = kernels.agglomerate(x, torch.ones(1, 6), torch.zeros(1, 6, 1), 2)
    assert keep[0].tolist() == [0, 1, 2, 3] and dest[0].tolist() == [0, 1, 2, 3, 1, 0]


@pytest.mark.parametrize("join", [kernels.agglomerate, kernels.agglomerate_rounds])
@pytest.mark.parametrize("r", [-1, 3])
def test_too_many_rows_cannot_go(r, join):
    with pytest.raises(ValueError, match="from 0 to 2 of 3 rows"):
        join(torch.zeros(1, 3, 2), torch.ones(1, 3), torch.zeros(1, 3, 1), r)


# ----------------------------------------------------------------------------------------------------------- in rounds


def by_hand_rounds(cost: torch.Tensor, r: int) -> list[set[int]]:
    """Rounds where a cluster costs what its first row does: the pairs that are each other's cheapest, half of what is
    left to do, the cheapest first."""
    clusters, left = {i: {i} for i in range(len(cost))}, r
    while left:
        best = {i: min((j for j in clusters if j != i), key=lambda j: float(cost[i, j])) for i in clusters}
        pairs = sorted((float(cost[i, j]), i, j) for i, j in best.items() if best[j] == i and i < j)
        for _, i, j in pairs[: (left + 1) // 2]:
            clusters[i] |= clusters.pop(j)
            left -= 1
    return sorted(clusters.values(), key=min)


def test_rounds_are_those_by_hand(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    # a cluster stays where its first row is, which outweighs all rows behind it
    x, weight = torch.randn(2, 23, 4, generator=generator), (0.5 ** torch.arange(23.0)).expand(2, -1)
    monkeypatch.setattr(clustering, "_merged", lambda coordinates, *_: coordinates)
    itself = torch.diag_embed(torch.full((2, 23), torch.inf))
    apart = lambda gram, w, place, e: (place - place.transpose(1, 2)).abs() + itself  # noqa: E731
    monkeypatch.setattr(clustering, "pair_costs", apart)
    place = torch.rand(2, 23, 1, generator=generator)
    for r in (1, 6, 14, 22):
        _, dest = kernels.agglomerate_rounds(x, weight, place, r, count=40)
        for image in range(2):
            expected = by_hand_rounds((place[image] - place[image].T).abs(), r)
            assert [set(torch.nonzero(dest[image] == k)[:, 0].tolist()) for k in range(23 - r)] == expected


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 24),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    levels=st.sampled_from([0, 1, 2]),
    count=st.sampled_from([None, 0, 1]),
)
def test_rounds_leave_the_number_that_was_asked_for(batch, rows, seed, share, levels, count):
    """Whatever is equal, and however few rounds: the last step takes the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows, 5, generator=generator)
    x = torch.randint(-1, levels, x.shape, generator=generator).float() if levels else x
    r = int(share * (rows - 1))
    keep, dest = kernels.agglomerate_rounds(x, torch.ones(batch, rows), torch.zeros(batch, rows, 1), r, 1.0, count)
    assert keep.shape == (batch, rows - r)
    Assignment(keep, dest).check()
    assert torch.equal(dest.gather(1, keep), torch.arange(rows - r).expand(batch, -1))


def test_rounds_join_what_one_by_one_joins_where_pairs_are_far_apart():
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 12, 40, generator=generator)
    x = centres.repeat_interleave(3, dim=1) + 0.05 * torch.randn(3, 36, 40, generator=generator)
    arguments = (x, torch.ones(3, 36), torch.zeros(3, 36, 1), 24)
    for made, meant in zip(kernels.agglomerate_rounds(*arguments), kernels.agglomerate(*arguments), strict=True):
        assert torch.equal(made, meant)


def test_equal_rows_pair_up_side_by_side():
    """All costs are equal: a round joins as many pairs as it may, not one."""
    _, dest = kernels.agglomerate_rounds(torch.ones(1, 16, 3), torch.ones(1, 16), torch.zeros(1, 16, 1), 8)
    assert torch.bincount(dest[0]).max() <= 4
    x = torch.full((1, 9, 4), torch.nan)
    Assignment(*kernels.agglomerate_rounds(x, torch.ones(1, 9), torch.zeros(1, 9, 1), 5)).check()


def test_costs_that_grow_along_a_chain_still_leave_the_right_number():
    """Each round has a single pair, so that most are left to the last step."""
    place = torch.tensor([1.5**k for k in range(20)])[None, :, None]
    keep, dest = kernels.agglomerate_rounds(torch.ones(1, 20, 2), torch.ones(1, 20), place, 15, exponent=0)
    Assignment(keep, dest).check()
    assert keep.shape == (1, 5) and (dest.diff(dim=1) >= 0).all()  # neighbours join neighbours


def test_rounds_export_and_are_counted():
    model = tiny()
    reduced = mambatrim.reduce(model, schedule=Schedule((10, 0, 8, 0)), method=methods.vsm(grouping=methods.IN_ROUNDS))
    exact = mambatrim.reduce(model, schedule=Schedule((10, 0, 8, 0)), method="vsm")
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        logits = reduced(images)
        exported = torch.export.export(reduced, (images,), strict=True)
        torch.testing.assert_close(exported.module()(images), logits)
    # the stages see 36 and 26 patches of 32 features
    more = [kernels.rounds_macs(p, r, 32) - kernels.cluster_macs(p, r, 32) for p, r in ((36, 10), (26, 8))]
    assert kernels.rounds_macs(36, 10, 32) == 36 * 36 * (32 + 6 * 6)
    assert count_flops(reduced).total - count_flops(exact).total == sum(more)


# ---------------------------------------------------------------------------------------------------------------- cost


def test_the_work_of_a_policy_is_counted():
    model, schedule = tiny(), Schedule((10, 0, 8, 0))

    def macs(policy, convention="both"):
        reduced = mambatrim.reduce(model, schedule=schedule, method=methods.vsm(sequence=policy))
        return count_flops(reduced, convention=convention).total

    # 37 tokens, of which 27, 27 and 19 are left for the last three blocks: E is 64, 4 taps, N is 16
    missing, kept = 3 * 37 - 27 - 27 - 19, 3 * 37
    mean_and_filter = 2 * 64 * (4 * missing + kept)
    assert macs(SPREAD) - macs(AS_IT_STANDS) == mean_and_filter
    assert macs(STEPPED) == macs(SPREAD)
    assert macs(GATHERED) == macs(RUNNING)
    assert macs(RUNNING) - macs(SPREAD) == 2 * 64 * (9 * 16 * missing + kept)
    assert macs(STEPPED, "projections") == macs(AS_IT_STANDS, "projections")
    assert macs(AS_IT_STANDS, "paper") < macs(STEPPED, "paper") < macs(RUNNING, "paper")


def test_models_that_cannot_keep_the_clock_running_say_so():
    model = mambatrim.create_model("local_vim_tiny")
    with pytest.raises(ValueError, match="LocalVim.*as it stands"):
        mambatrim.reduce(model, 0.2, method="vsm")


def test_vsm_on_every_flat_family_exports_and_trains():
    for name in ("vim_tiny", "videomamba_tiny", "videomamba_tiny_f8", "mambar_tiny"):
        spec = mambatrim.models.MODELS[name]
        small = replace(spec, config=replace(spec.config, d_model=32, depth=3, image_size=(64, 64)))
        model = mambatrim.models._BUILD[spec.family](small).eval()
        reduced = mambatrim.reduce(model, schedule=Schedule((4, 3, 0)), method="vsm")
        images = torch.randn(2, 3, *model.sides())
        with torch.no_grad():
            logits = reduced(images)
            exported = torch.export.export(reduced, (images,), strict=True)
            torch.testing.assert_close(exported.module()(images), logits)
            full = reduced.forward_features(images, unmerge=True)
        assert full.x.shape == model.forward_features(images).x.shape
        reduced.train()(images).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks()[-1].parameters())
        with torch.no_grad():  # the path without gradients, which the compiled kernels take, gives the same
            torch.testing.assert_close(reduced(images), reduced.train()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["videomamba_tiny_f8", "mambar_tiny"])
def test_the_work_of_vsm_is_counted_in_videos_and_with_registers(name):
    """What a policy and a grouping add is what the operators that ran add by their own formulas."""
    spec = mambatrim.models.MODELS[name]
    small = replace(spec, config=replace(spec.config, d_model=32, depth=3, image_size=(64, 64)))
    model = mambatrim.models._BUILD[spec.family](small).eval()
    counted, ran = [], []
    for method in (methods.vsm(), methods.vsm(sequence=RUNNING), methods.vsm(grouping=methods.IN_ROUNDS)):
        reduced = mambatrim.reduce(model, schedule=Schedule((4, 3, 0)), method=method)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            reduced(torch.randn(1, 3, *model.sides()))
        counted.append(count_flops(reduced).total)
        ran.append(counter.get_total_flops() // 2)
    assert [c - counted[0] for c in counted] == [r - ran[0] for r in ran]
    assert counted[0] < min(counted[1:])


def test_signals_do_not_reach_special_tokens():
    """The class token is never in a group: it stays alone in its place."""
    model = mambatrim.reduce(tiny(), schedule=Schedule((20, 5, 0, 0)), method="vsm")
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(2, 3, 24, 24))
    assert isinstance(tokens, Tokens)
    at = tokens.where(model.special_tokens())
    assert torch.equal(tokens.size.gather(1, at), torch.ones(2, 1))
