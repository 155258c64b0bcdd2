"""Speed measured against what it should be: a dense model, the same with fewer tokens, and what others would use.

timed.py runs the models in turn, memory.py sees how much memory a forward needs, rivals.py holds the others;
tables.py and chart.py show the result.
"""

from .chart import draw
from .memory import forward_memory
from .tables import LEGEND, mebibytes, models_table, scans_table, to_text
from .timed import DTYPES, Measured, Measurement, Setting, measure, settings, to_report

__all__ = [
    "DTYPES",
    "LEGEND",
    "Measured",
    "Measurement",
    "Setting",
    "draw",
    "forward_memory",
    "measure",
    "mebibytes",
    "models_table",
    "scans_table",
    "settings",
    "to_report",
    "to_text",
]
