# Every target makes its own environment in .venv when there is none, and the second call finds it ready.
#   PYTHON   the interpreter that makes .venv, 3.11 or newer
#   WORKERS  test processes; each runs torch on one thread
PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help quickstart test test-long faults lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   train a tiny model on this machine's CPU and see what it learned"
	@echo "make test         the tests; under half an hour on two cores"
	@echo "make test-long    the long proofs"
	@echo "make faults       kills and resumes of every stage, written to bench/results; ten minutes"
	@echo "make lint         ruff and mypy"
	@echo "make bench        the measurements, written to bench/results"
	@echo "make clean        remove the environment and the caches"

# torch comes first and alone: it is the one large download, and a build that is already there is kept. DeepSpeed comes
# last, since its build asks torch, and compiles nothing.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: PYTHON must be 3.11 or newer, got " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[deepspeed]"
	touch $@

# One thread: for a model of this size a second one gains little, and on a busy machine they wait for each other.
quickstart: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/lf-lightning fit --config configs/sft/quickstart.yaml --overwrite true

test: $(READY)
	$(PYTEST)

test-long: $(READY)
	$(PYTEST) -m slow

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.run

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	set -e; for script in bench/*.py; do $(BIN)/python $$script; done

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
