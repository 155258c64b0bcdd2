"""Methods of token reduction: a name, and a factory whose arguments are the method's options."""

from collections.abc import Callable

from ..names import lookup
from ..reduction import (
    CENTRALITY,
    CLASS_TOKEN,
    DELTA,
    FEATURES,
    NORM,
    OUTPUT,
    Method,
    as_grouped,
    backward,
    both,
    by_size,
    centre,
    delta,
    exact,
    forward,
    inverse,
    merged,
    plain,
    proportional,
    pruned,
    restored,
    scan_score,
)
from ..reduction.scores import mean, positive_mean
from .bipartite import PARITY, WINDOWS, famba, famba_schedule, pumer, rmeeto, tome, tomesd
from .clusters import dpcknn, kmedoids, members_dropped, members_merged
from .controls import central, even_spread, prune, random, random_prune, random_score
from .mame import by_delta, mame
from .mtr import EVEN_ODD, all_others, by_rank, lowest_half, mtr, next_in_rank, only_r
from .ranking import dropped, evit, evit_fused, fused, hsa, topk
from .released import hsa_released, hsa_released_schedule, rmeeto_released, rmeeto_released_schedule
from .released_tor import evit_released, pumer_released, utr_released, utr_released_merge, utr_released_prune
from .sequential import stm
from .utr import utr, utr_merge, utr_prune
from .virtual import IN_ROUNDS, ONE_BY_ONE, Grouping, early, running, vsm

__all__ = [
    "CENTRALITY",
    "CLASS_TOKEN",
    "DELTA",
    "EVEN_ODD",
    "FEATURES",
    "IN_ROUNDS",
    "METHODS",
    "NORM",
    "ONE_BY_ONE",
    "OUTPUT",
    "PARITY",
    "WINDOWS",
    "Grouping",
    "all_others",
    "as_grouped",
    "backward",
    "both",
    "by_delta",
    "by_rank",
    "by_size",
    "central",
    "centre",
    "delta",
    "dpcknn",
    "dropped",
    "early",
    "even_spread",
    "evit",
    "evit_fused",
    "evit_released",
    "exact",
    "famba",
    "famba_schedule",
    "forward",
    "fused",
    "get",
    "hsa",
    "hsa_released",
    "hsa_released_schedule",
    "inverse",
    "kmedoids",
    "list_methods",
    "lowest_half",
    "mame",
    "mean",
    "members_dropped",
    "members_merged",
    "merged",
    "mtr",
    "next_in_rank",
    "only_r",
    "plain",
    "positive_mean",
    "proportional",
    "prune",
    "pruned",
    "pumer",
    "pumer_released",
    "random",
    "random_prune",
    "random_score",
    "restored",
    "rmeeto",
    "rmeeto_released",
    "rmeeto_released_schedule",
    "running",
    "scan_score",
    "stm",
    "tome",
    "tomesd",
    "topk",
    "utr",
    "utr_merge",
    "utr_prune",
    "utr_released",
    "utr_released_merge",
    "utr_released_prune",
    "vsm",
]

METHODS: dict[str, Method | Callable[[], Method]] = {
    "mtr": mtr,
    "vsm": vsm,
    "tome": tome,
    "tomesd": tomesd,
    "rmeeto": rmeeto,
    "famba": famba,
    "pumer": pumer,
    "evit": evit,
    "evit_fused": evit_fused,
    "hsa": hsa,
    "utr": utr,
    "utr_merge": utr_merge,
    "utr_prune": utr_prune,
    "stm": stm,
    "mame": mame,
    "dpcknn": dpcknn,
    "kmedoids": kmedoids,
    "prune": prune,
    "random": random,
    "random_prune": random_prune,
    "even_spread": even_spread,
    "central": central,
    "rmeeto_released": rmeeto_released,
    "pumer_released": pumer_released,
    "evit_released": evit_released,
    "utr_released": utr_released,
    "utr_released_merge": utr_released_merge,
    "utr_released_prune": utr_released_prune,
    "hsa_released": hsa_released,
}


def get(name: str) -> Method:
    """The method of this name with its default options; ValueError with the nearest name where there is none."""
    return _default(lookup("method", name, METHODS))


def list_methods() -> dict[str, str]:
    """Every method by name: what it does, in one line, and its source in brackets."""
    return {name: f"{_first_line(entry)} ({_default(entry).source})" for name, entry in METHODS.items()}


def _default(entry: Method | Callable[[], Method]) -> Method:
    return entry if isinstance(entry, Method) else entry()


def _first_line(entry: Method | Callable[[], Method]) -> str:
    described = entry.plan if isinstance(entry, Method) else entry
    return (described.__doc__ or "").partition("\n")[0]
