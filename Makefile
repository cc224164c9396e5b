# make demo and make test do everything from a fresh checkout: they make .venv, install pinned packages and this
# one, and run. A second call installs nothing again. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHON
# Processes that the tests run in.
JOBS ?= 2
# What `make test` leaves out and `make check` runs: compilation for other machines, long emulations, wide matrices.
LEFT_OUT ?= slow
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.PHONY: demo test lint types format bench gpu gpu-here check clean help
.DELETE_ON_ERROR:

help:
	@echo "make demo    pre-train tiny MoE models, unlearn with TRACE, print what it did, write runs/demo/report.html"
	@echo "make test    run the tests           make check    all of them, the slow ones too, lint and types: what CI runs"
	@echo "make lint    ruff and clang-format        make types   mypy --strict"
	@echo "make bench   micro-benchmarks             make format  rewrite files in the project's style"
	@echo "make gpu     on a CUDA device: conformance, timings beside the peers, compute-sanitizer"
	@echo "make gpu-here   the same with the Python, torch and Triton that are there, without a network"

demo: $(VENV)/.built
	$(BIN)/trace-unlearn demo --output runs/demo $(DEMO)

test: $(VENV)/.built
	$(BIN)/python -m pytest -n $(JOBS) $(if $(LEFT_OUT),-m "not ($(LEFT_OUT))") $(TEST)

lint: $(VENV)/.deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

types: $(VENV)/.built
	$(BIN)/mypy

format: $(VENV)/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks.run --op all $(BENCH)

gpu: $(VENV)/.built
	PYTHON=$(BIN)/python tools/gpu.sh $(GPU)

gpu-here:
	PYTHON=$(PYTHON) tools/gpu.sh $(GPU)

check: LEFT_OUT =
check: test lint types

$(VENV)/.deps: $(wildcard requirements/*.txt) tools/bootstrap.sh
	tools/bootstrap.sh deps
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	tools/bootstrap.sh build
	@touch $@

clean:
	rm -rf build dist *.egg-info trace_kernels/_native*.so $(VENV)
