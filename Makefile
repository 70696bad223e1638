# make demo    the main job on the bundled sample
# make test    format, lint, types and the fast tests, in under 6 minutes on two cores
# make check   format, lint and types only
# make test-all  the slow tests as well
# make fuzz    5000 damaged files for the command line; SEED=1 for others
# make test-versions  the sample and the fast tests with the oldest and the newest releases that pyproject.toml allows
# make coverage  the fast tests, with the lines of qdeploy/, backends/ and calibration/ that they miss
# Each target makes its own virtual environment first; Python 3.11 or newer is all that must be there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
SEED ?= 0
# two test processes with one thread each use two cores better than two threads in one
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10

.PHONY: demo test test-all fuzz test-versions coverage check format clean

demo: $(VENV)/all.stamp
	$(BIN)/qdeploy quantize samples/digits.pt2 --backend snpe --data samples/digits_calibration.npz \
		--verify-data samples/digits_test.npz --out $(OUT)

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

fuzz: $(VENV)/dev.stamp
	$(BIN)/python tools/fuzz.py --cases 5000 --jobs 2 --seed $(SEED)

coverage: $(VENV)/dev.stamp
	$(PYTEST) -m "not slow" --cov --cov-report=term-missing:skip-covered

# make test-versions SETS="oldest -- tests/test_api.py" for one of the two, and some tests
test-versions:
	$(PYTHON) tools/test_versions.py $(SETS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/typecheck.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-versions build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "qdeploy needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/all.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
