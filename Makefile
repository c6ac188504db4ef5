# `make demo` shows the main job, `make gallery` runs all examples, `make test` checks everything,
# `make fuzz` tries thousands of broken files and odd commands, `make docs` builds the site; all set
# up .venv first.
PYTHON ?= python3
BIN := .venv/bin
PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
# A worker for each core, with one thread each: small networks hardly gain from a second thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal
PROJECTS := pyproject.toml $(addsuffix pyproject.toml,$(PLUGINS))

.PHONY: demo gallery test fast fuzz lint docs setup

demo: setup
	$(BIN)/python examples/campfire.py

gallery: setup
	$(BIN)/python docs/make_gallery.py

test: setup lint docs
	$(PYTEST)

fast: setup
	$(PYTEST) -m "not slow and not gpu"

# New cases each time: 2,000 of each kind, and 500 stacks against a plain loop. Half an hour of a core.
fuzz: setup
	OMP_NUM_THREADS=1 PILOTFISH_FUZZ=2000 $(BIN)/python -m pytest -q -p no:xdist tests/test_fuzz.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src $(addsuffix src,$(PLUGINS)) $(wildcard plugins/*/training/*_training)

# Not --quiet: that hides warnings from --strict too. The theme's notice is about MkDocs 2, which
# constraints.txt keeps out.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

setup: .venv/installed

.venv/installed: $(PROJECTS) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]" $(addprefix -e ./,$(PLUGINS))
	touch $@
