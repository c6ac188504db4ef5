# `make demo` shows the main job, `make test` checks everything; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
# A worker for each core, with one thread each: small networks hardly gain from a second thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal
PROJECTS := pyproject.toml $(addsuffix pyproject.toml,$(PLUGINS))

.PHONY: demo test fast lint setup

demo: setup
	$(BIN)/python examples/campfire.py

test: setup lint
	$(PYTEST)

fast: setup
	$(PYTEST) -m "not slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src $(addsuffix src,$(PLUGINS))

setup: .venv/installed

.venv/installed: $(PROJECTS) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]" $(addprefix -e ./,$(PLUGINS))
	touch $@
