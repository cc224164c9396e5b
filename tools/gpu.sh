#!/usr/bin/env bash
# Everything that needs a GPU, with the Python, torch and Triton that are there: no network, no virtual environment.
# Usage: [PYTHON=python3] tools/gpu.sh [--minutes 7] [--output FILE.json]; python -m benchmarks.gpu --help says more.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
