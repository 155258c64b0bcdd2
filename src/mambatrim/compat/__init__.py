"""Run code that was written for `mamba_ssm` and `causal_conv1d` where neither can be installed: without CUDA.

`install()` puts modules of those names in place that run on mambatrim's kernels, forward and backward. A real package
is never replaced. `python -m mambatrim.compat SCRIPT ARGS` does it around an unmodified script.
"""

from __future__ import annotations

import importlib.util
import sys

from .stand_ins import STAND_INS

__all__ = ["install", "uninstall"]


def install() -> list[str]:
    """Put the stand-ins in place of those packages that are absent; a second call changes nothing.

    Packages: `mamba_ssm`, `causal_conv1d`, and the extensions `causal_conv1d_cuda`, `selective_scan_cuda`,
    `selective_scan_cuda_core`, `selective_scan_cuda_oflex`, `selective_scan_cuda_ndstate`. Call it before the first
    import of any of them.

    Returns:
        The full names of all modules that are stand-ins now.
    """
    absent = {name for name in STAND_INS if "." not in name and not _is_real(name)}
    names = [name for name in STAND_INS if name.partition(".")[0] in absent]
    for name in names:
        sys.modules[name] = STAND_INS[name]
    return names


def uninstall() -> list[str]:
    """Take the stand-ins away, and nothing else; names that were imported from them stay usable.

    Returns:
        The full names of the modules that were taken away.
    """
    names = [name for name, module in STAND_INS.items() if sys.modules.get(name) is module]
    for name in names:
        del sys.modules[name]
    return names


def _is_real(package: str) -> bool:
    """Whether there is such a package that is not ours."""
    if package in sys.modules:
        return sys.modules[package] is not STAND_INS[package]
    return importlib.util.find_spec(package) is not None
