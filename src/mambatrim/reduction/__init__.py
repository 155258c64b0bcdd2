"""Token reduction on tensors: what goes where, when, and how many; no model, no file, no device knowledge."""

from .assignment import Assignment, take_rows
from .choices import as_grouped, by_size, centre, exact, merged, plain, proportional, pruned, restored
from .cost import CONVENTIONS, Cost
from .matching import Links
from .reducer import Method, Reducer
from .schedule import Schedule, default_stages
from .scores import (
    CENTRALITY,
    CLASS_TOKEN,
    DELTA,
    FEATURES,
    NORM,
    OUTPUT,
    Feature,
    Score,
    backward,
    both,
    delta,
    forward,
    inverse,
    rank,
    scan_score,
)
from .tokens import SIGNALS, Layout, Signals, Tokens

__all__ = [
    "CENTRALITY",
    "CLASS_TOKEN",
    "CONVENTIONS",
    "DELTA",
    "FEATURES",
    "NORM",
    "OUTPUT",
    "SIGNALS",
    "Assignment",
    "Cost",
    "Feature",
    "Layout",
    "Links",
    "Method",
    "Reducer",
    "Schedule",
    "Score",
    "Signals",
    "Tokens",
    "as_grouped",
    "backward",
    "both",
    "by_size",
    "centre",
    "default_stages",
    "delta",
    "exact",
    "forward",
    "inverse",
    "merged",
    "plain",
    "proportional",
    "pruned",
    "rank",
    "restored",
    "scan_score",
    "take_rows",
]
