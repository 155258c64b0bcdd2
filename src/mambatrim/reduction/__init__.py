"""Token reduction on tensors: what goes where, when, and how many; no model, no file, no device knowledge."""

from .assignment import Assignment, take_rows
from .cost import CONVENTIONS, Cost
from .matching import Links
from .reducer import Method, Reducer, by_size, centre, exact, plain, proportional
from .schedule import Schedule, default_stages
from .scores import DELTA, NORM, Score, inverse, rank
from .tokens import SIGNALS, Layout, Signals, Tokens

__all__ = [
    "CONVENTIONS",
    "DELTA",
    "NORM",
    "SIGNALS",
    "Assignment",
    "Cost",
    "Layout",
    "Links",
    "Method",
    "Reducer",
    "Schedule",
    "Score",
    "Signals",
    "Tokens",
    "by_size",
    "centre",
    "default_stages",
    "exact",
    "inverse",
    "plain",
    "proportional",
    "rank",
    "take_rows",
]
