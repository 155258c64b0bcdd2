"""`python -m mambatrim.compat SCRIPT ARGS`: run a script as `python SCRIPT ARGS` would, with the stand-ins in place."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable
from types import TracebackType

from . import install


def _errors_of(script: str) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """An `excepthook` that leaves out what lies above the script, so that a traceback begins where the script does."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename != script:
            trace = trace.tb_next
        sys.__excepthook__(kind, error.with_traceback(trace), trace)

    return show


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mambatrim.compat",
        description="Run a Python script that imports mamba_ssm or causal_conv1d, without CUDA and without them.",
    )
    parser.add_argument("script", metavar="SCRIPT", help="the script, unmodified")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    if not os.path.isfile(options.script):
        parser.error(f"there is no script {options.script!r}")
    sys.argv = [options.script, *options.arguments]
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(options.script))
    install()
    sys.excepthook = _errors_of(options.script)
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
