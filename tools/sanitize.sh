#!/usr/bin/env bash
# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every conformance case of the cpu backend on the
# best instruction set of this machine, and those that reach the edges of tiles on every other one.
# Usage: tools/sanitize.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "${1:-.venv/bin/python}")
ROOT=$PWD
PATH=$(dirname "$PYTHON"):$PATH  # its cmake and ninja
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
BUILD=${TRACE_KERNELS_SANITIZE_BUILD_DIR:-$WORK/build}

# A copy of the package with the instrumented module in it, so that the installed one stays as it is.
mkdir -p "$WORK/package"
cp -r trace_kernels "$WORK/package/"
rm -f "$WORK"/package/trace_kernels/_native*.so
cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release -DTRACE_KERNELS_CUDA=off -DPython_EXECUTABLE="$PYTHON" \
  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
  -DTRACE_KERNELS_OUTPUT="$WORK/package/trace_kernels/_native$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" >/dev/null
cmake --build "$BUILD" >/dev/null

cd "$WORK"
export PYTHONPATH=$WORK/package:$ROOT/python
LIBRARIES=$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)
run() {
  LD_PRELOAD=$LIBRARIES ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider -c "$ROOT/pyproject.toml" "$ROOT/tests/test_conformance.py" -k "$1"
}
"$PYTHON" -c 'import trace_kernels, sys; sys.exit(not trace_kernels.__file__.startswith(sys.argv[1]))' "$WORK" ||
  { echo "the instrumented package is not the one that is imported" >&2; exit 1; }
run "test_backend_is_right and cpu-cpu"
for isa in portable avx2 avx512 avx512bf16; do
  grep -qw "$(echo $isa | sed 's/portable/fpu/; s/avx512bf16/avx512_bf16/; s/^avx512$/avx512f/')" /proc/cpuinfo || continue
  echo "TRACE_KERNELS_ISA=$isa"
  TRACE_KERNELS_ISA=$isa run "test_backend_is_right and cpu-cpu and (tiles or tail or strided or full or groups)"
done
