#!/usr/bin/env bash
# Everything about the CUDA kernels that needs a GPU, in one command: build for this card, kernel tests, compute-sanitizer on small
# shapes, benchmarks beside the peers, raw rows in build/gpu/rows.json. Offline; needs nvcc, torch with CUDA, cmake, ninja, pybind11 and
# pytest. GPU_CHECK=emulated is the dry run for a machine without a GPU: the same steps on the emulated kernels, nothing timed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$( [ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python3)}
out=build/gpu
mkdir -p $out
step() { echo "== gpu-check: $1 (${SECONDS} s)"; }

if [ "${GPU_CHECK:-}" = emulated ]; then
  step "build of the emulated kernels"
  module=$("$python" tests/kernels/emulated_build.py)
  step "kernel tests, emulated"
  "$python" -m pytest tests/kernels -k "emulated or emulator or any_order" -p no:cacheprovider
  step "benchmark cases on small shapes, emulated"
  "$python" -m bench.gpu --small --emulated "$module"
  step "done: nothing here was run or timed on a GPU"
  exit 0
fi

"$python" -c 'import sys, torch; sys.exit("gpu-check: torch finds no GPU; GPU_CHECK=emulated is the dry run" if not torch.cuda.is_available() else 0)'
step "build for this card"
"$python" -m cmake --version > /dev/null 2>&1 && cmake="$python -m cmake" || cmake=cmake
architecture=$("$python" -c 'import torch; a = "%d%d" % torch.cuda.get_device_capability(); print(a + "a" if a == "90" else a)')
$cmake -S . -B $out/cmake -G Ninja -DENGINEPOST_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > $out/cmake.log
$cmake --build $out/cmake | tail -n 1
rm -rf $out/site
for component in python enginepost; do
  $cmake --install $out/cmake --prefix $out/site/enginepost --component $component >> $out/cmake.log
done
ln -s "$PWD"/enginepost/*.py "$PWD"/enginepost/*/ $out/site/enginepost/

# -S and the paths by hand: the import hook of an editable installation would put the ordinary extension first.
packages=$("$python" -c 'import sys; print(":".join(p for p in sys.path if p))')
export PYTHONPATH="$PWD/$out/site:$PWD:$packages"
"$python" -S -c 'from enginepost.kernels import backend; assert backend.info()["cuda"], backend.info()'

failed=0
step "kernel tests on the GPU"
"$python" -S -m pytest tests/kernels -k cuda -p no:cacheprovider --continue-on-collection-errors || failed=1
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool"
    timeout 150 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -S -m bench.gpu --small | tail -n 5 || failed=1
  done
else
  echo "compute-sanitizer is not on PATH: left out"
fi
step "benchmarks"
"$python" -S -m bench.gpu --json $out/rows.json || failed=1
step "done, rows in $out/rows.json"
exit $failed
