"""Cost: multiply-adds of a part of a model, by kind; a convention is a row of weights over the kinds. Section: blocks
that lose tokens together, and what they cost.

Both live here, and not in `flops.py`, because models make them and may only import from below themselves.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields


@dataclass(frozen=True)
class Cost:
    """Multiply-adds (MACs; for the scan the usual "9 per state" unit).

    projections: in_proj and out_proj, which the scan directions share.
    conv: the causal convolution of one direction.
    scan: x_proj, dt_proj, the recurrence, its D skip and gate, of one direction.
    directions: what the other directions repeat of `conv` and `scan`.
    stem: patch embedding. head: the classifier.
    reduction: scores, matching and merging of the token reduction.
    quirks: what only the counters of the papers count: three padded convolution steps per block, and the class token
        as if it were embedded from a patch.
    """

    projections: int = 0
    conv: int = 0
    scan: int = 0
    directions: int = 0
    stem: int = 0
    head: int = 0
    reduction: int = 0
    quirks: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def total(self, convention: str = "both") -> int:
        """MACs under one of CONVENTIONS."""
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown convention {convention!r}; known: {', '.join(sorted(CONVENTIONS))}")
        counted = CONVENTIONS[convention]
        return sum(getattr(self, field.name) for field in fields(self) if field.name in counted)


_ALWAYS = ("projections", "stem", "head", "reduction")

# kinds that count, with weight one; the others weigh nothing
CONVENTIONS: dict[str, tuple[str, ...]] = {
    # what runs: every direction
    "both": (*_ALWAYS, "conv", "scan", "directions"),
    # the tables of R-MeeTo and DyVM: one direction, and their counters' quirks
    "paper": (*_ALWAYS, "conv", "scan", "quirks"),
    # a tracer that cannot see inside the scan's operator
    "projections": _ALWAYS,
}


@dataclass(frozen=True)
class Section:
    """Blocks in a row between which tokens go; all of them are there at its start. What a schedule is counted with.

    A flat model is one section. Every stage of a pyramid is one, and behind it all places have a token again.

    patches: at its start, special tokens not counted; where a stage has windows, those of one window.
    d_model, d_inner: D and E of its blocks.
    costs: for every block, tokens that enter it (special ones included) -> what it costs for one image.
    after: blocks of the section, counted from 0, after which patches go unless somebody says otherwise.
    special: class and register tokens.
    windows: of one image; each loses as many tokens as the schedule says.
    without_scan: blocks of the section that have no scan, and so no signals of one.
    """

    patches: int
    d_model: int
    d_inner: int
    costs: tuple[Callable[[int], Cost], ...]
    after: tuple[int, ...]
    special: int = 0
    windows: int = 1
    without_scan: tuple[int, ...] = ()

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.costs)
