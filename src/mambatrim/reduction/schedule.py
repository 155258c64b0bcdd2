"""Schedule: after which block how many patches go. Plain integers, so every length is known before the forward."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# stands for "before block 0", right behind the patch embedding, wherever a schedule is told after which block
STEM = -1

# the stages of the token-reduction papers on 24 blocks, counted from 1
STAGES_OF_24 = (5, 10, 15)


def default_stages(depth: int) -> tuple[int, ...]:
    """After blocks 5, 10 and 15 of 24, counted from 1, scaled to `depth`; as 0-based indices: 24 -> (4, 9, 14)."""
    scaled = {max(1, math.floor(depth * block / 24 + 0.5)) - 1 for block in STAGES_OF_24}
    return tuple(sorted(scaled))


@dataclass(frozen=True)
class Schedule:
    """Patches removed after each block.

    `removed[i]` patches go after block i, 0-based. "Before block i" of a paper is after block i-1; "after block 5"
    counted from 1 is index 4. `stem` patches go before block 0, which flat models can do, with methods that look at
    nothing but the stream; where blocks are listed, that place is block `STEM`, which is -1.
    """

    removed: tuple[int, ...]
    stem: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "removed", tuple(self.removed))
        for count in (self.stem, *self.removed):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"patches removed after a block must be whole numbers from 0 up, got {count!r}")

    @staticmethod
    def none(depth: int) -> "Schedule":
        """Nothing is removed."""
        return Schedule((0,) * depth)

    @staticmethod
    def from_counts(depth: int, counts: Mapping[int, int]) -> "Schedule":
        """Remove counts[block] patches after each of some blocks (0-based, or STEM)."""
        chosen = checked_blocks(tuple(counts), depth)
        given = {block: counts[block] for block in chosen}
        return Schedule(tuple(given.get(block, 0) for block in range(depth)), given.get(STEM, 0))

    @staticmethod
    def stages(
        depth: int, patches: int, after: Sequence[int] | None = None, keep: float | Sequence[float] = 0.8
    ) -> "Schedule":
        """Keep a share of the patches at each of a few blocks, rounded to the nearest count (halves up).

        Args:
            depth: blocks of the model.
            patches: patches that leave the stem.
            after: blocks after which patches go, 0-based, or STEM; by default `default_stages(depth)`.
            keep: share kept at every stage, or one share per stage.
        """
        after = checked_blocks(default_stages(depth) if after is None else after, depth)
        shares = (keep,) * len(after) if isinstance(keep, int | float) else tuple(keep)
        if len(shares) != len(after):
            raise ValueError(f"keep must be one share or one per stage: got {len(shares)} for {len(after)} stages")
        counts, left = dict[int, int](), patches
        for block, share in zip(after, shares, strict=True):
            if not 0 < share <= 1:
                raise ValueError(f"keep must be a share above 0 and up to 1, got {share}")
            kept = max(1, math.floor(left * share + 0.5))
            counts[block], left = left - kept, kept
        return Schedule.from_counts(depth, counts)

    @staticmethod
    def constant(depth: int, r: int, after: Sequence[int] | None = None) -> "Schedule":
        """Remove r patches after each block of `after` (0-based, or STEM); by default after every one but the last."""
        chosen = checked_blocks(range(depth - 1) if after is None else after, depth)
        return Schedule.from_counts(depth, dict.fromkeys(chosen, r))

    @property
    def depth(self) -> int:
        """Blocks that the schedule speaks of."""
        return len(self.removed)

    @property
    def total(self) -> int:
        """Patches removed in all."""
        return self.stem + sum(self.removed)

    @property
    def places(self) -> tuple[int, ...]:
        """Blocks after which patches go, ascending; STEM first."""
        return tuple(block for block, count in enumerate((self.stem, *self.removed), start=STEM) if count)

    def at(self, block: int) -> int:
        """Patches removed after `block`."""
        if block == STEM:
            return self.stem
        if not self.removed:
            return 0
        if not 0 <= block < self.depth:
            raise ValueError(f"the schedule is for {self.depth} blocks, there is no block {block}")
        return self.removed[block]

    def lengths(self, patches: int) -> tuple[int, ...]:
        """Patches that enter every block, from `patches` that leave the stem.

        Raises:
            ValueError: where a step would not leave at least one patch.
        """
        behind, left = [], patches
        for block, count in enumerate((self.stem, *self.removed), start=STEM):
            if count and count >= left:
                raise ValueError(
                    f"the schedule removes {count} of {left} patches {named(block)}; at most {left - 1} can go"
                )
            left -= count
            behind.append(left)
        return tuple(behind[: self.depth])

    def only(self, first: int, blocks: int) -> "Schedule":
        """The same for so many blocks from `first` on, and nothing removed after the others."""
        kept = range(first, first + blocks)
        removed = tuple(count if block in kept else 0 for block, count in enumerate(self.removed))
        return Schedule(removed, 0 if first else self.stem)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `stem` where patches go there."""
        return {"removed": list(self.removed), **({"stem": self.stem} if self.stem else {})}

    def to_json(self) -> str:
        """The schedule as JSON text, which `from_json` reads back."""
        return json.dumps(self.as_dict())

    @staticmethod
    def from_json(text: str) -> "Schedule":
        """Read what `to_json` wrote."""
        try:
            given = json.loads(text)
            removed, stem = given["removed"], given.get("stem", 0)
        except (json.JSONDecodeError, KeyError, TypeError):
            removed, stem = None, 0
        if not isinstance(removed, list):
            raise ValueError(f'a schedule in JSON looks like {{"removed": [0, 11, 0]}}, got {text!r}')
        return Schedule(tuple(removed), stem)


def checked_blocks(after: Sequence[int], depth: int) -> tuple[int, ...]:
    """Checked 0-based block indices, ascending; STEM may be the first."""
    blocks = tuple(sorted(after))
    if len(set(blocks)) != len(blocks) or (blocks and not STEM <= blocks[0] <= blocks[-1] < depth):
        raise ValueError(
            f"after must name different blocks from 0 to {depth - 1}, or {STEM} for before block 0, got {tuple(after)}"
        )
    return blocks


def named(block: int) -> str:
    """A place of a schedule in words."""
    return "before block 0" if block == STEM else f"after block {block}"
