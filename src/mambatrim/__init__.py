"""Vision Mamba models that run faster without retraining, by reducing tokens that matter little."""

from . import methods
from .apply import reduce
from .data import load_images
from .evaluate import evaluate
from .flops import count_flops, solve
from .models import create_model, list_models
from .reduction import Method, Reducer, Schedule
from .visualize import visualize

__all__ = [
    "Method",
    "Reducer",
    "Schedule",
    "count_flops",
    "create_model",
    "evaluate",
    "list_models",
    "load_images",
    "methods",
    "reduce",
    "solve",
    "visualize",
]
__version__ = "0.1.0"
