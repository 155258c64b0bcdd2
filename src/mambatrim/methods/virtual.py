"""Virtual-sequence merging: groups of like tokens, and a convolution and a scan that go on as if all were there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..kernels import steps
from ..names import lookup
from ..reduction import FEATURES, RUNNING, STEPPED, Assignment, Method, SequencePolicy, Signals, Tokens


def running(method: Method, sequence: SequencePolicy = RUNNING) -> Method:
    """The same method with the clock running: any grouping, and another sequence policy."""
    return replace(method, name=f"{method.name}, {sequence.name}", sequence=sequence)


@dataclass(frozen=True)
class Grouping:
    """How like tokens are put into groups.

    join: as `kernels.agglomerate`.
    macs: multiply-adds for one image, of the numbers of rows, of rows that go, and of features.
    """

    join: Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
    macs: Callable[[int, int, int], int]


# the cheapest pair of all, then the cheapest of what that leaves, and so on: r steps, in a compiled kernel on a CPU
ONE_BY_ONE = Grouping(kernels.agglomerate, kernels.cluster_macs)
# about log2(r) rounds of many pairs each, for a GPU, and nearly the same groups
IN_ROUNDS = Grouping(kernels.agglomerate_rounds, kernels.rounds_macs)


def early(depth: int) -> tuple[int, ...]:
    """Four stages from the first block to the middle: of 24 after blocks 0, 4, 8 and 12, counted from 0.

    Merging early costs least where the clock runs: what is saved is saved in nearly all blocks, so that fewer tokens
    have to go.
    """
    return tuple(sorted({depth * k // 6 for k in range(4)} & set(range(depth))))


def vsm(
    feature: str = "hidden",
    distance: float = 0.02,
    rows: float = 0.02,
    exponent: float = 1.0,
    sequence: SequencePolicy = STEPPED,
    grouping: Grouping = ONE_BY_ONE,
) -> Method:
    """Virtual-sequence merging: agglomerative groups, with the clock of the recurrence running.

    Args:
        feature: what similarity is measured on, one of FEATURES.
        distance: added to the cost of a pair for every patch that lies between the two in the sequence.
        rows: added for every row and column of the grid (and frame of a video) between them.
        exponent: of Ward's factor, which keeps groups of like size; 0 leaves it out.
        sequence: what the convolution and the scan make of the groups.
        grouping: ONE_BY_ONE, exact and a loop of r steps on a GPU; or IN_ROUNDS, about log2(r) steps, which differs
            where joining two tokens makes a third one more like them than a pair that joined at the same time.
    """
    found = lookup("feature of vsm", feature, FEATURES)

    def plan(signals: Signals, r: int) -> Assignment:
        place = _coordinates(signals, distance, rows)
        return Assignment(*grouping.join(found.read(signals), signals.size, place, r, exponent))

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        return grouping.macs(patches, r, found.width(d_model, d_inner)) + r * d_model

    def at_once(tokens: Tokens, special: tuple[int, ...], captured: Mapping[str, Tensor], r: int) -> Tokens | None:
        """The step as one compiled kernel."""
        before = tokens.before(special)
        if captured.get("hidden") is not tokens.x or not steps.takes(before):
            return None
        return tokens.after(steps.clustered_step(before, r, exponent, distance, rows, tokens.grid))

    usual = feature == "hidden" and grouping is ONE_BY_ONE
    return Method(
        *("vsm", found.needs, plan),
        cost=cost,
        sequence=sequence,
        at_once=at_once if usual else None,
        stages=early,
        source="mambatrim",
    )


def _coordinates(signals: Signals, distance: float, rows: float) -> Tensor:
    """(B, M, P): the place in the sequence and in each axis of the grid, each times what a step of it costs."""
    if not rows:
        return (signals.ids.to(torch.float32) * distance).unsqueeze(2)
    places, rest = [signals.ids], signals.ids
    for side in reversed(signals.grid[1:]):
        places.append(rest % side)
        rest = rest // side
    prices = torch.tensor([distance] + len(signals.grid) * [rows], device=rest.device)
    return torch.stack([*places, rest], dim=2).to(torch.float32) * prices
