#!/usr/bin/env bash
# The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer (every conformance case of the cpu backend on the
# best instruction set of this machine, those that reach the edges of tiles on every other one), then the cases that use
# several threads under ThreadSanitizer; at last the CUDA kernels, whose threads are fibres of ThreadSanitizer.
# Usage: tools/sanitize.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "${1:-.venv/bin/python}")
ROOT=$PWD
PATH=$(dirname "$PYTHON"):$PATH  # its cmake and ninja
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
BUILD=${TRACE_KERNELS_SANITIZE_BUILD_DIR:-$WORK/build}

# build NAME FLAGS: a copy of the package with the instrumented module in it; the installed one stays as it is.
build() {
  mkdir -p "$WORK/$1"
  cp -r trace_kernels "$WORK/$1/"
  rm -f "$WORK/$1"/trace_kernels/_native*.so
  cmake -S . -B "$BUILD-$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DTRACE_KERNELS_CUDA=off -DPython_EXECUTABLE="$PYTHON" \
    -DCMAKE_CXX_FLAGS="$2" \
    -DTRACE_KERNELS_OUTPUT="$WORK/$1/trace_kernels/_native$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')" >/dev/null
  cmake --build "$BUILD-$1" >/dev/null
  export PYTHONPATH=$WORK/$1:$ROOT/python
  (cd "$WORK" && "$PYTHON" -c 'import trace_kernels, sys; sys.exit(not trace_kernels.__file__.startswith(sys.argv[1]))' "$WORK") ||
    { echo "the instrumented package is not the one that is imported" >&2; exit 1; }
}
library() { gcc -print-file-name="$1"; }
# -s: a sanitizer writes its report and ends the process, so pytest could not show what it had captured.
TESTS=(-q -x -s -n 0 -p no:cacheprovider -c "$ROOT/pyproject.toml" "$ROOT/tests/kernels/test_conformance.py")

build address "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
run() {
  (cd "$WORK" && LD_PRELOAD=$(library libasan.so):$(library libubsan.so) ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 "$PYTHON" -m pytest "${TESTS[@]}" -k "$1")
}
# One process tests while the other module is compiled.
(
  run "test_backend_is_right and cpu-cpu"
  for isa in portable avx2 avx512 avx512bf16; do
    grep -qw "$(echo $isa | sed 's/portable/fpu/; s/avx512bf16/avx512_bf16/; s/^avx512$/avx512f/')" /proc/cpuinfo || continue
    echo "TRACE_KERNELS_ISA=$isa"
    TRACE_KERNELS_ISA=$isa run "test_backend_is_right and cpu-cpu and (tiles or tail or strided or full or groups)"
  done
) &
address=$!

# The kernels' own threads instead of torch's OpenMP pool, whose barriers ThreadSanitizer cannot see; torch's races with
# its uninstrumented pool are not ours. AVX2: GCC 12 reloads a spilled 16-bit AVX-512 mask as 32 bits between the calls
# that ThreadSanitizer puts in (no other build has calls there).
build thread "-fsanitize=thread"
wait $address
printf 'race:libtorch_cpu.so\nrace:libgomp\n' >"$WORK/suppressions"
cat >"$WORK/own_threads.py" <<'EOF'
import sys

import pytest

from trace_kernels.runtime import native

native._openmp_libraries = list
assert native.native().parallel_runtime() == "threads"
sys.exit(pytest.main(sys.argv[1:]))
EOF
isa=portable
if grep -qw avx2 /proc/cpuinfo; then isa=avx2; fi
echo "ThreadSanitizer, TRACE_KERNELS_ISA=$isa"
# setarch -R: its shadow memory does not fit every randomised layout.
(cd "$WORK" && TRACE_KERNELS_ISA=$isa OMP_NUM_THREADS=4 LD_PRELOAD=$(library libtsan.so) \
  TSAN_OPTIONS="suppressions=$WORK/suppressions exitcode=66" setarch -R "$PYTHON" own_threads.py "${TESTS[@]}" \
  -k "test_backend_is_right and cpu-cpu and (tiles or tail or many_tokens or full or groups or record)")

echo "CUDA kernels under ThreadSanitizer"
unset PYTHONPATH
TRACE_KERNELS_RACES=1 PYTHONPATH=$ROOT:$ROOT/python "$PYTHON" -m pytest -q -x -n "${JOBS:-2}" -p no:cacheprovider tests/kernels/cuda/test_races.py
