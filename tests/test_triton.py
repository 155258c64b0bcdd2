"""The kernels for GPUs, without one: in Triton's interpreter where Triton is installed, and how they are chosen."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambatrim.kernels import gpu


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_in_the_interpreter():
    """Runs interpreted_triton.py in its own process, because Triton reads TRITON_INTERPRET when it is imported."""
    path = Path(__file__).parent / "interpreted_triton.py"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and "skipped" not in ran.stdout, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_tensors_that_the_kernels_do_not_take_run_the_pytorch_form():
    x = torch.ones(2, 3)
    assert not gpu.handles(x)
    run = gpu.form("triton_rows", "norm_forward", lambda *arguments: arguments)
    assert run(x, [x], None, 1.0) == (x, [x], None, 1.0)


def test_importing_the_kernels_does_not_import_triton():
    # PyTorch's own counter of FLOPs imports it, where it is installed
    script = (
        "import sys, torch.utils.flop_counter; before = 'triton' in sys.modules; import mambatrim.kernels; "
        "sys.exit(not before and 'triton' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=True,
    )
