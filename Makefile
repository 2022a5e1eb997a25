# Everything runs from a virtual environment with pinned versions, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the oldest versions that the project supports
FLOORS_VENV ?= .venv-floors
# SAELens and sparsify, with which SAEs are exchanged
PEERS_VENV ?= .venv-peers
# the newest versions, and the trainers of TRL
TRL_VENV ?= .venv-trl
CORE := $(addprefix tests/,model/test_conversion.py model/test_layer.py model/test_parity.py model/test_peft.py \
	model/test_saving.py model/test_steering.py test_saved_before.py training/test_losses.py training/test_training.py)
# two processes of one thread each: threads of one process that wait for each other would slow both down
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# tests and examples start many processes, which would compile every package anew without byte code
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-browser test-floors test-slow test-extras test-peers test-trl test-transformers test-checkpoint fuzz chaos \
	mutation coverage lint format docs benchmark fidelity real-checkpoint all-blocks predictions

demo: $(VENV)/installed-demo
	$(BIN)/mfn demo --overwrite

test: $(VENV)/installed lint
	$(PYTEST) tests

# the explorer in Debian's chromium; a short part of it is in `make test`
test-browser: $(VENV)/installed
	$(BIN)/pytest tests/explorer/browser -m ""

# the core once more, with the oldest versions that the project supports
test-floors: $(FLOORS_VENV)/installed
	OMP_NUM_THREADS=1 $(FLOORS_VENV)/bin/pytest -n 2 $(CORE)

# the mixin over the trainers of TRL
test-trl: $(TRL_VENV)/installed
	CI=1 OMP_NUM_THREADS=1 $(TRL_VENV)/bin/pytest -m trl tests/training/test_trl.py tests/test_examples.py

# before a release: what takes long, and what needs the network
test-slow: $(VENV)/installed test-transformers test-checkpoint test-extras
	$(PYTEST) tests -m slow

# every extra in an environment of its own
test-extras: $(VENV)/installed
	$(BIN)/pytest tests/test_packaging.py -m extras

# SAEs out to and in from SAELens and sparsify, computed by both sides; the differences become a table of the documents
test-peers: $(PEERS_VENV)/installed
	OMP_NUM_THREADS=1 $(PEERS_VENV)/bin/pytest -m peers tests/interop/test_peers.py
	OMP_NUM_THREADS=1 $(PEERS_VENV)/bin/python -m benchmarks.interop.parity

# transformers' own model tests, of the installed release
test-transformers: $(VENV)/installed
	$(PYTEST) tests/model/transformers_common

# 100,000 damaged files and values: none may end in another error than one that refuses it
fuzz: $(VENV)/installed
	$(BIN)/python -m benchmarks.reliability.fuzz

# commands that are killed, and full and read-only disks: what is left must be whole
chaos: $(VENV)/installed
	$(BIN)/python -m benchmarks.reliability.chaos

# small errors in the modules that compute: a test must notice each
mutation: $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[reliability]"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability.mutants

# lines and branches that the whole suite runs, also in the processes that tests start
coverage: $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[reliability]"
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 tests
	$(BIN)/coverage combine --quiet
	$(BIN)/python -m benchmarks.reliability.branches

# the suite's claims once more on the demo's real checkpoint
test-checkpoint: $(VENV)/installed
	$(BIN)/pytest tests -m checkpoint

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the documents as a site, in site/: a broken link or a missing docstring fails
docs: $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

benchmark: $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[benchmarks]"
	$(BIN)/python -m benchmarks.speed.layer

# dense and MFN models side by side: every run that has no result yet, many hours on two cores
fidelity: $(VENV)/installed
	$(BIN)/python -m benchmarks.small.fidelity

# what reading through features costs SmolLM2-135M: every stage that has no result yet, many hours on two cores
real-checkpoint: $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[benchmarks]"
	$(BIN)/python -m benchmarks.smollm2.real_checkpoint

# all 30 blocks of SmolLM2-135M: every stage that has no result yet, hours on two cores
all-blocks: $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[benchmarks]"
	$(BIN)/python -m benchmarks.smollm2.all_blocks

# the paper's five predictions on small models: more than an hour on two cores
predictions: $(VENV)/installed
	$(BIN)/python -m benchmarks.small.predictions --codes update

# --no-compile: Python compiles what is used when it is first imported
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	touch $@

# the demo's packages alone; Python writes the byte code of what is used, which is half the time of an installation
$(VENV)/installed-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0 --editable ".[demo]"
	touch $@

$(TRL_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(TRL_VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable ".[all]" pytest hypothesis trl
	touch $@

$(FLOORS_VENV)/installed: pyproject.toml constraints-min.txt
	$(PYTHON) -m venv $(FLOORS_VENV)
	$(FLOORS_VENV)/bin/pip install --quiet --no-compile --constraint constraints-min.txt torch
	$(FLOORS_VENV)/bin/pip install --quiet --no-compile --constraint constraints-min.txt --editable ".[all]" hypothesis pytest pytest-xdist
	touch $@

$(PEERS_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(PEERS_VENV)/bin/pip install --quiet --no-compile --constraint constraints.txt --editable . sae-lens==6.54.12 \
		eai-sparsify==1.3.3 pytest
	touch $@
