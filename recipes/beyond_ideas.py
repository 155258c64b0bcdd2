"""What recipes/beyond.py tries beside vsm: merging at the patch embedding, scores and groups that know what the
classifier reads, and groups by what a token adds to the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mambatrim import kernels, methods
from mambatrim.compare import Entry, in_stages
from mambatrim.methods import early, vsm
from mambatrim.reduction import STEM, Assignment, Method, Score, Signals, inverse

Entrants = Mapping[str, Method | Entry | nn.Module]


def groupings() -> Entrants:
    """vsm, and what might be better; the first is the default."""
    stages: dict[str, Callable[[int], tuple[int, ...]]] = {
        "first stage at the embedding": lambda depth: (STEM, *early(depth)[1:]),
        "one more stage, at the embedding": lambda depth: (STEM, *early(depth)),
        "at the embedding only": lambda depth: (STEM,),
    }
    return {
        "vsm": vsm(),
        **{f"vsm, {name}": Entry(vsm(), in_stages(which)) for name, which in stages.items()},
        "vsm, weighted by reach": weighted(reach(1)),
        "vsm, weighted by reach, all states": weighted(reach(16)),
        "vsm, state-aware": state_aware(),
    }


def scores() -> Entrants:
    """MTR with scores that know what the classifier reads; the first is the paper's."""
    return {
        "mtr": methods.mtr(),
        "mtr, reach": methods.mtr(score=reach(1)),
        "mtr, reach, all states": methods.mtr(score=reach(16)),
        "mtr, inverse reach": methods.mtr(score=inverse(reach(1))),
        "mtr, near the class token": methods.mtr(score=NEAR),
        "mtr, like the class token": methods.mtr(score=methods.CLASS_TOKEN),
    }


def reach(states: int) -> Score:
    """How much of a token is left in the state when the scan comes to the class token.

    Delta_i times the mean over n of exp(-n sum of Delta between the two), n = 1 ... `states`: Mamba's first values
    A_n = -n, and Delta as the mean over channels. The forward scan carries what stands before the class token, the
    backward scan what stands behind it.
    """

    def pool(signals: Signals) -> Tensor:
        dt, at = signals.dt_mean, signals.special_at  # (B, 2, M), (B, n)
        if dt.shape[1] != 2 or not at.shape[1]:
            raise ValueError("reach needs two scan directions and a class token")
        passed = torch.nn.functional.pad(dt.cumsum(2), (1, 0))  # (B, 2, M + 1): the sum before each place
        there = passed.gather(2, at[:, None].expand(-1, 2, -1))  # (B, 2, n)
        apart = torch.stack(
            [there[:, 0, :, None] - passed[:, 0, None, 1:], passed[:, 1, None, :-1] - there[:, 1, :, None]], dim=1
        )  # (B, 2, n, M)
        before = torch.arange(dt.shape[2], device=dt.device) < at[:, :, None]  # (B, n, M)
        rates = torch.arange(1, states + 1, device=dt.device)[:, None, None, None, None]
        left = (-rates * apart.clamp(min=0)).exp().mean(0)  # (B, 2, n, M)
        return (dt[:, :, None] * left * torch.stack([before, ~before], dim=1)).sum(1).mean(1)

    name = "reach" if states == 1 else f"reach, {states} states"
    return Score(name, ("dt_mean", "special_at"), pool, lambda d_model, d_inner: 2 * d_inner + 2 * states)


def _near(signals: Signals) -> Tensor:
    """(B, M): minus the patches between each token and the class token; of several the mean."""
    place = torch.arange(signals.size.shape[1], device=signals.size.device) + 0.5
    return -(place - signals.special_at.unsqueeze(2)).abs().mean(1)


# the control of `reach`: the place alone, without Delta
NEAR = Score("near the class token", ("special_at",), _near, lambda d_model, d_inner: 2)


def weighted(score: Score) -> Method:
    """vsm in whose grouping a token counts by its score beside its size, so that what is read well merges late."""
    own = vsm()

    def plan(signals: Signals, r: int) -> Assignment:
        found = score.pool(signals)  # (B, M)
        return own.plan(replace(signals, size=signals.size * found / found.mean(1, keepdim=True)), r)

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        return own.cost(patches, r, d_model, d_inner) + patches * score.cost(d_model, d_inner)

    return replace(own, name="vsm by reach", needs=(*own.needs, *score.needs), plan=plan, cost=cost)


def state_aware() -> Method:
    """vsm whose similarity is that of Delta B x, what a token adds to the state, with the stream for x.

    The products of two such matrices are the products of their factors, which is what is counted.
    """
    own = vsm()

    def plan(signals: Signals, r: int) -> Assignment:
        factor = (signals.dt_mean.unsqueeze(3) * signals.B).transpose(1, 2).flatten(2)  # (B, M, S N)
        added = (factor.unsqueeze(3) * signals.hidden.unsqueeze(2)).flatten(2)  # (B, M, S N D)
        return own.plan(replace(signals, values={**signals.values, "hidden": added}), r)

    def cost(patches: int, r: int, d_model: int, d_inner: int) -> int:
        return kernels.cluster_macs(patches, r, d_model + 2 * 16 + 1) + r * d_model

    return replace(own, name="vsm by state", needs=("hidden", "dt_mean", "B"), plan=plan, cost=cost)
