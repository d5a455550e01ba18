# Each target sets up .venv by itself; only Python (3.11 to 3.13) and make are needed.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint bench figures

demo: .venv/run.stamp  ## train the default agent: a point robot finds its way out of a U
	$(BIN)/python algorithms/crl.py

test: .venv/dev.stamp  ## run all tests, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/dev.stamp  ## measure the speed of the scripts, and of their designs against naive ones; then the tables
	$(BIN)/python experiments/bench.py
	$(BIN)/python experiments/bench_ratios.py
	$(BIN)/python experiments/bench_update.py
	$(MAKE) figures

figures: .venv/dev.stamp  ## redraw every figure and table from the CSVs of results/, and say which differ
	$(BIN)/python experiments/figures.py

.venv/pip.stamp:
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || \
		{ echo "error: $(PYTHON) is not Python 3.11, 3.12 or 3.13; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/run.stamp: .venv/pip.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
