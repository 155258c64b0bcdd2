"""One helper that turns a wrong name into a sentence with its neighbours."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")
# more names than this are no longer a sentence
MOST_LISTED = 40


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Return `table[name]`.

    Args:
        kind: what the names stand for, in the singular; it opens the error message.
        name: the name asked for.
        table: the known names and what they mean.

    Raises:
        ValueError: unknown name; the message suggests the nearest known one, and lists all unless they are very many.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    near = get_close_matches(str(name), table, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    known = f"known: {', '.join(sorted(table))}" if len(table) <= MOST_LISTED else f"{len(table)} are known"
    raise ValueError(f"unknown {kind} {name!r}{hint} {known}")
