# Everything here works on a fresh clone with Python 3.11 or later, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Nothing is reported to anyone, and nothing is fetched that was not asked for.
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test check install clean

install:  ## the virtual environment with the locked CPU stack
	@$(PYTHON) requirements/install.py $(VENV)

demo: install  ## the whole path on the synthetic world: data, training, recall table, report
	@$(BIN)/notellm2 run --preset demo

test: install  ## lint, types and all tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q --durations=15

check: install  ## the quick part of the tests
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -q -m "not slow"

clean:  ## what demo and test made, the environment included
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
