"""Method (what a paper contributes), Reducer (the step between two blocks), and the lift over special tokens."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .assignment import Assignment, or_gone, take_rows
from .schedule import Schedule
from .tokens import SIGNALS, Signals, Tokens


def by_size(signals: Signals) -> Tensor:
    """Weights of a mean over original tokens: (B, M) sizes."""
    return signals.size


def plain(signals: Signals) -> Tensor:
    """Weights of a mean over the tokens as they are now: (B, M) ones."""
    return torch.ones_like(signals.size)


def exact(lifted: Assignment, special: Tensor) -> Assignment:
    """Special tokens keep their true rank among the survivors: the sequence with tokens deleted. The default."""
    return lifted


def centre(lifted: Assignment, special: Tensor) -> Assignment:
    """Put the class token into the middle, whatever was removed on either side (HSA, DyVM)."""
    return _move(lifted, special, torch.full_like(special, lifted.survivors // 2))


def proportional(lifted: Assignment, special: Tensor) -> Assignment:
    """Scale the class token's position by the length, rounded down (R-MeeTo)."""
    return _move(lifted, special, special * lifted.survivors // lifted.length)


def free(patches: int, r: int, d_model: int, d_inner: int) -> int:
    """Cost of a plan that calculates nothing."""
    return 0


@dataclass(frozen=True)
class Method:
    """A way to choose what goes; all choices are functions.

    name: the word for it in tables and on the command line.
    needs: the signals that `plan` and `weight` read.
    plan: (signals of M patch tokens, r) -> Assignment M -> M - r.
    weight: Signals -> (B, M), weights of the mean that merging takes.
    place: (Assignment L -> K, positions (B, n) of special tokens) -> the same with these somewhere else.
    cost: (patches, r, d_model, d_inner) -> MACs of one step.
    source: paper, or where else it comes from.
    """

    name: str
    needs: tuple[str, ...]
    plan: Callable[[Signals, int], Assignment]
    weight: Callable[[Signals], Tensor] = by_size
    place: Callable[[Assignment, Tensor], Assignment] = exact
    cost: Callable[[int, int, int, int], int] = free
    source: str = ""

    def __post_init__(self) -> None:
        for signal in self.needs:
            if signal not in SIGNALS:
                raise ValueError(f"method {self.name!r} needs unknown signal {signal!r}; known: {', '.join(SIGNALS)}")


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

    A sequence policy (`Layout`) would be decided here too, from the tokens that `forward` returns.
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

    def needs(self, block: int) -> tuple[str, ...]:
        """Names of the signals that `block` has to return; none where nothing is removed after it."""
        return self.method.needs if self.schedule.at(block) else ()

    def lengths(self, tokens: int) -> tuple[int, ...]:
        """Tokens, special ones included, that enter every block when the stem makes `tokens`."""
        special = len(self.special)
        return tuple(patches + special for patches in self.schedule.lengths(tokens - special))

    def forward(self, block: int, tokens: Tokens, captured: Mapping[str, Tensor]) -> Tokens:
        """Tokens L -> L - r after `block`; the same object where r is 0.

        Args:
            block: 0-based index of the block that just ran.
            tokens: what left it.
            captured: its signals over the full sequence, by name.
        """
        removed = self.schedule.at(block)
        if removed == 0:
            return tokens
        if self.tokens not in (None, tokens.origin.length):
            raise ValueError(
                f"the reducer was made for {self.tokens} tokens, but the stem made {tokens.origin.length}; "
                "reduce the model for this image size"
            )
        patches = tokens.x.shape[1] - len(self.special)
        if removed >= patches:
            raise ValueError(f"{removed} of {patches} patches cannot go after block {block}; at most {patches - 1} can")
        with _without_autocast(tokens.x):
            step, weight = self._plan(tokens, captured, removed)
        return tokens.reduce(step, weight)

    def _plan(self, tokens: Tokens, captured: Mapping[str, Tensor], removed: int) -> tuple[Assignment, Tensor]:
        """The step over the full sequence, L -> L - r, and the weights (B, L) of its means."""
        special = self._special(tokens)  # (B, n)
        patches = Assignment.from_prune(special, tokens.x.shape[1])  # L -> M
        signals = self._signals(tokens, patches, captured)
        plan = self.method.plan(signals, removed)  # M -> M - r
        if (plan.length, plan.survivors) != (patches.survivors, patches.survivors - removed):
            raise ValueError(
                f"method {self.method.name!r} was to leave {patches.survivors - removed} of {patches.survivors} "
                f"patches, but its plan leaves {plan.survivors} of {plan.length}"
            )
        step = self.method.place(_lift(plan, patches, special), special)
        return step, tokens.size.scatter(1, patches.keep, self.method.weight(signals))

    def _special(self, tokens: Tokens) -> Tensor:
        """(B, n): where the special tokens are now."""
        if not self.special:
            return tokens.origin.dest[:, :0]
        return tokens.where(self.special)

    def _signals(self, tokens: Tokens, patches: Assignment, captured: Mapping[str, Tensor]) -> Signals:
        """What the method declared, of patch tokens only."""
        values = {}
        for name in self.method.needs:
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
        after = [block for block, count in enumerate(self.schedule.removed) if count]
        if not after:
            return self.method.name
        counts = [self.schedule.removed[block] for block in after]
        steps = "removes " + ", ".join(map(str, counts))
        if self.tokens is not None:
            left = [self.tokens - sum(counts[:stage]) for stage in range(len(counts) + 1)]
            steps = " → ".join(map(str, left))
        return f"{self.method.name}, {steps} after blocks {', '.join(map(str, after))}"


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Plans are made in fp32 also when the model runs under autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _of_patches(signal: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Rows of the patch tokens (B, M): signal (B, L, .) or, for axis 2, (B, S, L, .) -> the same with M."""
    if axis == 1:
        return take_rows(signal, positions)
    batch, directions = signal.shape[:2]
    rows = take_rows(signal.flatten(0, 1), positions.repeat_interleave(directions, dim=0))  # (B*S, M, .)
    return rows.unflatten(0, (batch, directions))


def _lift(plan: Assignment, patches: Assignment, special: Tensor) -> Assignment:
    """A plan over patch tokens, M -> K, as a step over the full sequence, L -> K + n; special tokens stay."""
    if special.shape[1] == 0:
        return plan
    kept = patches.keep.gather(1, plan.keep)  # (B, K) positions in the full sequence
    step = Assignment.from_keep(torch.cat([special, kept], dim=1), patches.length)
    arrival = or_gone(step.dest.gather(1, kept), step.survivors).gather(1, plan.dest)  # (B, M)
    return Assignment(step.keep, step.dest.scatter(1, patches.keep, arrival))


def _move(step: Assignment, special: Tensor, to: Tensor) -> Assignment:
    """Give the class token, old position `special` (B, 1), the new position `to` (B, 1); the rest keeps its order."""
    if special.shape[1] != 1:
        raise ValueError(f"only a single special token can be moved, got {special.shape[1]}; use place=exact")
    survivors = step.survivors
    now = step.dest.gather(1, special)  # (B, 1)
    others, free_places = Assignment.from_prune(now, survivors).keep, Assignment.from_prune(to, survivors).keep
    new = torch.zeros_like(step.keep).scatter(1, now, to).scatter(1, others, free_places)  # (B, K)
    return Assignment(
        torch.zeros_like(step.keep).scatter(1, new, step.keep), or_gone(new, survivors).gather(1, step.dest)
    )
