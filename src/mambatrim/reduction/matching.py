"""Matching: who is most like whom. Functions of features and positions; the L x L matrix is never built."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .assignment import take_rows

# rows of the similarity matrix that exist at a time: all of them up to 512 patches (one product, as if unblocked), and
# for 12,544 video patches 6 MB per image where half against half would take 157 MB
SOURCES_PER_BLOCK = 256
# a token of norm zero becomes a zero vector, similar to nobody, and never NaN
SMALLEST_NORM = 1e-12


class Links(NamedTuple):
    """The best partner of each source.

    target: (B, n) positions in the sequence.
    similarity: (B, n) fp32, higher is more alike.
    """

    target: Tensor
    similarity: Tensor


def cosine(feature: Tensor, source: Tensor, target: Tensor) -> Links:
    """Best target of each source by cosine similarity; of equals the first in `target`.

    Args:
        feature: (B, M, F).
        source: (B, n) positions that look for a partner.
        target: (B, m) positions to choose from.
    """
    a, b = _unit(take_rows(feature, source)), _unit(take_rows(feature, target))  # (B, n, F), (B, m, F)
    return _best(a, b, target, lambda a, b: a @ b.transpose(1, 2))


def l1(feature: Tensor, source: Tensor, target: Tensor) -> Links:
    """Best target of each source by smallest sum of absolute differences; arguments as for `cosine`."""
    return _best(take_rows(feature, source), take_rows(feature, target), target, lambda a, b: -torch.cdist(a, b, p=1.0))


def l2(feature: Tensor, source: Tensor, target: Tensor) -> Links:
    """Best target of each source by smallest Euclidean distance; arguments as for `cosine`."""
    # without matrix products: |a|^2 + |b|^2 - 2ab cancels just where the nearest ones are compared
    mode = "donot_use_mm_for_euclid_dist"
    return _best(
        take_rows(feature, source),
        take_rows(feature, target),
        target,
        lambda a, b: -torch.cdist(a, b, p=2.0, compute_mode=mode),
    )


def even_odd(batch: int, length: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Split a sequence by parity: even positions (B, ceil(M/2)) as sources, odd ones (B, floor(M/2)) as targets."""
    positions = torch.arange(length, device=device).repeat(batch, 1)  # (B, M)
    return positions[:, 0::2], positions[:, 1::2]


def strongest(source: Tensor, links: Links, count: int) -> tuple[Tensor, Tensor]:
    """The `count` links of greatest similarity, strongest first: source (B, n) -> source, target (B, count) each."""
    if not 0 <= count <= source.shape[1]:
        raise ValueError(f"{count} links were asked for, but there are {source.shape[1]} sources")
    order = torch.argsort(links.similarity, dim=1, descending=True, stable=True)[:, :count]
    return source.gather(1, order), links.target.gather(1, order)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=SMALLEST_NORM)


def _best(a: Tensor, b: Tensor, target: Tensor, similarity: Callable[[Tensor, Tensor], Tensor]) -> Links:
    """Arg-max over b (B, m, F) for each row of a (B, n, F), a block of rows at a time."""
    blocks = [similarity(rows, b).max(dim=2) for rows in a.split(SOURCES_PER_BLOCK, dim=1)]
    value = torch.cat([block.values for block in blocks], dim=1)  # (B, n)
    index = torch.cat([block.indices for block in blocks], dim=1)  # (B, n)
    return Links(target.gather(1, index), value)
