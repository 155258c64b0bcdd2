"""Steps of MTR and vsm as one kernel against the operations that define them: the same to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrim.kernels import cpu, steps
from mambatrim.methods import EVEN_ODD, mtr, vsm
from mambatrim.reduction import DELTA, Reducer, Schedule, Tokens
from test_kernels import backend as backend

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason="the kernels are not compiled here")


def same(found: Tokens, wanted: Tokens) -> bool:
    pairs = zip(
        (found.x, found.size, found.origin.keep, found.origin.dest),
        (wanted.x, wanted.size, wanted.origin.keep, wanted.origin.dest),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


def run(method, removed, special, x, scores, grid):
    """Blocks that only hand on what they get, with a reduction after each."""
    tokens, reducer = Tokens.start(x, grid), Reducer(method, Schedule(removed), special)
    for block, score in enumerate(scores):
        captured = {"hidden": tokens.x, "dt_mean": score[:, :, : tokens.x.shape[1]]}
        tokens = reducer(block, tokens, captured)
    return tokens


def both(method, *arguments):
    """By one kernel, and by the operations."""
    assert method.at_once is not None
    return run(method, *arguments), run(replace(method, at_once=None), *arguments)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 7), st.integers(2, 9)),
    special=st.sets(st.integers(0, 10), max_size=3),
    shares=st.lists(st.floats(0, 0.6), min_size=1, max_size=3),
    columns=st.integers(1, 40),
    directions=st.integers(1, 2),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_kernel_makes_the_same_steps(batch, grid, special, shares, columns, directions, ties, seed):
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    special = sorted(special)
    while special and special[-1] >= patches + len(special):
        special.pop()
    special = tuple(special)
    x = torch.randn(batch, patches + len(special), columns, generator=generator)
    x = x.round() if ties else x
    removed, left = [], patches
    for share in shares:
        removed.append(min(int(share * left), left - 1))
        left -= removed[-1]
    scores = torch.rand(len(shares), batch, directions, x.shape[1], generator=generator)
    scores = (scores * 3).round() if ties else scores
    for method in (mtr(), vsm(), vsm(rows=0.0, exponent=0.5)):
        assert same(*both(method, tuple(removed), special, x, scores, grid))


def test_of_a_video(backend):
    x, scores = torch.randn(2, 37, 24), torch.rand(2, 2, 2, 37)
    for method in (mtr(), vsm()):
        assert same(*both(method, (9, 5), (0,), x, scores, (4, 3, 3)))


def test_scores_that_are_no_numbers_and_negative_zeros_rank_as_elsewhere():
    x, scores = torch.randn(1, 30, 8), torch.rand(1, 1, 1, 30)
    scores[..., 3:9], scores[..., 9:14], scores[..., 20:24] = float("nan"), 0.0, -0.0
    scores[..., 24:27], scores[..., 27] = -torch.rand(3), float("-inf")
    for removed in (4, 14, 20):
        assert same(*both(mtr(), (removed,), (), x, scores, (5, 6)))


def test_other_choices_take_their_own_way():
    assert mtr(score=DELTA).at_once is not None and mtr(groups=EVEN_ODD).at_once is None
    assert mtr(feature="update").at_once is None and vsm(feature="update").at_once is None


def test_what_a_step_cannot_take_goes_another_way():
    """Gradients, other dtypes, and a stream that is not what the block handed on."""
    x, scores = torch.randn(1, 21, 8), torch.rand(1, 1, 2, 21)
    plain = run(mtr(), (5,), (0,), x, scores, (4, 5))
    wanted = x.clone().requires_grad_()
    found = run(mtr(), (5,), (0,), wanted, scores, (4, 5))
    found.x.sum().backward()
    assert torch.equal(found.origin.dest, plain.origin.dest) and wanted.grad is not None
    tokens = Tokens.start(x, (4, 5))
    captured = {"hidden": x.flip(1), "dt_mean": scores[0]}
    reducers = [Reducer(method, Schedule((5,)), (0,)) for method in (mtr(), replace(mtr(), at_once=None))]
    assert same(*(reducer(0, tokens, captured) for reducer in reducers))


def test_positions_that_are_not_there_are_named():
    x, size, keep = torch.randn(1, 9, 4), torch.ones(1, 9), torch.arange(9)[None]
    for before in (steps.Before(x, size, keep, keep, (9,)), steps.Before(x, size, keep, keep + 9, (0,))):
        with pytest.raises(IndexError, match="outside the sequence"):
            steps.ranked_step(before, torch.rand(1, 2, 9), 2, 2)
        with pytest.raises(IndexError, match="outside the sequence"):
            steps.clustered_step(before, 2, 1.0, 0.02, 0.02, (2, 4))


@pytest.mark.parametrize("method", [mtr(), vsm()], ids=["mtr", "vsm"])
def test_compiled_models_call_the_same_kernel(method):
    x, scores, called = torch.randn(2, 37, 24), torch.rand(1, 2, 2, 37), []

    def see(module, _):
        called.extend(str(node.target) for node in module.graph.nodes if "_step" in str(node.target))
        return module

    def step(x, scores):
        return run(method, (9,), (0,), x, scores, (4, 3, 3)).x

    compiled = torch.compile(step, backend=see, fullgraph=True)
    assert torch.equal(compiled(x, scores), step(x, scores)) and len(called) == 1


def test_the_operators_are_sound():
    x, size, same_place = torch.randn(2, 11, 5), torch.ones(2, 11), torch.arange(11).repeat(2, 1)
    before = (x, size, same_place, same_place, [0])
    torch.library.opcheck(torch.ops.mambatrim.ranked_step, (*before, torch.rand(2, 2, 11), 3, 4))
    torch.library.opcheck(torch.ops.mambatrim.clustered_step, (*before, 3, 1.0, 0.02, 0.02, [2, 5]))
