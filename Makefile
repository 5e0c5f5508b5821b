# Both commands need Python 3.11+ and make, nothing else. They install into .venv once and reuse it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# The environment made here holds JAX for CPU; TPU_SETUP.md says how to use an accelerator.
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint bench methods clean

demo: .venv/demo.stamp  ## Learn handwritten digits, then sample them guided and steered (about 5 minutes on 2 cores).
	$(BIN)/esscher digits --name demo $(FLAGS)

test: .venv/test.stamp  ## Run the tests.
	$(BIN)/python -m pytest -n 2 $(FLAGS)

lint: .venv/test.stamp  ## Check style; `ruff format .` and `ruff check --fix .` mend most of it.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/test.stamp  ## Measure against peers, in one run each; installs torch, diffusers, transformers and trl.
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[experiments,dev,peers]'
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script || exit 1; done

methods: .venv/test.stamp  ## Write METHODS.md anew from the docstrings.
	$(BIN)/python tools/methods.py > METHODS.md.new && mv METHODS.md.new METHODS.md

clean:  ## Remove the environment and the caches, not the runs.
	rm -rf .venv .jax_cache .pytest_cache .ruff_cache *.egg-info

.venv/demo.stamp: EXTRAS := experiments
.venv/test.stamp: EXTRAS := experiments,hf,dev,tpu
.venv/%.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: esscher needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@
