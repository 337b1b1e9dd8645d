# Everything runs in .venv, which the first target that needs it creates. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo bench evidence test check format clean

help:
	@echo "make demo      train AdamW, Muon and NorMuon on the standard library's source; table and demo/loss.png"
	@echo "make bench     step time, memory and traffic beside every installed peer; benchmarks/results, ten minutes"
	@echo "make evidence  NorMuon at AdamW's rate in fine-tuning; then everybody at tuned rates; tables and plots, an hour"
	@echo "make test      run the tests"
	@echo "make check     formatting, lint, types, who imports whom"
	@echo "make format    apply the formatting"

demo: $(INSTALLED)
	$(BIN)/python examples/compare_optimizers.py

# The large models with the two that matter: a step of one matrix of each size takes two cores 20 seconds.
BENCH := $(BIN)/python benchmarks/step.py
bench: $(INSTALLED)
	$(BENCH) --model gpt2 --repetitions 5
	$(BENCH) --model llama-1.1b --layers 1 --repetitions 3 --only '^ours$$|^ours, muon$$|^torch|^dion.NorMuon$$'
	$(BENCH) --model llama-3-8b --repetitions 1 --only '^ours$$|^torch'
	$(BENCH) --model mixtral --repetitions 1 --only '^ours$$|^torch'

# Interrupted, it goes on where it stopped.
evidence: $(INSTALLED)
	$(BIN)/python benchmarks/pretrained.py
	$(BIN)/python benchmarks/convergence.py

# Two files at a time: many tests start processes and wait for them.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_boundaries.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) demo benchmarks/results .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first: with it in place, no other package's range makes pip fetch another build. On Linux the one on PyPI is for
# CUDA; for a small CPU build set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
