"""Controls: what a method has to beat before its score or its merging means anything."""

from dataclasses import replace

from torch import Tensor

from ..reduction import DELTA, Assignment, Method, Score, Signals, rank
from .mtr import mtr


def random(seed: int = 0) -> Method:
    """MTR with a random score: the same groups, matching and mean.

    The numbers are a hash of (seed, patch, patches left). So an image gets the same plan alone and in any batch, the
    global generator is untouched, the forward can be compiled and exported, and no two stages draw alike, for the
    count shrinks at each. All images share one draw: average over seeds.
    """
    if not isinstance(seed, int):
        raise ValueError(f"seed of random must be a whole number, got {seed!r}")
    score = Score(f"random {seed}", (), lambda signals: _draw(signals.ids, seed), lambda d_model, d_inner: 0)
    return replace(mtr(score=score), name="random", source="control")


def prune(score: Score = DELTA) -> Method:
    """Drop the r tokens of lowest score, MTR's by default, and merge nothing."""
    if not isinstance(score, Score):
        raise ValueError(f"score of prune must be a Score such as DELTA, NORM or inverse(DELTA), got {score!r}")

    def plan(signals: Signals, r: int) -> Assignment:
        importance = score.pool(signals)  # (B, M)
        (source,) = rank(importance, sizes=(r,))  # (B, r)
        return Assignment.from_prune(source, importance.shape[1])

    return Method(
        "prune",
        needs=score.needs,
        plan=plan,
        cost=lambda patches, r, d_model, d_inner: patches * score.cost(d_model, d_inner),
        source="control",
    )


def _draw(ids: Tensor, seed: int) -> Tensor:
    """Integers from 0 to 2^32 - 1 that look random: ids (B, M) -> (B, M) int64. Products stay below 2^63."""
    mask = 0xFFFFFFFF
    value = ids * 0x9E3779B1 + (seed * 0x85EBCA77 + ids.shape[1] * 0xC2B2AE3D) % (mask + 1)
    for _ in range(3):
        value = value & mask
        value = (value ^ (value >> 16)) * 0x45D9F3B
    return (value & mask) ^ ((value & mask) >> 16)
