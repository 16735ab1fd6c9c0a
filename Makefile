# Everything a person types; `make help` lists it. The first call builds .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PROMPT ?= a red apple
OUT ?=
STEPS ?= 25
SAMPLER ?= ddim
SEED ?=
CKPT ?=
ARGS ?=
# As typed: a dollar sign in a prompt is no variable of make's.
override PROMPT := $(value PROMPT)
export PROMPT OUT

# pip's log in short: a line a package with its size, and how many are installed at the end.
define SHORT
/^ *Downloading .*\.whl \(|^ *Downloading .*\.tar\.gz \(/ { sub(/^ *Downloading /, ""); sub(/.*\//, ""); show("download  " $$0) }
/^ *Using cached .*\.whl \(/ { sub(/^ *Using cached /, ""); sub(/.*\//, ""); show("cached    " $$0) }
/^ *Processing / { sub(/^ *Processing /, ""); sub(/.*\//, ""); show("on disk   " $$0) }
/^Installing collected packages/ { show("install   " NF - 3 " packages, which takes a minute") }
function show(text) { sub(/-(cp|py)[^ ]*\.whl/, "", text); sub(/ \(from .*/, "", text); printf "%s%3d %s\n", "  ", ++count, text; fflush() }
endef
export SHORT
INSTALL = set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off

.PHONY: guide image help test test-full fuzz lint format bench clean

image: $(VENV)/.installed  ## draw PROMPT="a red apple" into output.png (OUT=, STEPS=, SAMPLER=, SEED=, CKPT=, ARGS=)
	@$(BIN)/python sd/inference.py --show --prompt "$$PROMPT" --steps $(STEPS) --sampler $(SAMPLER) \
	    $(if $(value OUT),--out "$$OUT") $(if $(SEED),--seed $(SEED)) $(if $(CKPT),--ckpt "$(CKPT)") $(ARGS)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(VENV)/.installed-dev  ## all tests with small models, 5 minutes on 2 cores
	# Small models: two processes of one thread each; a second thread would only wait for the first.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" -n 2 --dist loadfile

test-full: $(VENV)/.installed-dev  ## SD 1.5 and 2.1 at their sizes beside diffusers: 16 GB of memory
	$(BIN)/python -m pytest -m full -rs tests/test_full_size*.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m full -rs -n 2 --dist loadfile --ignore-glob="*/test_full_size*.py"

fuzz: $(VENV)/.installed-dev  ## inputs that nobody thought of, others each time: an hour (ARGS="-k pickle")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile fuzz -n 2 \
	    $$(grep -lE "tried\(|@given" -r tests --include="test_*.py") $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev  ## the ladder of a CPU, in out/bench
	$(BIN)/python bench/ladder.py --device cpu --size 256 --steps 2 --fidelity-steps 10 --pairs 3 \
	    --opts winograd,cpu-linear,cpu-attention,cpu-norm,kv-cache,keep-memory,shared-halves --out out/bench

guide: $(VENV)/.installed-dev  ## docs/guide out of docstrings, results and code (PICTURES=1 draws them anew first)
	$(BIN)/python -m bench.guide $(if $(PICTURES),--pictures)

format: $(VENV)/.installed-dev  ## ruff, and it mends
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11" >&2; exit 2; }
	@echo "a virtual environment, in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	@echo "what it runs with, into $(VENV): torch and ten small packages (requirements.txt), and what these need"
	@$(INSTALL) -r requirements.txt | awk "$$SHORT"
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-oracles.txt $(VENV)/.installed
	@echo "what the tests run with, into $(VENV): pytest, ruff, and the programs that it is compared with"
	@$(INSTALL) -r requirements-dev.txt | awk "$$SHORT"
	@$(INSTALL) --no-deps -r requirements-oracles.txt | awk "$$SHORT"
	@touch $@
