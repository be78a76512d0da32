# Two commands matter: `make demo` (see it work) and `make test` (prove it works).
# Everything is installed into .venv at the versions of constraints.txt; after the first run both work offline.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := s3loader integrations tests benchmarks examples

DATA ?=
URL ?=
OUT ?= demo-output

FUZZ_COUNT ?= 100000
FUZZ_SECONDS ?= 300
MINUTES ?= 10

.PHONY: help demo test fuzz soak lint format clean bench-get bench-exchange bench-load bench-ckpt bench-far bench-workers bench-pack bench-node bench-scale

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "s3loader needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(PY)
	@echo "installing s3loader and what the demo needs into $(VENV) ..."
	@test -f $(VENV)/.installed-dev || $(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(PY)
	@echo "installing s3loader and what the tests need into $(VENV) (a few minutes the first time) ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo  ## pack images, train, kill, resume, prove it (DATA=DIR, URL=s3://..., OUT=DIR)
	@$(PY) -m examples.demo $(if $(DATA),--data '$(DATA)') $(if $(URL),--url '$(URL)') --out '$(OUT)'

test: $(VENV)/.installed-dev  ## run every test
	@$(PY) -m pytest -n 2 --dist worksteal $(ARGS)

fuzz: $(VENV)/.installed-dev  ## read damaged objects of every stored format (FUZZ_COUNT=, FUZZ_SECONDS= of each)
	@FUZZ_COUNT=$(FUZZ_COUNT) FUZZ_SECONDS=$(FUZZ_SECONDS) $(PY) -m pytest -q -o faulthandler_timeout=0 tests/fuzz $(ARGS)

soak: $(VENV)/.installed-dev  ## load, append and save against a bad network, with kills, then count (MINUTES=10)
	@$(PY) -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff, mypy --strict, pyright
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { echo "run: make format"; exit 1; }
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/pyright --pythonpath $(PY)

format: $(VENV)/.installed-dev  ## put every file into the house format
	@$(BIN)/ruff format --quiet $(SOURCES)
	@$(BIN)/ruff check --quiet --fix $(SOURCES)

bench-get: $(VENV)/.installed-dev  ## the object layer against its peers and a C loop
	@$(PY) -m benchmarks.get $(ARGS)

bench-exchange: $(VENV)/.installed-dev  ## manifests, shards and virtual keys
	@$(PY) -m benchmarks.exchange $(ARGS)

bench-load: $(VENV)/.installed-dev  ## loading samples against peers
	@$(PY) -m benchmarks.load $(ARGS)

bench-ckpt: $(VENV)/.installed-dev  ## saving and loading checkpoints against peers
	@$(PY) -m benchmarks.ckpt $(ARGS)

bench-far: $(VENV)/.installed-dev  ## a distant store: first byte after 2, 25 and 80 ms, against peers
	@$(PY) -m benchmarks.far $(ARGS)

bench-workers: $(VENV)/.installed-dev  ## from which cost of decoding on worker processes pay
	@$(PY) -m benchmarks.workers $(ARGS)

bench-pack: $(VENV)/.installed-dev  ## packing here, in processes, and on Ray: samples/s, cost of a task
	@$(PY) -m benchmarks.pack $(ARGS)

bench-node: $(VENV)/.installed-dev  ## processes of one node that read the same: bytes downloaded, CPU seconds
	@$(PY) -m benchmarks.node $(ARGS)

bench-scale: $(VENV)/.installed-dev  ## a sizing table of 10^6 to 10^10 samples on 1 to 16,384 ranks, by simulation
	@$(PY) -m benchmarks.scale $(ARGS)

clean:  ## remove what the commands made
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis benchmarks/out benchmarks/.peers
