"""The compiled kernels of the reduction step against their PyTorch form: same decisions, ties included, same rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrim.kernels import cpu, merging
from mambatrim.reduction import Assignment, Tokens, take_rows
from mambatrim.reduction.matching import cosine

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason="the kernels are not compiled here")


def both(function, monkeypatch):
    """What the kernels and what the PyTorch form return."""
    fast = function()
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "direct", lambda *tensors: False)
        return fast, function()


def positions(batch, length, count):
    return torch.rand(batch, length).argsort(dim=1)[:, :count]


def plan(batch, length, gone):
    order = positions(batch, length, length)
    source, target = order[:, :gone], order[:, gone:][:, torch.randint(length - gone, (gone,))]
    return Assignment.from_links(source, target, length)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("length", "columns", "sources"), [(5, 1, 2), (13, 7, 6), (97, 33, 41), (300, 20, 130)])
def test_nearest(batch, length, columns, sources, monkeypatch):
    feature, order = torch.randn(batch, length, columns), positions(batch, length, length)
    fast, slow = both(lambda: cosine(feature, order[:, :sources], order[:, sources:]), monkeypatch)
    torch.testing.assert_close(fast.similarity, slow.similarity, rtol=0, atol=2e-6)
    if columns > 1:  # with one column all similarities are 1 or -1, up to rounding
        assert torch.equal(fast.target, slow.target)


def test_of_equals_the_first_in_target_wins():
    feature = torch.randn(1, 1, 19).expand(2, 90, 19).contiguous()
    target = positions(2, 90, 70)
    assert torch.equal(cosine(feature, target[:, :9], target).target, target[:, :1].expand(-1, 9))


def test_a_row_of_zeros_is_like_nobody_and_nan_wins():
    feature = torch.randn(1, 40, 8)
    feature[0, 3] = 0.0
    source, target = torch.tensor([[3]]), torch.arange(4, 40)[None]
    assert cosine(feature, source, target).similarity.item() == 0.0
    feature[0, 3], feature[0, 21] = 1.0, float("nan")
    assert cosine(feature, source, target).target.item() == 21


ROWS = {
    "random": lambda x: x,
    "with ties": lambda x: x[:, torch.randint(0, 20, (x.shape[1],))],
    "alike": lambda x: 0.01 * x + 3 * torch.randn(1, 1, x.shape[2]),
    "of small whole numbers": lambda x: x.sign(),
    "half of them zeros": lambda x: x * torch.tensor([0.0, 1.0]).repeat(x.shape[1])[: x.shape[1], None],
    "with a channel that stands out": lambda x: x * torch.tensor([1e4] + [1.0] * (x.shape[2] - 1)),
    "tiny": lambda x: 1e-30 * x,
    "huge": lambda x: 1e30 * x,
    "one not a number": lambda x: x.index_put((torch.tensor(1), torch.tensor(77)), torch.tensor(float("nan"))),
    "one infinite": lambda x: x.index_put((torch.tensor(0), torch.tensor(9)), torch.tensor(float("-inf"))),
}


@pytest.mark.skipif(cpu.compiled() and cpu.level() != cpu.LEVELS[-1], reason="no numbers of 16 bits are used here")
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(ROWS)), columns=st.integers(1, 70), sources=st.integers(1, 90),
    targets=st.integers(256, 400), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_cheaper_look_first_rules_out_no_target_that_is_the_best(kind, columns, sources, targets, seed):
    torch.manual_seed(seed)
    feature, order = ROWS[kind](torch.randn(2, 500, columns)).contiguous(), positions(2, 500, 500)
    arguments = feature, order[:, :sources], order[:, -targets:]
    screened = merging.nearest(*arguments)
    try:
        cpu.level("avx512")  # has no such look
        exact = merging.nearest(*arguments)
    finally:
        cpu.level(cpu.LEVELS[-1])
    assert torch.equal(screened[0], exact[0])
    torch.testing.assert_close(screened[1], exact[1], rtol=0, atol=0, equal_nan=True)


def test_compilers_call_the_same_kernel():
    feature, order = torch.randn(2, 40, 8), positions(2, 40, 40)
    arguments = feature, order[:, :15], order[:, 15:]
    torch.library.opcheck(torch.ops.mambatrim.nearest, arguments)
    made = torch.compile(cosine, backend="eager", fullgraph=True)(*arguments)
    assert torch.equal(made.target, cosine(*arguments).target)
    assert torch.equal(made.similarity, cosine(*arguments).similarity)


@pytest.mark.parametrize(("batch", "gone"), [(1, 0), (2, 1), (3, 6), (2, 12), (0, 4)])
def test_links(batch, gone, monkeypatch):
    order = positions(batch, 13, 13)
    target = order[:, torch.randint(13, (gone,))]  # some are sources themselves
    for function in (
        lambda: Assignment.from_links(order[:, :gone], target, 13),
        lambda: Assignment.from_prune(order[:, :gone], 13),
    ):
        fast, slow = both(function, monkeypatch)
        assert torch.equal(fast.keep, slow.keep) and torch.equal(fast.dest, slow.dest)


@pytest.mark.parametrize("shape", [(3,), (1,), (5, 2), (0,)])
def test_take_rows(shape, monkeypatch):
    x, where = torch.randn(2, 11, *shape), positions(2, 11, 6)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        fast, slow = both(lambda dtype=dtype: take_rows(x.to(dtype), where[:, :4]), monkeypatch)
        assert torch.equal(fast, slow)


@pytest.mark.parametrize(("batch", "columns"), [(1, 1), (3, 19), (2, 300)])
def test_merge(batch, columns, monkeypatch):
    tokens = Tokens.start(torch.randn(batch, 23, columns), (23,))
    steps, weight = [plan(batch, 23, 5), plan(batch, 18, 7)], torch.rand(batch, 23)
    weight[:, :9] = 0.0

    def run():
        return tokens.reduce(steps[0], weight).reduce(steps[1], weight[:, :18])

    fast, slow = both(run, monkeypatch)
    torch.testing.assert_close(fast.x, slow.x, rtol=0, atol=1e-6)
    assert torch.equal(fast.size, slow.size)
    assert torch.equal(fast.origin.keep, slow.origin.keep) and torch.equal(fast.origin.dest, slow.origin.dest)


def test_gradients_take_the_pytorch_form():
    x = torch.randn(1, 6, 4, requires_grad=True)
    Tokens.start(x, (6,)).reduce(plan(1, 6, 2), torch.ones(1, 6)).x.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("wrong", [[[0, 13]], [[-1, 2]], [[4, 4]]])
def test_wrong_positions_are_refused(wrong):
    with pytest.raises(IndexError, match="outside the sequence, or is named twice"):
        Assignment.from_prune(torch.tensor(wrong), 13)
