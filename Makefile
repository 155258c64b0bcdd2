# make demo | test | lint: each sets up all that it needs on a fresh clone, and is quick the second time.
# Another Python: make test PYTHON=python3.12.  Another compiler: make test CXX=clang++.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/installed
BUILT := $(VENV)/built
BUILD := $(BIN)/python setup.py --quiet build_ext --inplace
CSRC := $(wildcard src/mambatrim/kernels/csrc/*)

# threads that spin while they wait make everything slow beside another busy process
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint format sanitize venv kernels clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo      real images through the bundled model, with all tokens and with fewer"
	@echo "make test      the tests"
	@echo "make lint      ruff and mypy"
	@echo "make format    ruff, writing what it can mend"
	@echo "make sanitize  the tests of the kernels, built with the address and undefined-behaviour sanitizers (gcc; minutes)"
	@echo "make venv      only the set-up that all of these share: $(VENV), dependencies, kernels"
	@echo "make kernels   compile the C++ kernels again where they changed"
	@echo "make clean     remove the environment and everything that was built"

demo: venv
	$(BIN)/mambatrim demo

test: venv
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# a copy of the package in build/, with a library of its own. Leaks are not looked for: Python and torch have theirs
SANITIZED := build/sanitized
CHECKS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g
# of every file in csrc/; of test_virtual.py all that calls a kernel and loads no whole model
KERNEL_TESTS := tests/test_kernels.py tests/test_kernels_robust.py tests/test_merging.py tests/test_mixer.py tests/test_packed.py \
	tests/test_steps.py tests/test_virtual.py
PRELOADED = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)

sanitize: $(INSTALLED)
	CXXFLAGS="$(CHECKS)" $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@test -f $(SANITIZED)/lib/mambatrim/kernels/_kernels.so
	LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)/lib \
		$(BIN)/python -m pytest -p no:cacheprovider $(KERNEL_TESTS)

venv: $(INSTALLED) $(BUILT)

kernels: $(BUILT)

# the library lies beside the sources; where nothing could be compiled the next make tries again
$(BUILT): $(CSRC) setup.py | $(INSTALLED)
	@$(BUILD)
	@test ! -f src/mambatrim/kernels/_kernels.so || touch $@

# torch first: it is the big one, and the rest is checked against it
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "mambatrim: $(PYTHON) was not found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mambatrim: Python 3.11 or newer is needed and $(PYTHON) is `$(PYTHON) -V 2>&1`; name a newer one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { echo "mambatrim: $(PYTHON) cannot make virtual environments (ensurepip or venv is missing); install them (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(PIP) --version > /dev/null 2>&1 || { echo "mambatrim: creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "mambatrim: installing torch (the largest download)"
	$(PIP) install -c constraints.txt torch setuptools
	@echo "mambatrim: building the C++ kernels (pip would do it too, but silently)"
	@$(BUILD)
	@echo "mambatrim: installing mambatrim and its development tools"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/mambatrim.egg-info src/mambatrim/kernels/_kernels.so
