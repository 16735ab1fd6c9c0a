# Everything a person types: `make image PROMPT="..."`, `make test`. The first call builds .venv.
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

.PHONY: guide image test test-full lint format bench clean

image: $(VENV)/.installed
	@$(BIN)/python sd/inference.py --prompt "$$PROMPT" --steps $(STEPS) --sampler $(SAMPLER) \
	    $(if $(value OUT),--out "$$OUT") $(if $(SEED),--seed $(SEED)) $(if $(CKPT),--ckpt "$(CKPT)") $(ARGS)

test: $(VENV)/.installed-dev
	# Small models: two processes of one thread each; a second thread would only wait for the first.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" -n 2 --dist loadfile

test-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m full -rs tests/test_full_size.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m full -rs -n 2 --dist loadfile --ignore tests/test_full_size.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/ladder.py --device cpu --size 256 --steps 2 --fidelity-steps 10 --pairs 3 \
	    --opts winograd,cpu-linear,cpu-attention,cpu-norm,kv-cache,keep-memory,shared-halves --out out/bench

# docs/guide/ out of docstrings, results and code; PICTURES=1 draws its pictures anew first.
guide: $(VENV)/.installed-dev
	$(BIN)/python -m bench.guide $(if $(PICTURES),--pictures)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-oracles.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-oracles.txt
	@touch $@
