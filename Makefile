# make quickstart | test | lint | types | layering | venv | bench-env | clean
#   PYTHON=python3.11   the interpreter that makes .venv
#   DEVICE=cuda         quickstart on a GPU

PYTHON ?= python3
DEVICE ?= cpu

VENV := .venv
BENCH_VENV := .venv-bench
STAMP := $(VENV)/installed
PARTS := $(wildcard sub-packages/*/pyproject.toml)
CI := VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" ci/run.sh

# Some images set it; every process would then compile anew all that it imports, which takes it half a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test lint types layering venv bench-env clean

quickstart: $(STAMP)
	$(VENV)/bin/python recipes/quickstart.py --device $(DEVICE)

test: $(STAMP)
	$(CI) all

lint types layering: $(STAMP)
	$(CI) $@

venv: $(STAMP)

# One pip command for the root and its siblings, so that each finds the others here and not in a registry. A new pip first:
# it resolves in about half the time. Bytecode is left to the first import, which compiles only what is used.
$(STAMP): pyproject.toml constraints.txt $(PARTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "celltron: error: $(PYTHON) is not Python 3.11 or later; name one with make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade -c constraints.txt pip || echo "pip could not be renewed: the next step takes longer"
	PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt $(PARTS:%/pyproject.toml=-e ./%) -e '.[dev]'
	@touch $@

# What recipes/benchmarks compares celltron with, in an environment of its own.
bench-env: $(BENCH_VENV)/installed

$(BENCH_VENV)/installed: recipes/benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --no-compile -r $<
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) build quickstart .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +
