"""Vision Mamba models that run faster without retraining, by reducing tokens that matter little."""

from . import adapters, methods
from .adapters import attach
from .apply import pack, reduce
from .convert import convert
from .data import load_images
from .evaluate import evaluate
from .features import features
from .flops import count_flops, solve
from .hub import from_pretrained, save_pretrained
from .methods import list_methods
from .models import create_model, list_models
from .reduction import Method, Reducer, Schedule
from .visualize import visualize

__all__ = [
    "Method",
    "Reducer",
    "Schedule",
    "adapters",
    "attach",
    "convert",
    "count_flops",
    "create_model",
    "evaluate",
    "features",
    "from_pretrained",
    "list_methods",
    "list_models",
    "load_images",
    "methods",
    "pack",
    "reduce",
    "save_pretrained",
    "solve",
    "visualize",
]
__version__ = "0.1.0"
