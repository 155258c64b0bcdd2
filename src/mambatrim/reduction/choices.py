"""Choices that methods share: weights of a mean, merge or prune, order of survivors, place of the class token."""

import torch
from torch import Tensor

from .assignment import Assignment, or_gone
from .tokens import Signals

# ---------------------------------------------------------------------------------------------------- weights of a mean


def by_size(signals: Signals) -> Tensor:
    """Weights of a mean over original tokens: (B, M) sizes."""
    return signals.size


def plain(signals: Signals) -> Tensor:
    """Weights of a mean over the tokens as they are now: (B, M) ones."""
    return torch.ones_like(signals.size)


# ------------------------------------------------------------------------------------------------------- merge or prune


def merged(source: Tensor, target: Tensor, length: int) -> Assignment:
    """Sources (B, r) disappear into their targets (B, r): L -> L - r."""
    return Assignment.from_links(source, target, length)


def pruned(source: Tensor, target: Tensor, length: int) -> Assignment:
    """Sources (B, r) are dropped, and their targets (B, r) stay as they are: L -> L - r."""
    return Assignment.from_prune(source, length)


# --------------------------------------------------------------------------------------------------- order of survivors


def restored(plan: Assignment, key: Tensor) -> Assignment:
    """Survivors in sequence order, which a scan needs. The default of every method."""
    return plan


def as_grouped(plan: Assignment, key: Tensor) -> Assignment:
    """Survivors in the order in which the method's grouping lists them, key (B, M) ascending: an ablation."""
    return plan.arrange(key)


# ------------------------------------------------------------------------------------------- places of the class token


def exact(lifted: Assignment, special: Tensor) -> Assignment:
    """Special tokens keep their true rank among the survivors: the sequence with tokens deleted. The default."""
    return lifted


def centre(lifted: Assignment, special: Tensor) -> Assignment:
    """Put the class token into the middle, whatever was removed on either side (HSA, DyVM)."""
    return move(lifted, special, torch.full_like(special, lifted.survivors // 2))


def proportional(lifted: Assignment, special: Tensor) -> Assignment:
    """Scale the class token's position by the length, rounded down (R-MeeTo)."""
    return move(lifted, special, special * lifted.survivors // lifted.length)


def move(step: Assignment, special: Tensor, to: Tensor) -> Assignment:
    """Give the class token, old position `special` (B, 1), the new position `to` (B, 1); the rest keeps its order."""
    if special.shape[1] == 0:
        return step
    if special.shape[1] != 1:
        raise ValueError(f"only a single special token can be moved, got {special.shape[1]}; use place=exact")
    survivors = step.survivors
    now = step.dest.gather(1, special)  # (B, 1)
    others, free_places = Assignment.from_prune(now, survivors).keep, Assignment.from_prune(to, survivors).keep
    new = torch.zeros_like(step.keep).scatter(1, now, to).scatter(1, others, free_places)  # (B, K)
    return Assignment(
        torch.zeros_like(step.keep).scatter(1, new, step.keep), or_gone(new, survivors).gather(1, step.dest)
    )
