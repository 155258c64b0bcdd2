"""Scores, ranks and partners, against loops written for the test."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mambatrim.reduction import DELTA, Links, Signals, inverse, matching, rank, scan_score

settings.register_profile("mambatrim", deadline=None, max_examples=40)
settings.load_profile("mambatrim")


def brute_cosine(a: list[float], b: list[float]) -> float:
    na, nb = math.sqrt(sum(v * v for v in a)), math.sqrt(sum(v * v for v in b))
    return sum(p * q for p, q in zip(a, b, strict=True)) / (na * nb) if na and nb else 0.0


BRUTE = {
    "cosine": brute_cosine,
    "l1": lambda a, b: -sum(abs(p - q) for p, q in zip(a, b, strict=True)),
    "l2": lambda a, b: -math.dist(a, b),
}


@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from(sorted(BRUTE)))
def test_pairs_are_arg_max_pairs(seed, batch, n, m, metric):
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(batch, n + m, 5, generator=generator)
    order = torch.stack([torch.randperm(n + m, generator=generator) for _ in range(batch)])
    source, target = order[:, :n], order[:, n:]
    links = getattr(matching, metric)(feature, source, target)
    assert links.target.shape == links.similarity.shape == (batch, n)
    for image in range(batch):
        for k in range(n):
            own = feature[image, source[image, k]].tolist()
            alike = {j: BRUTE[metric](own, feature[image, j].tolist()) for j in target[image].tolist()}
            chosen = int(links.target[image, k])
            best = max(alike.values())
            assert alike[chosen] == pytest.approx(best, abs=1e-5)
            assert float(links.similarity[image, k]) == pytest.approx(best, abs=1e-5)
            runner_up = sorted(alike.values())[-2] if m > 1 else -math.inf
            if best - runner_up > 1e-5:  # no near-tie: then it has to be that very one
                assert chosen == max(alike, key=lambda j: alike[j])


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 7), st.sampled_from(sorted(BRUTE)))
def test_the_nth_best_partner(seed, nth, m, metric):
    feature = torch.randn(1, 3 + m, 5, generator=torch.Generator().manual_seed(seed))
    source, target = torch.arange(3)[None], torch.arange(3, 3 + m)[None]
    links = getattr(matching, metric)(feature, source, target, nth)
    for k in range(3):
        own = feature[0, k].tolist()
        alike = sorted((BRUTE[metric](own, feature[0, j].tolist()) for j in range(3, 3 + m)), reverse=True)
        wanted = alike[min(nth, m) - 1]
        assert float(links.similarity[0, k]) == pytest.approx(wanted, abs=1e-5)
        assert BRUTE[metric](own, feature[0, int(links.target[0, k])].tolist()) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("metric", sorted(BRUTE))
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_blocks_of_sources_change_nothing(monkeypatch, metric, rows):
    # small whole numbers: every product and distance is exact, so that blocks of another size round alike
    feature = torch.randint(-3, 4, (2, 31, 4), generator=torch.Generator().manual_seed(1)).float()
    if metric == "cosine":  # unit vectors of one or four equal entries have exact products
        signs = torch.randint(0, 2, (2, 31, 4), generator=torch.Generator().manual_seed(2)) * 2.0 - 1.0
        feature = signs
    source, target = torch.arange(0, 31, 2).repeat(2, 1), torch.arange(1, 31, 2).repeat(2, 1)
    whole = getattr(matching, metric)(feature, source, target)
    monkeypatch.setattr(matching, "SOURCES_PER_BLOCK", rows)
    blocked = getattr(matching, metric)(feature, source, target)
    assert torch.equal(whole.target, blocked.target) and torch.equal(whole.similarity, blocked.similarity)


def test_no_matrix_larger_than_a_block_is_built(monkeypatch):
    largest = 0
    original = torch.Tensor.__matmul__

    def spy(a, b):
        nonlocal largest
        product = original(a, b)
        largest = max(largest, product.shape[1])
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    monkeypatch.setattr(matching.cpu, "direct", lambda *tensors: False)  # the PyTorch form
    source, target = matching.even_odd(1, 1569)
    matching.cosine(torch.randn(1, 1569, 8), source, target)
    assert largest == matching.SOURCES_PER_BLOCK


@pytest.mark.parametrize("metric", sorted(BRUTE))
def test_zero_norm_tokens_give_no_nan(metric):
    feature = torch.zeros(1, 6, 3)
    feature[0, 5] = 1.0
    links = getattr(matching, metric)(feature, torch.tensor([[0, 1, 5]]), torch.tensor([[2, 3, 4]]))
    assert torch.isfinite(links.similarity).all()
    assert links.target.tolist() == [[2, 2, 2]]


@pytest.mark.parametrize("metric", sorted(BRUTE))
def test_ties_go_to_the_first_target(metric):
    feature = torch.ones(1, 6, 4)
    links = getattr(matching, metric)(feature, torch.tensor([[1, 0]]), torch.tensor([[4, 2, 5]]))
    assert links.target.tolist() == [[4, 4]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.data())
def test_rank_is_a_stable_split(values, data):
    first = data.draw(st.integers(0, len(values)))
    second = data.draw(st.integers(0, len(values) - first))
    groups = rank(torch.tensor([values]).float(), sizes=(first, second))
    expected = sorted(range(len(values)), key=lambda i: values[i])  # Python's sort is stable
    assert groups[0].tolist() == [expected[:first]]
    assert groups[1].tolist() == [expected[first : first + second]]


def test_rank_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"groups of \(3, 2\) tokens do not fit into 4 tokens"):
        rank(torch.zeros(1, 4), sizes=(3, 2))


def test_even_odd_of_an_odd_length():
    source, target = matching.even_odd(2, 5)
    assert source.tolist() == [[0, 2, 4]] * 2 and target.tolist() == [[1, 3]] * 2


def test_strongest_links_are_stable():
    links = Links(torch.tensor([[7, 8, 9, 7]]), torch.tensor([[0.5, 0.9, 0.5, 0.9]]))
    source, target = matching.strongest(torch.tensor([[0, 2, 4, 6]]), links, 3)
    assert source.tolist() == [[2, 6, 0]] and target.tolist() == [[8, 7, 7]]
    with pytest.raises(ValueError, match="5 links were asked for, but there are 4"):
        matching.strongest(torch.tensor([[0, 2, 4, 6]]), links, 5)


def signals_of(dt: torch.Tensor) -> Signals:
    batch, _, length, _ = dt.shape
    size, ids = torch.ones(batch, length), torch.arange(length).repeat(batch, 1)
    return Signals(size, ids, (length,), {"dt": dt, "dt_mean": dt.mean(-1)})


def test_scores_turn_with_the_sequence():
    """Reversed sequence, directions swapped: every token keeps its score, at the mirrored place."""
    dt = torch.rand(2, 2, 9, 6, generator=torch.Generator().manual_seed(0))
    mirrored = dt.flip(2).flip(1)
    expected = DELTA.pool(signals_of(dt)).flip(1)
    torch.testing.assert_close(DELTA.pool(signals_of(mirrored)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(scan_score("dt").pool(signals_of(mirrored)), expected, rtol=0, atol=1e-6)


def test_delta_is_the_mean_over_channels_and_the_sum_over_directions():
    dt = torch.rand(1, 3, 4, 5)
    expected = [[sum(dt[0, s, token].sum().item() / 5 for s in range(3)) for token in range(4)]]
    torch.testing.assert_close(DELTA.pool(signals_of(dt)), torch.tensor(expected))
    torch.testing.assert_close(inverse(DELTA).pool(signals_of(dt)), -torch.tensor(expected))


def test_undeclared_signals_are_refused_by_name():
    signals = signals_of(torch.rand(1, 1, 3, 2))
    assert signals.feature("dt").shape == (1, 3, 2)
    with pytest.raises(ValueError, match="'hidden' was not declared"):
        _ = signals.hidden
    with pytest.raises(ValueError, match="'y_gated' was not declared"):
        signals.feature("y_gated")
