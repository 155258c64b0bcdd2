"""benchmarks/gpu.py, tried on a CPU, and the calls that it makes of mamba_ssm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambatrim import kernels
from mambatrim.benchmark.rivals import mamba_ssm_arguments, mamba_ssm_scan, scan_arguments
from mambatrim.compat.scan import selective_scan_fn

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)


def test_its_checks_pass_where_the_definitions_hold():
    ran = run("check", "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    assert (
        ran.stdout.count("| scan") == 4 and ran.stdout.count("8 of 8") == 6 and " *" not in ran.stdout.replace("**", "")
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "quantum"], "device must be cuda, cuda:N or cpu, not 'quantum'"),
        (["--device", "cuda:99"], "PyTorch sees no GPU 'cuda:99' here"),
        (["--device", "cpu", "--batch", "0"], "batch must be at least 1, not 0"),
        (["chekc"], "unknown section 'chekc'; known: check, scan, model"),
    ],
)
def test_wrong_options_get_a_sentence(options, words):
    ran = run(*options)
    assert ran.returncode == 2 and words in ran.stderr and "Traceback" not in ran.stderr


def test_mamba_ssm_gets_the_same_arguments():
    arguments = scan_arguments(2, 9, 8, 4)
    made = mamba_ssm_arguments(arguments)
    assert all(value.is_contiguous() for value in made.values())
    found = selective_scan_fn(**made, delta_softplus=True)
    torch.testing.assert_close(found.transpose(1, 2), kernels.selective_scan(**arguments)[0])


def test_stand_ins_are_not_taken_for_its_kernel():
    script = (
        "from mambatrim import compat; from mambatrim.benchmark import rivals; "
        "compat.install(); print(rivals.mamba_ssm_scan())"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "None" or mamba_ssm_scan() is not None
