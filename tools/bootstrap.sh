#!/usr/bin/env bash
# Makes .venv and fills it: pinned packages, then this package in editable mode. Called by the Makefile, which
# skips it while nothing it reads has changed. Usage: tools/bootstrap.sh deps|build
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() { printf '%s\n' "$@" >&2; exit 1; }

deps() {
  command -v "$PYTHON" >/dev/null || fail "No $PYTHON on PATH. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$PYTHON" --version) is too old: Python 3.10 or newer is needed. Name another: make PYTHON=python3.12"
  "$PYTHON" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    fail "The headers of $PYTHON are missing. On Debian or Ubuntu: apt install python3-dev"
  command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || fail "No C++ compiler. On Debian or Ubuntu: apt install g++"
  if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$VENV"
    "$PYTHON" -m venv "$VENV" 2>/dev/null || "$PYTHON" -m virtualenv -q "$VENV" 2>/dev/null || {
      rm -rf "$VENV"
      fail "$PYTHON cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv"
    }
  fi
  torch
  echo "Installing pinned packages into $VENV"
  "$VENV/bin/python" -c 'import triton' 2>/dev/null || "$VENV/bin/python" -m pip install -qq -r requirements/triton.txt
  "$VENV/bin/python" -m pip install -qq -r requirements/dev.txt
}

# A GPU gets the CUDA build of torch; any other machine the CPU build, which is found on a configured package index,
# or through uv, which knows where PyTorch publishes it.
torch() {
  local wanted
  wanted=$(sed -n 's/^torch==//p' requirements/torch.txt)
  if "$VENV/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$wanted')" 2>/dev/null; then return; fi
  if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "A GPU is here: installing the CUDA build of torch (several gigabytes)"
    "$VENV/bin/python" -m pip install -qq -r requirements/torch.txt
    return
  fi
  echo "No GPU is here: installing the CPU build of torch"
  "$VENV/bin/python" -m pip install -qq -r requirements/torch-cpu.txt 2>/dev/null && return
  "$VENV/bin/python" -m pip install -qq uv &&
    "$VENV/bin/uv" pip install -qq --python "$VENV/bin/python" --torch-backend cpu -r requirements/torch.txt && return
  echo "The CPU build was not found: taking the default build, which is large"
  "$VENV/bin/python" -m pip install -qq -r requirements/torch.txt
}

build() {
  echo "Building trace-kernels"
  PATH="$PWD/$VENV/bin:$PATH" "$VENV/bin/python" -m pip install -qq --no-build-isolation --no-deps -e .
}

"$1"
