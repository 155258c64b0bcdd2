"""Sequence policies: what the convolution and the scan of a block make of a sequence that was reduced.

Every published method lets both run over the rows that are left, as if nothing had happened (`AS_IT_STANDS`). But a row
that stands for s tokens was s steps of the recurrence, and its neighbours in the convolution were others. A policy
gives a block what it needs to go on as before: a `Layout`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import cpu, merging
from .tokens import Tokens


@dataclass(frozen=True, eq=False)
class Layout:
    """How a mixer sees a reduced sequence of K rows; None in a field is "as it stands".

    share: (B, K) 1 / number of tokens of the stem that each row stands for.
    repeats: (B, K) factor on the time step of each row.
    convolved: (B, L0) row of every position that the convolution reads; K where the token was pruned.
    scanned: the same of the scan.
    """

    share: Tensor
    repeats: Tensor | None = None
    convolved: Tensor | None = None
    scanned: Tensor | None = None


@dataclass(frozen=True)
class SequencePolicy:
    """What a block is told about a reduced sequence.

    name: the word for it in tables.
    build: tokens -> Layout, or None for "as it stands"; called once after every reduction.
    convolves: whether the convolution reads all positions of the stem, not the rows.
    scans: whether the scan does.
    """

    name: str
    build: Callable[[Tokens], Layout | None]
    convolves: bool = False
    scans: bool = False

    def positions(self, rows: int, stem: int) -> dict[str, int]:
        """Positions that the convolution and the scan of a block run over, where these are not its `rows` rows:
        what the cost of a block takes by name. `stem` tokens left the stem."""
        walked = {"convolved": self.convolves, "scanned": self.scans}
        return {name: stem for name, all_of_them in walked.items() if all_of_them and rows != stem}


def _shared(tokens: Tokens) -> Tensor:
    """(B, K): 1 / size. A row is in at least one place."""
    if cpu.direct(tokens.size) and tokens.size.dtype == torch.float32:
        return merging.inverse(tokens.size)
    return 1 / tokens.size


def _standing(tokens: Tokens) -> None:
    return None


def _stepped(tokens: Tokens) -> Layout:
    return Layout(_shared(tokens), repeats=tokens.size, convolved=tokens.origin.dest)


def _stretched(tokens: Tokens) -> Layout:
    return Layout(_shared(tokens), repeats=tokens.size)


def _spread(tokens: Tokens) -> Layout:
    return Layout(_shared(tokens), convolved=tokens.origin.dest)


def _running(tokens: Tokens) -> Layout:
    return Layout(_shared(tokens), convolved=tokens.origin.dest, scanned=tokens.origin.dest)


def _gathered(tokens: Tokens) -> Layout:
    together = tokens.origin.dest.sort(dim=1, stable=True).values
    return Layout(_shared(tokens), convolved=tokens.origin.dest, scanned=together)


# as all published methods do: the rows that are left are the sequence
AS_IT_STANDS = SequencePolicy("as it stands", _standing)
# exact: the convolution and the scan run over all tokens of the stem, each as its group's row
RUNNING = SequencePolicy("clock running", _running, convolves=True, scans=True)
# the scan takes all steps of a group in one place, that of its row: exact where groups are contiguous
GATHERED = SequencePolicy("clock running, groups gathered", _gathered, convolves=True, scans=True)
# cheap: one step of the scan per group, as long as its tokens' steps together
STEPPED = SequencePolicy("clock running, one step per group", _stepped, convolves=True)
# halves of it, for the ablation
STRETCHED = SequencePolicy("scan alone", _stretched)
SPREAD = SequencePolicy("convolution alone", _spread, convolves=True)
POLICIES = (AS_IT_STANDS, RUNNING, GATHERED, STEPPED, STRETCHED, SPREAD)
