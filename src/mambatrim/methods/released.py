"""What published code does where it differs from its paper: for traceability, never as a baseline of the idea.

Line numbers are those of the commits in tests/golden/MANIFEST.md. Special tokens are protected here as for
every method; what the code does to them beyond their place is said at each function. At most half of the patches can
go in one step, and where the code would silently remove fewer, the reducer says so.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..names import lookup
from ..reduction import (
    Assignment,
    Feature,
    Method,
    Schedule,
    Score,
    Signals,
    as_grouped,
    backward,
    by_size,
    centre,
    merged,
    proportional,
    restored,
)
from ..reduction.choices import move
from ..reduction.reducer import half
from ..reduction.scores import averaged, joined
from .bipartite import MATCHES, PARITY, Pairing, of_length_one
from .ranking import topk


def _reversed(x: Tensor, dim: int) -> Tensor:
    return x.index_select(dim, torch.arange(x.shape[dim] - 1, -1, -1, device=x.device))


# ------------------------------------------------------------------------------------------------------------- R-MeeTo


def _wrong_axis(signal: str) -> Feature:
    """Mean of the directions, the backward one with its channels reversed and its tokens in scan order."""

    def read(signals: Signals) -> Tensor:
        ahead, back = getattr(signals, signal).unbind(dim=1)  # (B, M, N) each
        return (ahead + _reversed(_reversed(back, 1), 2)) / 2

    return Feature((signal,), read, averaged(signal).width)


_RMEETO_FEATURES = {"update": joined("update"), "B": _wrong_axis("B"), "C": _wrong_axis("C")}


def _of_even_tokens(lifted: Assignment, special: Tensor) -> Assignment:
    """The class token's place without reordering: its old one scaled by the share of even tokens that stay."""
    removed, even = lifted.length - lifted.survivors, lifted.length // 2
    return move(lifted, special, special * (even - removed) // max(even, 1))


def rmeeto_released(
    feature: str = "update",
    distance: str = "cosine",
    partner: int = 1,
    combine: Callable[[Tensor, Tensor, int], Assignment] = merged,
    weight: Callable[[Signals], Tensor] = by_size,
    order: Callable[[Assignment, Tensor], Assignment] = restored,
) -> Method:
    """R-MeeTo as released: the class token drifts to the left, and B and C are read along the wrong axis.

    NUS-HPC-AI-Lab/R-MeeTo, image_task. The class token goes to position * (t - r) // t whatever became of its
    neighbours (R_MeeTo/merge.py:109, 137). B and C of the backward direction have their channels reversed instead of
    their tokens (models/vim/mamba_simple.py:249-257); the code reverses with the class token in the sequence, here the
    patches alone are, which is the same while it stands in the middle. Its delta, before bias and softplus, is not a
    signal of ours and left out. The jump before the last merge is in `rmeeto_released_schedule`.

    Args:
        feature: "update", "B" or "C". distance: "cosine", "l1" or "l2". partner, combine, weight (`plain` is its
        merge mode "mean"), order: as in `rmeeto`.
    """
    found = lookup("feature of rmeeto_released", feature, _RMEETO_FEATURES)
    match = lookup("distance of rmeeto_released", distance, MATCHES)
    pairing = Pairing(of_length_one(found), match, PARITY, partner, combine, order)
    base = pairing.method("rmeeto_released", weight, "NUS-HPC-AI-Lab/R-MeeTo")
    return replace(base, place=_of_even_tokens if order is as_grouped else proportional, most=half)


def rmeeto_released_schedule(
    depth: int, patches: int, r: int, interval: int = 2, odd: bool = False, compare: int | None = 11
) -> Schedule:
    """R-MeeTo's schedule as released: the last merge goes down to 197 - 11 compare tokens, whatever r is.

    R_MeeTo/RMeeTo_vim.py:63-65, 133-142: merging before every `interval`-th block, at most half of the patches; the
    published compare=11 ends at 76 tokens, so r=5 removes 71 before block 22.

    Args:
        depth, patches: of the model; one class token is counted.
        r: patches removed at each merge.
        interval: blocks from one merge to the next. odd: merge before blocks 1, 3, ... instead of 2, 4, ....
        compare: the code's setting; None for the VideoMamba of the repository, which has no jump.
    """
    if interval < 1:
        raise ValueError(f"interval must be a number of blocks from 1 up, got {interval}")
    removed, tokens = [0] * depth, patches + 1
    for block in range(1, depth):
        if block % interval != (1 % interval if odd else 0):
            continue
        jump = compare is not None and depth - block <= interval
        wanted = tokens - (197 - 11 * (compare or 0)) if jump else r
        removed[block - 1] = max(0, min(wanted, (tokens - 1) // 2))
        tokens -= removed[block - 1]
    return Schedule(tuple(removed))


# ------------------------------------------------------------------------------------------------------- ToP-ViM (HSA)


def hsa_released() -> Method:
    """ToP-ViM as released: every token is kept or dropped by the score of the token at the mirrored place.

    ZLKong/ToP-ViM, vim/models_mamba.py:580-645: the score, the channel sum of the gated backward output, is still in
    scan order when its ranks are used as positions; the class token is put into the middle. In a batch the code
    protects the class token of the first image only (:595) and may carry it twice in the others; here every image is
    treated as the first.
    """
    score = Score(
        "mirrored y_gated",
        ("y_gated",),
        lambda signals: _reversed(backward(signals.y_gated.sum(dim=-1)), 1),
        lambda d_model, d_inner: d_inner,
    )
    return topk(score, name="hsa_released", place=centre, source="ZLKong/ToP-ViM")


def hsa_released_schedule(depth: int, patches: int, keep: float = 0.8, after: tuple[int, ...] = (4, 9, 14)) -> Schedule:
    """ToP-ViM's schedule: keep a share of the patches, rounded up such that tokens with the class token are odd.

    vim/models_mamba.py:597-603; `after` are 0-based blocks.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share above 0 and up to 1, got {keep}")
    removed, tokens = [0] * depth, patches + 1
    for block in sorted(after):
        kept = math.ceil(keep * (tokens - 1))
        kept += 1 - kept % 2
        removed[block], tokens = tokens - kept, kept
    return Schedule(tuple(removed))
