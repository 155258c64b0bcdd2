"""Controls: what a method has to beat before its score or its merging means anything."""

from dataclasses import replace

import torch
from torch import Tensor

from ..reduction import CENTRALITY, DELTA, Assignment, Method, Score, Signals, plain
from .mtr import mtr
from .ranking import topk


def random_score(seed: int = 0) -> Score:
    """Numbers that say nothing, for any method with a score.

    They are a hash of (seed, patch, patches left). So an image gets the same plan alone and in any batch, the
    global generator is untouched, the forward can be compiled and exported, and no two stages draw alike, for the
    count shrinks at each. All images share one draw: average over seeds.
    """
    if not isinstance(seed, int):
        raise ValueError(f"seed of random must be a whole number, got {seed!r}")
    return Score(f"random {seed}", (), lambda signals: _draw(signals.ids, seed), lambda d_model, d_inner: 0)


def random(seed: int = 0) -> Method:
    """MTR with a random score: the same groups, matching and mean.

    The draw is that of `random_score`.
    """
    return replace(mtr(score=random_score(seed)), name="random", source="control")


def random_prune(seed: int = 0) -> Method:
    """Drop r random tokens: a training-free control of DyVM.

    arXiv 2504.04787, ablation of the pruning strategy. DyVM puts the class token into the middle; here it keeps its
    place. The draw is that of `random_score`.
    """
    return topk(random_score(seed), name="random_prune", source="control, DyVM")


def prune(score: Score = DELTA) -> Method:
    """Drop the r tokens of lowest score, MTR's by default, and merge nothing."""
    return topk(score, name="prune")


def central() -> Method:
    """Drop the r tokens farthest from the middle of the image: the l2 heuristic of TokenReduction, content-free."""
    return topk(CENTRALITY, name="central", source="control, arXiv 2308.04657")


def even_spread() -> Method:
    """Keep tokens at even distances in the sequence and drop the others, whatever they show: DyVM's static control.

    arXiv 2504.04787, ablation of the pruning strategy. Which of the evenly spread positions is left open: here the
    middles of M - r equal parts.
    """

    def plan(signals: Signals, r: int) -> Assignment:
        batch, patches = signals.ids.shape
        kept = patches - r
        middles = (2 * torch.arange(kept, device=signals.ids.device) + 1) * patches // (2 * kept)
        return Assignment.from_keep(middles.expand(batch, -1), patches)

    return Method("even_spread", (), plan, plain, source="control, DyVM")


def _draw(ids: Tensor, seed: int) -> Tensor:
    """Integers from 0 to 2^32 - 1 that look random: ids (B, M) -> (B, M) int64. Products stay below 2^63."""
    mask = 0xFFFFFFFF
    value = ids * 0x9E3779B1 + (seed * 0x85EBCA77 + ids.shape[1] * 0xC2B2AE3D) % (mask + 1)
    for _ in range(3):
        value = value & mask
        value = (value ^ (value >> 16)) * 0x45D9F3B
    return (value & mask) ^ ((value & mask) >> 16)
