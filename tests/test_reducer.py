"""The step between two blocks: special tokens, batches, counts, compilation and export, on a tiny trunk."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mambatrim import methods
from mambatrim.apply import reduce
from mambatrim.reduction import (
    SIGNALS,
    Assignment,
    Cost,
    Method,
    Reducer,
    Schedule,
    Signals,
    Tokens,
    centre,
    exact,
    plain,
    proportional,
)

settings.register_profile("mambatrim", deadline=None, max_examples=40)
settings.load_profile("mambatrim")


class TinyBlock(nn.Module):
    """Mixes along the sequence in both directions and returns the signals that it is asked for."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mix, self.dt = nn.Linear(d_model, d_model), nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tensor, needs: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        update = torch.tanh(self.mix(x.cumsum(1) / x.shape[1] + x))
        dt = nn.functional.softplus(self.dt(x)).unflatten(2, (2, -1)).transpose(1, 2)  # (B, 2, L, E)
        x = x + update
        known = {"hidden": x, "update": update, "dt": dt, "dt_mean": dt.mean(-1), "B": dt, "C": dt}
        return x, {name: {**known, "y": dt, "y_gated": dt}[name] for name in needs}


class TinyTrunk(nn.Module):
    """A flat model of six blocks with special tokens anywhere, written as the models are."""

    depth, d_model, d_inner = 6, 8, 8
    takes_layout = True  # its blocks have no clock, but every method's plans can be tried

    def __init__(self, special: tuple[int, ...] = (6,), patches: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.special, self.patches = special, patches
        self.layers = nn.ModuleList(TinyBlock(self.d_model) for _ in range(self.depth))
        self.reducer = Reducer.dense()

    def num_patches(self, image_size: int | None = None) -> int:
        return self.patches

    def special_tokens(self, image_size: int | None = None) -> tuple[int, ...]:
        return self.special

    def stem_cost(self, image_size: int | None = None) -> Cost:
        return Cost(stem=100)

    def head_cost(self) -> Cost:
        return Cost(head=10)

    def block_cost(self, length: int, convolved: int = 0, scanned: int = 0) -> Cost:
        return Cost(projections=5000 * length, conv=convolved, scan=scanned)

    def trace(self, x: Tensor) -> list[Tokens]:
        """The tokens that enter every block, and those that leave the last."""
        tokens = Tokens.start(x, (3, x.shape[1] // 3))
        seen = [tokens]
        for i, layer in enumerate(self.layers):
            x, captured = layer(tokens.x, self.reducer.needs(i))
            tokens = self.reducer(i, tokens.with_x(x), captured)
            seen.append(tokens)
        return seen

    def forward_features(self, x: Tensor) -> Tokens:
        return self.trace(x)[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).take(self.special)


def images(batch: int, length: int = 13, seed: int = 3) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed))


def equal(a: Assignment, b: Assignment) -> bool:
    return torch.equal(a.keep, b.keep) and torch.equal(a.dest, b.dest)


def in_order(plan: Assignment) -> Assignment:
    """The same plan with its class token, which some papers put elsewhere, at its place in the sequence."""
    return plan.arrange(torch.arange(plan.length).expand_as(plan.dest))


THREE = Schedule((3, 0, 2, 0, 1, 0))
# what is removed by these is gone; by all others it is merged
PRUNING = {"central", "even_spread", "evit", "evit_released", "hsa", "hsa_released", "prune", "random_prune"}
HALF_AT_MOST = {"rmeeto_released", "pumer_released", "utr_released", "utr_released_merge", "utr_released_prune"}
PRUNING |= {"utr_prune", "utr_released_prune"}
EVERY_METHOD = pytest.mark.parametrize("method", sorted(methods.METHODS))
PLACES = st.sets(st.integers(0, 14), max_size=4).map(lambda ids: tuple(sorted(ids, key=lambda i: (i * 7) % 5)))


@given(PLACES, st.integers(0, 2**16), st.sampled_from(sorted(methods.METHODS)), st.data())
def test_special_tokens_survive_once_and_are_found_in_every_image(special, seed, method, data):
    length, chosen = 15, methods.get(method)
    if chosen.place is not exact and len(special) > 1:
        special = special[:1]
    removed = data.draw(st.integers(0, chosen.most(length - len(special))))
    trunk = TinyTrunk(special, length - len(special))
    trunk.reducer = Reducer(chosen, Schedule((0, removed, 0, 0, 0, 0)), special)
    before, after = trunk.trace(images(3, length, seed))[1:3]
    origin = after.origin
    in_order(origin).check()
    patches_kept = origin.keep[~torch.isin(origin.keep, torch.tensor(special, dtype=torch.long))].reshape(3, -1)
    assert (patches_kept.diff(dim=1) > 0).all()
    if chosen.place is exact:
        origin.check()
    assert after.x.shape[1] == length - removed
    for token in special:
        assert ((origin.keep == token).sum(1) == 1).all()  # once
        for image in range(3):
            now = int(origin.dest[image, token])
            assert int(origin.keep[image, now]) == token  # its index is right
            assert origin.dest[image].tolist().count(now) == 1  # and nobody was merged into it
    if special:
        # the values, too, are those that it had before the step
        expected, _ = trunk.layers[1](before.x, ())
        assert torch.equal(after.take(special), expected[:, list(special)])


@EVERY_METHOD
def test_survivors_stay_sorted_and_mass_is_conserved(method):
    trunk = reduce(TinyTrunk(), schedule=THREE, method=method)
    for tokens in trunk.trace(images(4)):
        in_order(tokens.origin).check()
        assert tokens.size.dtype == torch.float32
        # the size of a token is the number of originals that point at it
        for image in range(4):
            dest = tokens.origin.dest[image].tolist()
            assert tokens.size[image].tolist() == [dest.count(k) for k in range(tokens.x.shape[1])]
    assert (tokens.size.sum(1) == (7 if method in PRUNING else 13)).all()


@EVERY_METHOD
def test_an_image_alone_is_the_same_image_in_a_batch(method):
    trunk = reduce(TinyTrunk(), schedule=THREE, method=method)
    batch = images(5)
    together = trunk.forward_features(batch)
    for image in range(5):
        alone = trunk.forward_features(batch[image : image + 1])
        assert torch.equal(alone.origin.keep[0], together.origin.keep[image])
        assert torch.equal(alone.origin.dest[0], together.origin.dest[image])
        torch.testing.assert_close(alone.x[0], together.x[image], rtol=1e-5, atol=1e-6)


@EVERY_METHOD
def test_removing_nothing_is_the_dense_model_to_the_bit(method):
    dense = TinyTrunk()
    nothing = reduce(dense, schedule=Schedule.none(6), method=method)
    x = images(2)
    assert torch.equal(nothing(x), dense(x))
    tokens = Tokens.start(x, (12,))
    assert nothing.reducer(0, tokens, {}) is tokens
    assert dense.reducer(0, tokens, {}) is tokens
    assert nothing.reducer.needs(0) == () == dense.reducer.needs(3)


@EVERY_METHOD
@given(counts=st.lists(st.integers(0, 3), min_size=6, max_size=6))
@settings(max_examples=10)
def test_counts_predicted_are_counts_executed(method, counts):
    left = 12
    for block, count in enumerate(counts):
        counts[block] = min(count, methods.get(method).most(left))
        left -= counts[block]
    trunk = reduce(TinyTrunk(), schedule=Schedule(tuple(counts)), method=method)
    executed = tuple(tokens.x.shape[1] for tokens in trunk.trace(images(2)))
    assert trunk.reducer.lengths(13) == executed[:6]


@EVERY_METHOD
def test_as_many_go_as_can(method):
    most = methods.get(method).most(12)
    assert most == (6 if method in HALF_AT_MOST else 11)
    trunk = reduce(TinyTrunk(), schedule=Schedule((most, 0, 0, 0, 0, 0)), method=method)
    assert trunk.forward_features(images(2)).x.shape == (2, 13 - most, 8)
    with pytest.raises(ValueError, match="removes 12 of 12 patches after block 0; at most 11 can go"):
        reduce(TinyTrunk(), schedule=Schedule((12, 0, 0, 0, 0, 0)), method=method)
    sentence = f"{most + 1} of 12 patches cannot go after block 0; at most {most} can with method '{method}'"
    if most < 11:  # said when the model is reduced, not in its first forward
        with pytest.raises(ValueError, match=sentence):
            reduce(TinyTrunk(), schedule=Schedule((most + 1, 0, 0, 0, 0, 0)), method=method)
    small = Reducer(methods.get(method), Schedule((most + 1,)), (0,))
    with pytest.raises(ValueError, match=sentence):
        small(0, Tokens.start(images(1), (12,)), {})


@EVERY_METHOD
def test_the_global_generator_is_untouched_and_plans_repeat(method):
    trunk = reduce(TinyTrunk(), schedule=THREE, method=method)
    state = torch.get_rng_state()
    first, second = trunk.forward_features(images(2)), trunk.forward_features(images(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first.origin, second.origin)


def short(method: str) -> TinyTrunk:
    """A trunk of two blocks and one step: graphs are built quickly."""
    trunk = TinyTrunk()
    trunk.layers, trunk.depth = trunk.layers[:2], 2
    return reduce(trunk, schedule=Schedule((3, 0)), method=method).eval()


# exporting, below, traces every method strictly; here those that are made differently
@pytest.mark.parametrize("method", ["mtr", "kmedoids", "rmeeto_released", "stm", "utr"])
def test_compiles_as_one_graph(method):
    torch._dynamo.reset()  # every method is a new graph of the same forward
    trunk = short(method)
    compiled = torch.compile(trunk, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images(2)), trunk(images(2)))


@EVERY_METHOD
def test_exports_strictly_with_a_dynamic_batch(method):
    trunk = short(method)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(trunk, (images(2),), dynamic_shapes=dynamic, strict=True)
    for batch in (1, 2, 5):
        torch.testing.assert_close(program.module()(images(batch)), trunk(images(batch)))


def test_tokens_leave_an_exported_function():
    class Features(nn.Module):
        def __init__(self, trunk: TinyTrunk) -> None:
            super().__init__()
            self.trunk = trunk

        def forward(self, x: Tensor) -> Tokens:
            return self.trunk.forward_features(x)

    features = Features(reduce(TinyTrunk(), schedule=THREE)).eval()
    exported = torch.export.export(features, (images(2),), strict=True).module()(images(2))
    expected = features(images(2))
    assert isinstance(exported, Tokens) and equal(exported.origin, expected.origin) and exported.grid == expected.grid


def test_recovery_can_train_through_the_reduction():
    trunk = reduce(TinyTrunk(), schedule=THREE)
    trunk(images(2)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trunk.layers[0].mix.parameters())
    # the timescale of a block decides, but nothing is learnt from the decision
    assert trunk.layers[0].dt.weight.grad is None


def test_plans_are_made_in_fp32_under_autocast():
    seen = []

    def plan(signals: Signals, r: int) -> Assignment:
        seen.append((signals.update.dtype, (signals.hidden @ signals.hidden.transpose(1, 2)).dtype))
        return Assignment.from_prune(torch.zeros(signals.size.shape[0], r, dtype=torch.long), signals.size.shape[1])

    trunk = reduce(TinyTrunk(), schedule=Schedule((1,) + (0,) * 5), method=Method("spy", ("update", "hidden"), plan))
    with torch.autocast("cpu", torch.bfloat16):
        trunk(images(1))
    assert seen == [(torch.float32, torch.float32)]


@pytest.mark.parametrize("special", [(), (0,), (4, 9), (12, 3)])
def test_signals_are_of_patches_only_in_sequence_order(special):
    """Every signal carries its token's original position; methods must see just the patches', at two stages."""
    seen: list[Signals] = []

    def plan(signals: Signals, r: int) -> Assignment:
        seen.append(signals)
        return Assignment.from_prune(torch.arange(r).repeat(2, 1) * 2, signals.size.shape[1])

    reducer = Reducer(Method("spy", tuple(SIGNALS), plan), Schedule((3, 2)), special)
    tokens = Tokens.start(torch.arange(13.0).reshape(1, 13, 1).repeat(2, 1, 4), (13 - len(special),))
    for block in (0, 1):
        x = tokens.x
        captured = {name: x if axis == 1 else x.unsqueeze(1).repeat(1, 3, 1, 1) for name, axis in SIGNALS.items()}
        captured["dt_mean"] = captured["dt"][..., 0]
        tokens = reducer(block, tokens, captured)
    patches = [token for token in range(13) if token not in special]
    left = [token for token in patches if patches.index(token) not in (0, 2, 4)]
    for signals, expected in zip(seen, (patches, left), strict=True):
        assert signals.ids.tolist() == [[patches.index(token) for token in expected]] * 2
        for name in SIGNALS:
            assert (signals.feature(name)[..., 0] == torch.tensor(expected)).all()
            assert (signals.feature(name)[..., -1] == torch.tensor(expected)).all()


def test_the_papers_other_places_for_the_class_token():
    def first(signals: Signals, r: int) -> Assignment:
        return Assignment.from_prune(torch.arange(r).repeat(2, 1), signals.size.shape[1])

    x = torch.arange(13.0).reshape(1, 13, 1).repeat(2, 1, 1)
    for place, expected in (
        (centre, [4, 5, 7, 8, 6, 9, 10, 11, 12]),  # index 9 // 2
        (proportional, [4, 5, 7, 8, 6, 9, 10, 11, 12]),  # index 6 * 9 // 13
    ):
        reducer = Reducer(Method("first", (), first, plain, place), Schedule((4,)), (6,))
        tokens = reducer(0, Tokens.start(x, (12,)), {})
        assert tokens.x[..., 0].tolist() == [expected] * 2
        assert tokens.take((6,)).flatten().tolist() == [6.0, 6.0]
        assert tokens.origin.dest.gather(1, tokens.origin.keep).tolist() == [list(range(9))] * 2
    two = Reducer(Method("first", (), first, plain, centre), Schedule((4,)), (6, 0))
    with pytest.raises(ValueError, match="only a single special token can be moved, got 2"):
        two(0, Tokens.start(x, (11,)), {})


def test_dense_rows_and_pruned_rows():
    tokens = Tokens.start(torch.arange(5.0).reshape(1, 5, 1), (5,))
    pruned = tokens.reduce(Assignment.from_prune(torch.tensor([[1, 4]]), 5), tokens.size)
    assert pruned.dense(-1.0).flatten().tolist() == [0, -1, 2, 3, -1]
    assert pruned.take((3, 4, 0)).flatten().tolist() == [3, 0, 0]
    merged = tokens.reduce(Assignment.from_links(torch.tensor([[1, 4]]), torch.tensor([[2, 2]]), 5), tokens.size)
    mean = (1 + 2 + 4) / 3
    torch.testing.assert_close(merged.dense().flatten(), torch.tensor([0, mean, mean, 3, mean]))
    with pytest.raises(ValueError, match="token 5 does not exist"):
        pruned.take((5,))


def test_reduce_leaves_the_model_dense_and_shares_its_weights():
    dense = TinyTrunk()
    expected, keys = dense(images(2)), list(dense.state_dict())
    fast = reduce(dense, schedule=THREE)
    assert fast is not dense and fast.layers is dense.layers
    assert fast.forward_features(images(2)).x.shape[1] == 7
    assert torch.equal(dense(images(2)), expected)
    assert list(fast.state_dict()) == list(dense.state_dict()) == keys
    independent = copy.deepcopy(fast)
    with torch.no_grad():
        dense.layers[0].mix.weight.zero_()
    assert not fast.layers[0].mix.weight.any() and independent.layers[0].mix.weight.any()


def test_the_reducer_tells_the_truth_when_printed():
    shown = str(reduce(TinyTrunk(), schedule=THREE, method="mtr").reducer)
    assert shown == "Reducer(mtr, 13 → 10 → 8 → 7 after blocks 0, 2, 4)"
    assert str(Reducer(methods.mtr(), THREE, (0,))) == "Reducer(mtr, removes 3, 2, 1 after blocks 0, 2, 4)"
    assert str(Reducer.dense()) == "Reducer(dense)"


def test_mistakes_are_named():
    trunk = TinyTrunk()
    tokens = Tokens.start(images(1), (12,))
    with pytest.raises(ValueError, match="exactly one of flops_reduction and schedule"):
        reduce(trunk)
    with pytest.raises(ValueError, match="exactly one"):
        reduce(trunk, 0.3, THREE)
    with pytest.raises(ValueError, match="did you mean 'mtr'"):
        reduce(trunk, 0.3, method="mttr")
    with pytest.raises(ValueError, match="factory has to be called"):
        reduce(trunk, 0.3, method=methods.mtr)
    with pytest.raises(ValueError, match="for the 6 blocks"):
        reduce(trunk, schedule=Schedule((1,)))
    with pytest.raises(ValueError, match="Linear has none"):
        reduce(nn.Linear(1, 1), 0.3)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        reduce(torch.compile(trunk, backend="eager"), 0.3)
    with pytest.raises(ValueError, match="needs 'dt_mean', but the block returned no such signal"):
        Reducer(methods.mtr(), THREE)(0, tokens, {})
    with pytest.raises(ValueError, match="made for 13 tokens, but the stem made 12"):
        reduce(trunk, schedule=THREE)(images(1, 12))
    with pytest.raises(ValueError, match="different positions"):
        Reducer(methods.mtr(), THREE, (0, 0))
    with pytest.raises(ValueError, match="needs unknown signal 'delta'"):
        Method("m", ("delta",), lambda signals, r: Assignment.identity(1, 1))
    keep_all = Method("m", (), lambda signals, r: Assignment.identity(1, 13))
    with pytest.raises(ValueError, match="'m' was to leave 10 of 13 patches, but its plan leaves 13 of 13"):
        Reducer(keep_all, THREE)(0, tokens, {})
