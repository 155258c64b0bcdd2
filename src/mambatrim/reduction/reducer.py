"""Method (what a paper contributes), Reducer (the step between two blocks), and the lift over special tokens."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import cpu, merging
from .assignment import Assignment, or_gone, take_rows
from .choices import by_size, exact
from .schedule import STEM, Schedule, default_stages, named
from .sequence import AS_IT_STANDS, Layout, SequencePolicy
from .tokens import SIGNALS, SPECIAL_SIGNALS, Signals, Tokens


def free(patches: int, r: int, d_model: int, d_inner: int) -> int:
    """Cost of a plan that calculates nothing."""
    return 0


def all_but_one(patches: int) -> int:
    """How many patches can go in one step: all but one."""
    return patches - 1


def half(patches: int) -> int:
    """How many patches can go in one step where even ones are merged into odd ones: half of them, rounded down."""
    return patches // 2


@dataclass(frozen=True)
class Method:
    """A way to choose what goes; all choices are functions.

    name: the word for it in tables and on the command line.
    needs: the signals that `plan` and `weight` read.
    plan: (signals of M patch tokens, r) -> Assignment M -> M - r.
    weight: Signals -> (B, M), weights of the mean that merging takes.
    place: (Assignment L -> K, positions (B, n) of special tokens) -> the same with these somewhere else.
    cost: (patches, r, d_model, d_inner) -> MACs of one step.
    most: patches -> how many of them can go in one step.
    merge: (patch rows (B, M, D), plan, signals) -> (B, K, D), in place of the weighted mean: for operations that are
        not one, such as combining the stream and its last update differently. Other data, such as sizes, follow the
        plan.
    sequence: what convolution and scan make of the reduced sequence; as it stands, by default.
    at_once: (tokens, special ids, signals of the full sequence by name, r) -> the tokens after the same step, made by
        one kernel, or None where that cannot be.
    stages: depth -> blocks after which patches go where nobody says otherwise, 0-based, or STEM.
    source: paper, or where else it comes from.
    """

    name: str
    needs: tuple[str, ...]
    plan: Callable[[Signals, int], Assignment]
    weight: Callable[[Signals], Tensor] = by_size
    place: Callable[[Assignment, Tensor], Assignment] = exact
    cost: Callable[[int, int, int, int], int] = free
    most: Callable[[int], int] = all_but_one
    merge: Callable[[Tensor, Assignment, Signals], Tensor] | None = None
    sequence: SequencePolicy = AS_IT_STANDS
    at_once: Callable[[Tokens, tuple[int, ...], Mapping[str, Tensor], int], Tokens | None] | None = None
    stages: Callable[[int], tuple[int, ...]] = default_stages
    source: str = ""

    def __post_init__(self) -> None:
        known = (*SIGNALS, *SPECIAL_SIGNALS)
        for signal in self.needs:
            if signal not in known:
                raise ValueError(f"method {self.name!r} needs unknown signal {signal!r}; known: {', '.join(known)}")


def _nothing(signals: Signals, r: int) -> Assignment:
    raise ValueError(f"the dense reducer cannot remove {r} tokens; choose a method")


DENSE = Method("dense", (), _nothing, source="null object")


class Reducer(nn.Module):
    """Removes tokens between blocks as its schedule says; without parameters and without state.

    Args:
        method: what goes.
        schedule: after which block how many patches go.
        special: original positions (0 to L0-1) of class and register tokens; they stay, and no method sees them.
        tokens: L0 that schedule and special tokens are meant for, where it is known; sequences of another length are
            then refused, because their class token may stand elsewhere.
    """

    def __init__(
        self, method: Method, schedule: Schedule, special: tuple[int, ...] = (), tokens: int | None = None
    ) -> None:
        super().__init__()
        if len(set(special)) != len(special) or min(special, default=0) < 0:
            raise ValueError(f"special must name different positions from 0 up, got {special}")
        self.method, self.schedule, self.special, self.tokens = method, schedule, tuple(special), tokens

    @staticmethod
    def dense() -> "Reducer":
        """The null object: lets every token pass, whatever the depth."""
        return Reducer(DENSE, Schedule(()))

    def acts(self, block: int) -> bool:
        """Whether tokens go after `block`: a model need not call it elsewhere."""
        return self.schedule.at(block) > 0

    def needs(self, block: int) -> tuple[str, ...]:
        """Names of the signals that `block` has to return; none where nothing is removed after it."""
        if not self.schedule.at(block):
            return ()
        return tuple(name for name in self.method.needs if name in SIGNALS)

    def layout(self, tokens: Tokens) -> Layout | None:
        """What the blocks behind a reduction have to know about the sequence; None where it is as it stands."""
        return None if tokens.x.shape[1] == tokens.origin.length else self.method.sequence.build(tokens)

    def lengths(self, tokens: int) -> tuple[int, ...]:
        """Tokens, special ones included, that enter every block when the stem makes `tokens`.

        Raises:
            ValueError: where a step removes more than the method can.
        """
        special = len(self.special)
        lengths = self.schedule.lengths(tokens - special)
        for block, patches in enumerate((tokens - special, *lengths), start=STEM):
            self._check(block, patches)
        return tuple(patches + special for patches in lengths)

    def _check(self, block: int, patches: int) -> None:
        removed, most = self.schedule.at(block), self.method.most(patches)
        if removed > most:
            raise ValueError(
                f"{removed} of {patches} patches cannot go {named(block)}; at most {most} can "
                f"with method {self.method.name!r}"
            )

    def forward(self, block: int, tokens: Tokens, captured: Mapping[str, Tensor]) -> Tokens:
        """Tokens L -> L - r after `block`; the same object where r is 0.

        Args:
            block: 0-based index of the block that just ran; STEM, where none has.
            tokens: what left it.
            captured: its signals over the full sequence, by name.
        """
        removed = self.schedule.at(block)
        if removed == 0:
            return tokens
        if self.tokens is not None and self.tokens != tokens.origin.length:
            raise ValueError(
                f"the reducer was made for {self.tokens} tokens, but the stem made {tokens.origin.length}; "
                "reduce the model for this image size"
            )
        self._check(block, tokens.x.shape[1] - len(self.special))
        if self.method.at_once is not None:
            reduced = self.method.at_once(tokens, self.special, captured, removed)
            if reduced is not None:
                return reduced
        with _without_autocast(tokens.x):
            # the signals are freed before rows move, which saves as much memory as the stream takes
            step, weight, rows = self._plan(tokens, captured, removed)
        reduced = tokens.reduce(step, weight)
        return reduced if rows is None else reduced.with_x(rows)

    def _plan(
        self, tokens: Tokens, captured: Mapping[str, Tensor], removed: int
    ) -> tuple[Assignment, Tensor, Tensor | None]:
        """The step over the full sequence, L -> L - r, the weights (B, L) of its means, and the rows (B, L - r, D) of
        methods that merge otherwise."""
        special = self._special(tokens)  # (B, n)
        patches = Assignment.from_prune(special, tokens.x.shape[1])  # L -> M
        signals = self._signals(tokens, patches, special, captured)
        plan = self.method.plan(signals, removed)  # M -> M - r
        if (plan.length, plan.survivors) != (patches.survivors, patches.survivors - removed):
            raise ValueError(
                f"method {self.method.name!r} was to leave {patches.survivors - removed} of {patches.survivors} "
                f"patches, but its plan leaves {plan.survivors} of {plan.length}"
            )
        step = self.method.place(_lift(plan, patches, special), special)
        weight = tokens.size.scatter(1, patches.keep, self.method.weight(signals))
        if self.method.merge is None:
            return step, weight, None
        rows = self.method.merge(patches.select(tokens.x), plan, signals)  # (B, K, D)
        where = step.dest.gather(1, patches.keep.gather(1, plan.keep)).unsqueeze(2).expand_as(rows)
        return step, weight, step.select(tokens.x).scatter(1, where, rows.to(tokens.x.dtype))

    def _special(self, tokens: Tokens) -> Tensor:
        """(B, n): where the special tokens are now."""
        if not self.special:
            return tokens.origin.dest[:, :0]
        return tokens.where(self.special)

    def _signals(self, tokens: Tokens, patches: Assignment, special: Tensor, captured: Mapping[str, Tensor]) -> Signals:
        """What the method declared, of patch tokens only."""
        values = {}
        for name in self.method.needs:
            if name in SPECIAL_SIGNALS:
                values[name] = SPECIAL_SIGNALS[name](tokens.x.detach(), special)
                continue
            if name not in captured:
                raise ValueError(f"method {self.method.name!r} needs {name!r}, but the block returned no such signal")
            # plans are made in fp32 and without gradients, whatever the blocks calculate in; detaching the inputs does
            # what no_grad does, and leaves no region of its own in an exported graph
            signal = captured[name].detach().to(torch.float32)
            values[name] = _of_patches(signal, patches.keep, SIGNALS[name]) if self.special else signal
        ids = tokens.origin.keep.gather(1, patches.keep)  # (B, M) original positions
        before = [(ids > position).to(ids.dtype) for position in self.special]
        return Signals(tokens.size.gather(1, patches.keep), ids - sum(before), tokens.grid, values)

    def extra_repr(self) -> str:
        """Method, lengths and blocks: what `print(model)` shows."""
        places = self.schedule.places
        if not places:
            return self.method.name
        counts = [self.schedule.at(block) for block in places]
        steps = "removes " + ", ".join(map(str, counts))
        if self.tokens is not None:
            left = [self.tokens - sum(counts[:stage]) for stage in range(len(counts) + 1)]
            steps = " → ".join(map(str, left))
        after = ", ".join(str(block) for block in places if block != STEM)
        where = [*(["before block 0"] if STEM in places else []), *([f"after blocks {after}"] if after else [])]
        return f"{self.method.name}, {steps} {' and '.join(where)}"


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Plans are made in fp32 also when the model runs under autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _of_patches(signal: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Rows of the patch tokens (B, M): signal (B, L, .) or, for axis 2, (B, S, L, .) -> the same with M."""
    if axis == 1:
        return take_rows(signal, positions)
    batch, directions = signal.shape[:2]
    if cpu.direct(signal, positions) and signal.is_contiguous():
        return merging.take_rows(signal.flatten(0, 1), positions, directions).unflatten(0, (batch, directions))
    rows = take_rows(signal.flatten(0, 1), positions.repeat_interleave(directions, dim=0))  # (B*S, M, .)
    return rows.unflatten(0, (batch, directions))


def _lift(plan: Assignment, patches: Assignment, special: Tensor) -> Assignment:
    """A plan over patch tokens, M -> K, as a step over the full sequence, L -> K + n; special tokens stay.

    Patches keep the order of the plan; special tokens get the places that they have where that is sequence order.
    """
    if special.shape[1] == 0:
        return plan
    if cpu.direct(plan.keep, special):
        return Assignment(*merging.lift((plan.keep, plan.dest), patches.keep, special, patches.length))
    kept = patches.keep.gather(1, plan.keep)  # (B, K) positions in the full sequence
    step = Assignment.from_keep(torch.cat([special, kept], dim=1), patches.length)
    places = Assignment.from_prune(step.dest.gather(1, special), step.survivors).keep  # (B, K) left for the patches
    arrival = or_gone(places, step.survivors).gather(1, plan.dest)  # (B, M)
    return Assignment(step.keep.scatter(1, places, kept), step.dest.scatter(1, patches.keep, arrival))
