# Everything here works on a fresh clone with Python 3.11 or later, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing is reported to anyone, and nothing is fetched that was not asked for.
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test check install browser clean

install:  ## the virtual environment with the locked CPU stack
	@$(PYTHON) requirements/install.py $(VENV)

demo: install  ## from raw notes to recall and ranking on the synthetic world: data, training, tables, report
	@$(BIN)/notellm2 run --preset demo

test: install browser  ## lint, types and all tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q --durations=15

# The page's tests drive a real Chromium; where there is none and it cannot be installed they are skipped, and say so.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no Chromium here: the page's tests are skipped"

check: install  ## the quick part of the tests
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -q -m "not slow"

clean:  ## what demo and test made, the environment included
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
