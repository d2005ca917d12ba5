# Everything here works on a machine with only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow check bench bench-full-size bench-gpu install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[export,test,dev]'
	touch $@

# A checkpoint of random weights, its bundle, and a picture: the whole way, on this machine.
demo: $(STAMP)
	rm -rf out/demo && mkdir -p out/demo
	$(BIN)/zimage-export synthesize out/demo/checkpoint
	$(BIN)/zimage-export build out/demo/checkpoint out/demo/bundle
	$(BIN)/zimage-rt run "a red circle left of a blue square" -m out/demo/bundle --seed 1 -o out/demo/picture.png

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# WORK keeps the synthetic models between runs: 10 GB, and 55 GB more for the full-size one.
WORK ?= out/bench
bench: $(STAMP)
	$(BIN)/python benchmarks/memory_model.py --work $(WORK)
	$(BIN)/python benchmarks/cpu_step.py --work $(WORK)

bench-full-size: $(STAMP)
	$(BIN)/python benchmarks/full_size.py --work $(WORK)/full-size

# On a machine with an NVIDIA GPU and onnxruntime-gpu (the README says how to put it in the place of onnxruntime).
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu_cuda.py --work $(WORK)/gpu

clean:
	rm -rf $(VENV) out build dist
