"""Builds the C++ kernels: one shared library with a plain C interface, which the package loads with ctypes.

No header of Python or torch is needed, so one wheel serves every version of both. `csrc/kernels.cpp` is compiled once
for each instruction set and `csrc/dispatch.cpp` chooses among them at run time. Objects are kept in `build/`, and only
what changed is compiled again. Where nothing can be compiled the installation goes on, and one sentence says what is
lost.

After a change in csrc/:  python setup.py build_ext --inplace      (with --force everything is compiled again)
Another compiler:         CXX=clang++ python setup.py build_ext --inplace
Flags of your own:        CXXFLAGS="-fsanitize=address" python setup.py build --build-lib DIR   (see make sanitize)
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "src/mambatrim/kernels/csrc"
# flags of the caller's own have objects of their own, so that the usual ones need not be compiled again after them
EXTRA_FLAGS = tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
OBJECTS = ROOT / "build" / f"kernels-{sysconfig.get_platform()}{'-own-flags' if EXTRA_FLAGS else ''}"
LIBRARY = "mambatrim.kernels._kernels"

COMPILERS = ("g++", "clang++", "c++")
# GCC 12 finds its own AVX-512 header at fault (its bug 105593)
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized")
COMPILE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", *WARNINGS)
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
ISA_FLAGS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni"),
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildFailure(RuntimeError):
    """Why the library could not be built, in words that fit into the middle of a sentence."""


class Unit(NamedTuple):
    """One compilation: a source, the flags that are its own, and the name of its object file."""

    source: Path
    flags: tuple[str, ...]
    name: str


def units() -> list[Unit]:
    """The compilations that make up the library on this machine."""
    instruction_sets = ISA_FLAGS if IS_X86 else {"generic": ()}
    kernels = [
        Unit(CSRC / "kernels.cpp", (f"-DMAMBATRIM_ISA={isa}", *flags), isa) for isa, flags in instruction_sets.items()
    ]
    return [*kernels, Unit(CSRC / "dispatch.cpp", ("-DMAMBATRIM_HAVE_X86=1",) if IS_X86 else (), "dispatch")]


def find_compiler() -> list[str]:
    """The command that compiles C++: $CXX, else the first known one that is there."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise BuildFailure(f"the compiler that CXX names, {wanted[0]}, was not found")
        return wanted
    for name in COMPILERS:
        if shutil.which(name) is not None:
            return [name]
    raise BuildFailure(f"no C++ compiler was found, neither {' nor '.join(COMPILERS)}")


def openmp_flags(compiler: list[str]) -> tuple[str, ...]:
    """`-fopenmp` where the compiler can link it (Apple's clang cannot: the kernels then use one thread)."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    probe = OBJECTS / f"probe-{os.getpid()}.cpp"
    probe.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
    try:
        command = [*compiler, "-shared", "-fPIC", "-fopenmp", str(probe), "-o", str(probe.with_suffix(".so"))]
        works = subprocess.run(command, capture_output=True).returncode == 0
    finally:
        probe.unlink()
        probe.with_suffix(".so").unlink(missing_ok=True)
    return ("-fopenmp",) if works else ("-Wno-unknown-pragmas",)


def run_unless_current(command: list[str], output: Path, inputs: list[Path], label: str, force: bool) -> bool:
    """Run `command`, which writes `output`, unless it did so before with the same words and no input is newer."""
    stamp = output.with_suffix(".command")
    words = shlex.join([*command, "-o", str(output)])
    if not force and output.exists() and stamp.exists() and stamp.read_text() == words:
        written = output.stat().st_mtime
        if all(path.stat().st_mtime <= written for path in inputs):
            return False
    print(f"mambatrim: building {label}", flush=True)
    stamp.unlink(missing_ok=True)
    # written beside and moved, so that an interrupted build or a second one at the same time leaves no half file
    draft = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(draft)], capture_output=True, text=True)
    if done.stderr:
        print(done.stderr, file=sys.stderr, flush=True)
    if done.returncode != 0:
        draft.unlink(missing_ok=True)
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no message"]
        raise BuildFailure(f"{command[0]} failed on {label}: {errors[0].strip()}")
    draft.replace(output)
    stamp.write_text(words)
    return True


def build_library(force: bool = False) -> Path:
    """Compile what changed, all units at the same time, and link.  Returns the library inside `build/`."""
    parts = units()
    main_sources = {part.source for part in parts}
    for source in sorted(main_sources):
        if not source.is_file():
            raise BuildFailure(f"the source {source.relative_to(ROOT)} is missing")
    compiler = find_compiler()
    openmp = openmp_flags(compiler)
    # every other file in csrc may be included by any unit
    included = [path for path in sorted(CSRC.rglob("*")) if path.is_file() and path not in main_sources]

    def compile_unit(part: Unit) -> Path:
        output = OBJECTS / f"{part.name}.o"
        command = [*compiler, *COMPILE_FLAGS, *openmp, *part.flags, *EXTRA_FLAGS, "-c", str(part.source)]
        run_unless_current(command, output, [part.source, *included], f"the kernels ({part.name})", force)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, parts))
    library = OBJECTS / "_kernels.so"
    link = [*compiler, "-shared", *map(str, objects), *(flag for flag in openmp if flag == "-fopenmp"), *EXTRA_FLAGS]
    if not run_unless_current(link, library, objects, "the library", force):
        print("mambatrim: the kernels are up to date", flush=True)
    return library


class BuildKernels(build_ext):
    """The `build_ext` step: our own compilations in place of those of a Python extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        # loaded by ctypes: no name of a Python version in it
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        try:
            library = build_library(force=bool(self.force))
        except (BuildFailure, OSError) as reason:
            print(
                f"mambatrim: the C++ kernels were not built ({reason}), so a slower PyTorch form will run in their "
                "place; to mend this, install a C++ compiler such as g++ and install mambatrim again.",
                file=sys.stderr,
                flush=True,
            )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)

    def copy_extensions_to_source(self) -> None:
        # a library of older sources would be worse than none; and a running process keeps the file that it has open
        build_py = self.get_finalized_command("build_py")
        Path(build_py.get_package_dir("mambatrim.kernels"), "_kernels.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


class KernelWheel(bdist_wheel):
    """A wheel for any Python 3, and for any platform where no library was built."""

    def get_tag(self) -> tuple[str, str, str]:
        library = Path(self.get_finalized_command("build_ext").get_ext_fullpath(LIBRARY))
        return "py3", "none", super().get_tag()[2] if library.exists() else "any"


setup(
    # optional: an installation without the library is a complete one
    ext_modules=[
        Extension(
            LIBRARY,
            sources=["src/mambatrim/kernels/csrc/kernels.cpp", "src/mambatrim/kernels/csrc/dispatch.cpp"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": KernelWheel},
)
