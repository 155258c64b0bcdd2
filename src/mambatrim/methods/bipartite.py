"""Bipartite soft matching: one set of tokens looks for partners in the other, and the r strongest links are merged.

ToMe (arXiv 2210.09461), its 2-D windows (tomesd, arXiv 2303.17604), R-MeeTo (arXiv 2412.12496), Famba-V
(arXiv 2409.09808), and the merging half of PuMer (arXiv 2305.17530). None of them scores importance. At most half of
the tokens can be merged into the other half: where r is larger, the rest goes in another round, on merged features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..names import lookup
from ..reduction import (
    FEATURES,
    Assignment,
    Feature,
    Links,
    Method,
    Schedule,
    Signals,
    by_size,
    merged,
    plain,
    pruned,
    restored,
)
from ..reduction.matching import cosine, even_odd, l1, l2, lattice, strongest, unit, windows
from ..reduction.reducer import all_but_one, half
from ..reduction.scores import averaged, clipped, joined

MATCHES: dict[str, Callable[..., Links]] = {"cosine": cosine, "l1": l1, "l2": l2}


@dataclass(frozen=True)
class Split:
    """Two sets of tokens.

    divide: (ids (B, M), grid, r) -> sources (B, n), targets (B, m).
    sizes: (patches, r) -> n, m, for the FLOPs.
    most: patches -> how many can go in one round.
    """

    divide: Callable[[Tensor, tuple[int, ...], int], tuple[Tensor, Tensor]]
    sizes: Callable[[int, int], tuple[int, int]]
    most: Callable[[int], int]


def _one_per_window(ids: Tensor, grid: tuple[int, ...], r: int) -> tuple[Tensor, Tensor]:
    return lattice(ids, grid, min(windows(grid), ids.shape[1] - r))


PARITY = Split(
    lambda ids, grid, r: even_odd(ids.shape[0], ids.shape[1], ids.device),
    lambda patches, r: (patches - patches // 2, patches // 2),
    half,
)
# the FLOPs take a quarter of the tokens as targets, which is exact before the first step of an even grid
WINDOWS = Split(_one_per_window, lambda patches, r: (patches - _quarter(patches, r), _quarter(patches, r)), all_but_one)


def _quarter(patches: int, r: int) -> int:
    return max(1, min(-(-patches // 4), patches - r))


@dataclass(frozen=True)
class Pairing:
    """How tokens find their partners, and what becomes of them; the plan of every method in this file.

    feature: what similarity is measured on. match: `cosine`, `l1` or `l2` of `reduction.matching`.
    split: PARITY or WINDOWS. partner: 1 for the most similar one, 3 for the third most similar, ...
    combine: `merged` or `pruned`. order: `restored`, or `as_grouped`: unmerged sources by falling similarity, then all
    targets, as the code of ToMe leaves them.
    """

    feature: Feature
    match: Callable[..., Links] = cosine
    split: Split = PARITY
    partner: int = 1
    combine: Callable[[Tensor, Tensor, int], Assignment] = merged
    order: Callable[[Assignment, Tensor], Assignment] = restored

    def __post_init__(self) -> None:
        if not isinstance(self.partner, int) or self.partner < 1:
            raise ValueError(f"partner must be 1 for the most similar token, 2 for the next, ..., got {self.partner!r}")
        for name, allowed in (("combine", "merged or pruned"), ("order", "restored or as_grouped")):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name} must be a function such as {allowed}, got {getattr(self, name)!r}")

    def plan(self, signals: Signals, r: int) -> Assignment:
        """M -> M - r."""
        return self._plan(self.feature.read(signals), signals.size, signals.ids, signals.grid, r)

    def _plan(self, feature: Tensor, size: Tensor, ids: Tensor, grid: tuple[int, ...], r: int) -> Assignment:
        count = min(r, self.split.most(ids.shape[1]))
        source, target = self.split.divide(ids, grid, count)
        links = self.match(feature, source, target, self.partner)
        key = torch.full(feature.shape[:2], torch.inf, device=feature.device).scatter(1, source, -links.similarity)
        step = self.order(self.combine(*strongest(source, links, count), ids.shape[1]), key)
        if count == r:
            return step
        # another round, on what the first leaves
        rest = self._plan(step.merge(feature, size), step.sum(size), step.select(ids), grid, r - count)
        return step.then(rest)

    def cost(self, patches: int, r: int, d_model: int, d_inner: int) -> int:
        """Unit vectors, the products of sources with targets, and the mean."""
        count, f = min(r, self.split.most(patches)), self.feature.width(d_model, d_inner)
        sources, targets = self.split.sizes(patches, count)
        own = patches * f + sources * targets * f + count * d_model
        return own if count == r else own + self.cost(patches - count, r - count, d_model, d_inner)

    def method(self, name: str, weight: Callable[[Signals], Tensor], source: str) -> Method:
        """The method that plans like this."""
        if not callable(weight):
            raise ValueError(f"weight of {name} must be a function such as by_size or plain, got {weight!r}")
        return Method(name, self.feature.needs, self.plan, weight, cost=self.cost, source=source)


def tome(
    feature: str = "hidden",
    split: Split = PARITY,
    weight: Callable[[Signals], Tensor] = by_size,
    order: Callable[[Assignment, Tensor], Assignment] = restored,
) -> Method:
    """ToMe: even tokens look for the most similar odd one, the r strongest links are merged by size.

    arXiv 2210.09461, section 3. Its feature is the attention keys, which a Mamba has not: here the residual stream by
    default. It leaves the tokens unordered, which `order=as_grouped` does. It merges inside a block, between attention
    and MLP; a Mamba block has no such place. Proportional attention has no counterpart.

    Args:
        feature: one of FEATURES. split: PARITY, or WINDOWS for one target per 2x2 window of the image. weight:
        `by_size` or `plain`. order: `restored` or `as_grouped`.
    """
    if not isinstance(split, Split):
        raise ValueError(f"split of tome must be PARITY or WINDOWS, got {split!r}")
    pairing = Pairing(lookup("feature of tome", feature, FEATURES), split=split, order=order)
    return pairing.method("tome", weight, "arXiv 2210.09461")


def tomesd(feature: str = "hidden") -> Method:
    """ToMe for diffusion: in every 2x2 window of the image one token receives, and the other three may be merged.

    arXiv 2303.17604, choice of the destinations, as a grouping. The receiver is drawn at random there, here it is the
    top left token; the paper takes a plain mean and puts all tokens back after each layer, which saves nothing in a
    Mamba.
    """
    found = lookup("feature of tomesd", feature, FEATURES)
    return Pairing(found, split=WINDOWS).method("tomesd", by_size, "arXiv 2303.17604")


RMEETO_FEATURES: dict[str, Feature] = {
    "update": joined("update"),
    "B": averaged("B"),
    "C": averaged("C"),
    "dt": averaged("dt"),
}


def rmeeto(
    feature: str = "update",
    distance: str = "cosine",
    partner: int = 1,
    combine: Callable[[Tensor, Tensor, int], Assignment] = merged,
    weight: Callable[[Signals], Tensor] = by_size,
    order: Callable[[Assignment, Tensor], Assignment] = restored,
) -> Method:
    """R-MeeTo without its re-training: ToMe on the mixer's output, in sequence order.

    arXiv 2412.12496, token merging; in the paper re-training follows. `rmeeto_released` has what its code does
    otherwise: the class token's drift, the jump before the last merge, B and C of the backward direction in the wrong
    order.

    Args:
        feature: "update", the output of the mixer (X there), or "B", "C", "dt", the mean of the two directions; its
            delta is taken before bias and softplus, here after them.
        distance: "cosine", "l1" or "l2", between vectors of length one.
        partner: 1, or 3, 5, ... for the third, fifth most similar token (its ablation).
        combine: `merged` or `pruned`. weight: `by_size` or `plain`. order: `restored` or `as_grouped`.
    """
    found = lookup("feature of rmeeto", feature, RMEETO_FEATURES)
    match = lookup("distance of rmeeto", distance, MATCHES)
    pairing = Pairing(of_length_one(found), match, partner=partner, combine=combine, order=order)
    return pairing.method("rmeeto", weight, "arXiv 2412.12496")


def of_length_one(feature: Feature) -> Feature:
    """The same feature with vectors of length one."""
    return Feature(feature.needs, lambda signals: unit(feature.read(signals)), feature.width)


def pumer(combine: Callable[[Tensor, Tensor, int], Assignment] = merged) -> Method:
    """PuMer's merging on the clipped output of the mixer: a plain mean, sizes not remembered, sequence order.

    arXiv 2305.17530, modality-aware merging, as ToR_SSM adapts it to Mamba, without that code's wrong partners
    (`pumer_released`). The pruning half of PuMer needs a text and is left out.

    Args:
        combine: `merged` or `pruned`.
    """
    return Pairing(clipped("update"), combine=combine).method("pumer", plain, "arXiv 2305.17530")


def famba(order: Callable[[Assignment, Tensor], Assignment] = restored) -> Method:
    """Famba-V's fusion: even and odd tokens by cosine of the mixer's output, a plain mean without sizes.

    arXiv 2409.09808, token fusion. Its contribution is in which layers fuse: `famba_schedule`. It fuses after a pair of
    one-directional blocks, which is one of our blocks, and leaves the tokens unordered with the class token first;
    here the order is kept by default, and `order=as_grouped` does as it does.
    """
    return Pairing(joined("update"), order=order).method("famba", plain, "arXiv 2409.09808")


LAYERS: dict[str, Callable[[int, int], range]] = {
    "all": lambda depth, bound: range(depth - 1),
    "alternate": lambda depth, bound: range(1, depth - 1, 2),
    "lower": lambda depth, bound: range(bound),
    "upper": lambda depth, bound: range(bound + 1, depth - 1),
}


def famba_schedule(depth: int, r: int, layers: str = "alternate", bound: int | None = None) -> Schedule:
    """Famba-V's cross-layer strategies: remove r tokens after the chosen blocks, never after the last one.

    arXiv 2409.09808, cross-layer fusion strategies.

    Args:
        depth: blocks of the model.
        r: tokens removed after each chosen block.
        layers: "all", "alternate" (every second), "lower" (blocks below `bound`) or "upper" (blocks above it).
        bound: 0-based block; the middle by default, which the paper leaves open.
    """
    chosen = lookup("layers of famba_schedule", layers, LAYERS)
    middle = depth // 2 if bound is None else bound
    if not 0 <= middle < depth:
        raise ValueError(f"bound must be a block from 0 to {depth - 1}, got {bound}")
    return Schedule.constant(depth, r, tuple(chosen(depth, middle)))


__all__ = [
    "PARITY",
    "WINDOWS",
    "Pairing",
    "famba",
    "famba_schedule",
    "pruned",
    "pumer",
    "rmeeto",
    "tome",
    "tomesd",
]
