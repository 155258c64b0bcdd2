"""The algebra of plans: every guarantee of Assignment as a property."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrim.reduction import Assignment, take_rows

settings.register_profile("mambatrim", deadline=None, max_examples=40)
settings.load_profile("mambatrim")

SEEDS = st.integers(0, 2**16)


def some_assignment(generator: torch.Generator, batch: int, length: int, removed: int) -> Assignment:
    """Random hybrid plan: of the removed tokens every third is pruned, the others are merged; targets may be shared."""
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])
    source, rest = order[:, :removed], order[:, removed:]
    pick = torch.randint(0, length - removed, (batch, removed), generator=generator)
    target = rest.gather(1, pick)
    target[:, ::3] = source[:, ::3]  # a link to itself, which is gone: pruned
    return Assignment.from_links(source, target, length)


@st.composite
def assignments(draw, steps: int = 1) -> list[Assignment]:
    """A chain of random plans, each on what the one before left."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 13))
    chain = []
    for _ in range(steps):
        removed = draw(st.integers(0, length - 1))
        chain.append(some_assignment(generator, batch, length, removed))
        length -= removed
    return chain


def equal(a: Assignment, b: Assignment) -> bool:
    return torch.equal(a.keep, b.keep) and torch.equal(a.dest, b.dest)


def matrix(a: Assignment) -> torch.Tensor:
    """The plan as 0/1 matrices (B, K, L), built entry by entry."""
    dense = torch.zeros(a.keep.shape[0], a.survivors, a.length, dtype=torch.float64)
    for image, row in enumerate(a.dest.tolist()):
        for old, new in enumerate(row):
            if new < a.survivors:
                dense[image, new, old] = 1
    return dense


@given(assignments())
def test_survivors_are_sorted_and_land_at_their_rank(chain):
    (a,) = chain
    a.check()
    assert (a.keep.diff(dim=1) > 0).all()
    assert torch.equal(a.dest.gather(1, a.keep), torch.arange(a.survivors).expand_as(a.keep))


@given(assignments(steps=3))
def test_then_is_associative_and_has_an_identity(chain):
    a, b, c = chain
    assert equal(a.then(b).then(c), a.then(b.then(c)))
    a.then(b).then(c).check()
    batch = a.keep.shape[0]
    assert equal(Assignment.identity(batch, a.length).then(a), a)
    assert equal(a.then(Assignment.identity(batch, a.survivors)), a)


@given(assignments(steps=2))
def test_then_is_the_product_of_the_maps(chain):
    a, b = chain
    assert torch.equal(matrix(a.then(b)), matrix(b) @ matrix(a))


def test_targets_of_an_earlier_step_are_merged_later():
    first = Assignment.from_links(torch.tensor([[1]]), torch.tensor([[2]]), 5)  # 1 -> 2
    second = Assignment.from_links(torch.tensor([[1]]), torch.tensor([[3]]), 4)  # old 2 -> old 4
    both = first.then(second)
    assert both.keep.tolist() == [[0, 3, 4]]
    assert both.dest.tolist() == [[0, 2, 2, 1, 2]]
    pruned = first.then(Assignment.from_prune(torch.tensor([[1]]), 4))
    assert pruned.dest.tolist() == [[0, 3, 3, 1, 2]]


@given(assignments(), SEEDS)
def test_merge_is_the_weighted_mean(chain, seed):
    (a,) = chain
    generator = torch.Generator().manual_seed(seed)
    batch = a.keep.shape[0]
    x = torch.randn(batch, a.length, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(batch, a.length, generator=generator, dtype=torch.float64) + 0.1
    rows = matrix(a) * weight[:, None]
    expected = (rows @ x) / rows.sum(2, keepdim=True)
    torch.testing.assert_close(a.merge(x, weight), expected, rtol=1e-12, atol=1e-12)


@given(assignments(), SEEDS)
def test_merge_of_h_and_res_is_merge_of_their_sum(chain, seed):
    (a,) = chain
    generator = torch.Generator().manual_seed(seed)
    h, res = torch.randn(2, a.keep.shape[0], a.length, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(a.keep.shape[0], a.length, generator=generator, dtype=torch.float64) + 0.1
    torch.testing.assert_close(a.merge(h, weight) + a.merge(res, weight), a.merge(h + res, weight))


@given(assignments(steps=2), SEEDS)
def test_merging_twice_by_size_is_merging_once(chain, seed):
    a, b = chain
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(a.keep.shape[0], a.length, 2, generator=generator, dtype=torch.float64)
    size = torch.ones(a.keep.shape[0], a.length, dtype=torch.float64)
    twice = b.merge(a.merge(x, size), a.sum(size))
    torch.testing.assert_close(twice, a.then(b).merge(x, size))
    assert torch.equal(b.sum(a.sum(size)), a.then(b).sum(size))


@given(assignments(), SEEDS)
def test_unmerge_undoes_merge_up_to_the_mean(chain, seed):
    (a,) = chain
    y = torch.randn(a.keep.shape[0], a.survivors, 2, generator=torch.Generator().manual_seed(seed))
    spread = a.unmerge(y, fill=7.0)
    gone = a.dest == a.survivors
    assert torch.equal(spread[gone], torch.full_like(spread[gone], 7.0))
    assert torch.equal(a.select(spread), y)
    torch.testing.assert_close(a.merge(spread, torch.ones(gone.shape)), y)


@given(st.integers(1, 3), st.integers(2, 15), st.data())
def test_total_size_is_conserved_by_merging_and_lost_by_pruning(batch, length, data):
    removed = data.draw(st.integers(0, length - 1))
    order = torch.stack([torch.randperm(length) for _ in range(batch)])
    source, rest = order[:, :removed], order[:, removed:]
    size = torch.randint(1, 5, (batch, length)).float()
    merged = Assignment.from_links(source, rest[:, :1].expand(-1, removed), length)
    assert torch.equal(merged.sum(size).sum(1), size.sum(1))
    pruned = Assignment.from_prune(source, length)
    assert torch.equal(pruned.sum(size).sum(1), rest.sort(1).values.ge(0).mul(size.gather(1, rest)).sum(1))


@given(assignments(), SEEDS)
def test_lonely_tokens_keep_their_value_to_the_bit(chain, seed):
    (a,) = chain
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(a.keep.shape[0], a.length, 5, generator=generator)
    weight = torch.rand(a.keep.shape[0], a.length, generator=generator) * 3 + 0.01
    alone = matrix(a).sum(2) == 1
    merged = a.merge(x, weight)
    assert torch.equal(merged[alone], a.select(x)[alone])


def test_identity_merges_to_the_same_bits():
    x = torch.randn(2, 7, 3)
    identity = Assignment.identity(2, 7)
    assert torch.equal(identity.merge(x, torch.full((2, 7), 3.0)), x)
    nobody = torch.zeros(2, 0, dtype=torch.long)
    assert equal(Assignment.from_links(nobody, nobody, 7), identity)
    assert equal(Assignment.from_prune(nobody, 7), identity)


def test_zero_weights_do_not_divide_by_zero():
    a = Assignment.from_links(torch.tensor([[0, 1]]), torch.tensor([[2, 2]]), 4)
    x = torch.arange(8.0).reshape(1, 4, 2).requires_grad_()
    weight = torch.zeros(1, 4, requires_grad=True)
    merged = a.merge(x, weight)
    assert torch.equal(merged, x[:, 2:])  # the survivors' own values
    merged.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


def test_what_is_pruned_cannot_poison_what_stays():
    x = torch.ones(2, 5, 3)
    x[:, 1] = float("nan")
    a = Assignment.from_prune(torch.tensor([[1], [1]]), 5)
    assert torch.equal(a.merge(x, torch.ones(2, 5)), torch.ones(2, 4, 3))


def test_merge_keeps_the_dtype():
    a = Assignment.from_links(torch.tensor([[0]]), torch.tensor([[1]]), 3)
    x = torch.tensor([[[1.0], [3.0], [5.0]]], dtype=torch.bfloat16)
    merged = a.merge(x, torch.ones(1, 3))
    assert merged.dtype == torch.bfloat16 and merged.flatten().tolist() == [2.0, 5.0]


def test_gradients_flow_through_merge_and_unmerge():
    a = Assignment.from_links(torch.tensor([[3, 0]]), torch.tensor([[1, 1]]), 5)
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(1, 5, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda x: a.unmerge(a.merge(x, weight)), x)


@given(assignments(steps=2), SEEDS)
def test_arranging_moves_rows_and_nothing_else(chain, seed):
    a, b = chain
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(0, 3, a.dest.shape, generator=generator)  # with ties, which keep their order
    other = a.arrange(key)
    for image, row in enumerate(a.keep.tolist()):
        assert other.keep[image].tolist() == sorted(row, key=lambda old: int(key[image, old]))
    x = torch.randn(*a.dest.shape, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(a.dest.shape, generator=generator, dtype=torch.float64) + 0.1
    order = torch.argsort(key.gather(1, a.keep), dim=1, stable=True)
    torch.testing.assert_close(other.merge(x, weight), take_rows(a.merge(x, weight), order))
    assert torch.equal(matrix(other), matrix(a).gather(1, order.unsqueeze(2).expand(-1, -1, a.length)))
    positions = torch.arange(a.length).expand_as(a.dest)
    assert equal(other.arrange(positions), a)
    # the next step sees the new order
    assert torch.equal(matrix(other.then(b)), matrix(b) @ matrix(other))


def test_from_keep_sorts_and_prunes_the_rest():
    a = Assignment.from_keep(torch.tensor([[4, 0, 2], [1, 3, 2]]), 5)
    assert a.keep.tolist() == [[0, 2, 4], [1, 2, 3]]
    assert a.dest.tolist() == [[0, 3, 1, 3, 2], [3, 0, 1, 2, 3]]


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 3), (2, 6, 3, 2)])
def test_take_rows_matches_indexing(shape):
    x = torch.randn(shape)
    positions = torch.tensor([[5, 0, 0], [2, 3, 1]])
    expected = torch.stack([x[image, positions[image]] for image in range(2)])
    assert torch.equal(take_rows(x, positions), expected)


def test_errors_say_what_is_allowed():
    with pytest.raises(ValueError, match="source names 4 tokens, but there are only 3"):
        Assignment.from_prune(torch.zeros(1, 4, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="one shape"):
        Assignment.from_links(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="takes 4 tokens, but this one leaves 3"):
        Assignment.identity(1, 3).then(Assignment.identity(1, 4))


@pytest.mark.parametrize(
    ("keep", "dest", "message"),
    [
        ([[1, 0]], [[1, 0, 2]], "ascending"),
        ([[0, 3]], [[0, 2, 1]], "positions from 0 to 2"),
        ([[0, 1]], [[0, 1, 3]], "2 for gone"),
        ([[0, 1]], [[0, 0, 1]], "send the survivor"),
    ],
)
def test_check_names_the_broken_guarantee(keep, dest, message):
    with pytest.raises(ValueError, match=message):
        Assignment(torch.tensor(keep), torch.tensor(dest)).check()
