"""Tokens: all that travels between blocks. Signals: what a method may look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import cpu, merging, steps
from .assignment import Assignment, take_rows

# names that a block can return, and the axis of the tokens in each: 1 in (B, L, .), 2 in (B, S, L, .)
SIGNALS: dict[str, int] = {
    "hidden": 1,
    "update": 1,
    "dt": 2,
    "dt_mean": 2,
    "B": 2,
    "C": 2,
    "y": 2,
    "y_gated": 2,
}


def _patches_before(x: Tensor, special: Tensor) -> Tensor:
    """special (B, n) positions in the full sequence -> how many patches stand before each."""
    return special - (special.unsqueeze(1) < special.unsqueeze(2)).sum(dim=2)


# names that the reducer itself answers, from the stream (B, L, D) and the positions (B, n) of class and registers
SPECIAL_SIGNALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "special": take_rows,
    "special_at": _patches_before,
}


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens between two blocks.

    x: (B, L, D) residual stream, fp32.
    size: (B, L) fp32, how many tokens of the stem each one stands for.
    origin: L0 -> L, where every token of the stem is now.
    grid: patch grid of the stem, (h, w) or (t, h, w).
    """

    x: Tensor
    size: Tensor
    origin: Assignment
    grid: tuple[int, ...]

    @staticmethod
    def start(x: Tensor, grid: tuple[int, ...]) -> "Tokens":
        """Tokens as they leave the stem: x (B, L0, D), each of size one."""
        size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        return Tokens(x, size, Assignment.identity(x.shape[0], x.shape[1], x.device), grid)

    def with_x(self, x: Tensor) -> "Tokens":
        """The same tokens with new values (B, L, D)."""
        return Tokens(x, self.size, self.origin, self.grid)

    def reduce(self, assignment: Assignment, weight: Tensor) -> "Tokens":
        """Apply a step L -> K: rows become means weighted by `weight` (B, L), sizes add up, origins compose."""
        fp32 = self.x.dtype == weight.dtype == self.size.dtype == torch.float32
        if fp32 and cpu.direct(self.x, weight, self.size, assignment.keep, self.origin.keep):
            step, before = ((a.keep, a.dest) for a in (assignment, self.origin))
            x, size, after = merging.merge(self.x, weight, self.size, step, before)
            return Tokens(x, size, Assignment(*after), self.grid)
        return Tokens(
            assignment.merge(self.x, weight), assignment.sum(self.size), self.origin.then(assignment), self.grid
        )

    def before(self, special: tuple[int, ...]) -> steps.Before:
        """What a step as one kernel is made of."""
        return steps.Before(self.x, self.size, self.origin.keep, self.origin.dest, special)

    def after(self, step: steps.After) -> "Tokens":
        """The tokens that it left."""
        return Tokens(step.x, step.size, Assignment(step.keep, step.dest), self.grid)

    def where(self, ids: tuple[int, ...]) -> Tensor:
        """(B, n): positions now of the tokens that the stem put at `ids`."""
        length = self.origin.length
        for token in ids:
            if not 0 <= token < length:
                raise ValueError(f"token {token} does not exist: the stem made tokens 0 to {length - 1}")
        if not ids:
            return self.origin.dest[:, :0]
        if len(ids) == 1:
            return self.origin.dest.narrow(1, ids[0], 1)
        if cpu.direct(self.origin.dest) and self.origin.dest.is_contiguous():
            return merging.take_rows(self.origin.dest, torch.tensor(ids).expand(len(self.x), -1))
        # a stack of columns and not an index list, which would be copied to the device in every forward
        return torch.stack([self.origin.dest[:, token] for token in ids], dim=1)

    def take(self, ids: tuple[int, ...]) -> Tensor:
        """(B, n, D): rows in which the tokens of original positions `ids` are now; zeros where one was pruned."""
        position, kept = self.where(ids), self.x.shape[1]
        if cpu.direct(self.x, position) and self.x.is_contiguous():
            return merging.take_rows(self.x, position, or_zeros=True)
        rows = take_rows(self.x, position.clamp(max=kept - 1))
        return rows.masked_fill((position == kept).unsqueeze(2), 0.0)

    def dense(self, fill: float = 0.0) -> Tensor:
        """(B, L0, D): every token of the stem with the row it is in now; `fill` where it was pruned."""
        return self.origin.unmerge(self.x, fill)


@dataclass(frozen=True, eq=False)
class Signals:
    """What a method sees: the M patch tokens in sequence order, in every scan direction; fp32, without gradients.

    size: (B, M) how many original tokens each stands for.
    ids: (B, M) which patch of the stem's grid each is, counted in raster order without special tokens.
    grid: the stem's patch grid.
    values: the declared signals by name. Read them as attributes: an undeclared one raises ValueError.
    """

    size: Tensor
    ids: Tensor
    grid: tuple[int, ...]
    values: Mapping[str, Tensor]

    @property
    def hidden(self) -> Tensor:
        """(B, M, D) residual stream after the block."""
        return self._read("hidden")

    @property
    def update(self) -> Tensor:
        """(B, M, D) what the block's mixer added to it."""
        return self._read("update")

    @property
    def dt(self) -> Tensor:
        """(B, S, M, E) timescale after bias and softplus."""
        return self._read("dt")

    @property
    def dt_mean(self) -> Tensor:
        """(B, S, M) mean of `dt` over its E channels."""
        return self._read("dt_mean")

    @property
    def B(self) -> Tensor:
        """(B, S, M, N) input matrix of the recurrence."""
        return self._read("B")

    @property
    def C(self) -> Tensor:
        """(B, S, M, N) output matrix of the recurrence."""
        return self._read("C")

    @property
    def y(self) -> Tensor:
        """(B, S, M, E) output of the scan before the gate."""
        return self._read("y")

    @property
    def y_gated(self) -> Tensor:
        """(B, S, M, E) output of the scan after the gate."""
        return self._read("y_gated")

    @property
    def special(self) -> Tensor:
        """(B, n, D) rows of the class and register tokens; n is 0 where a model has none."""
        return self._read("special")

    @property
    def special_at(self) -> Tensor:
        """(B, n) int64: how many of the M patch tokens stand before each class or register token."""
        return self._read("special_at")

    def feature(self, name: str) -> Tensor:
        """(B, M, F): a signal as one vector per token; the channels of several directions are joined."""
        value = self._read(name)
        return value if SIGNALS[name] == 1 else value.transpose(1, 2).flatten(2)

    def _read(self, name: str) -> Tensor:
        if name not in self.values:
            declared = ", ".join(self.values) or "none"
            raise ValueError(f"signal {name!r} was not declared in the method's needs; declared: {declared}")
        return self.values[name]


# needed before a function that returns Tokens (a model's forward_features) can be exported
torch.export.register_dataclass(Tokens, serialized_type_name="mambatrim.Tokens")
