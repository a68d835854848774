#!/usr/bin/env bash
# Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer, AVX-512 emulated (csrc/emulator/avx512.h), and run in it
# the fuzzer and the kernel tests: all of them with AVX2, those against float64 with AVX-512 and with the portable kernels too. Then
# the CUDA kernels in the emulator: the planted mistakes, and one family; with --all the whole suite (it takes an hour).
# Leaks are not looked for: Python and torch keep much until the end. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
out=build/sanitize
mkdir -p build
cuda_tests="test_emulator or (test_glu and emulated) or (test_adamw8 and emulated and masters)"
if [ "${1:-}" = --all ]; then
  shift
  cuda_tests="emulated or emulator or any_order"
fi
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m cmake --version > /dev/null 2>&1 && cmake="$python -m cmake" || cmake=cmake
$cmake -S . -B $out -G Ninja -DENGINEPOST_SANITIZE=ON -DENGINEPOST_EMULATE_AVX512=ON -DENGINEPOST_CUDA=OFF -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$(realpath -s "$python")" -DCMAKE_MAKE_PROGRAM="$(command -v "$(dirname "$python")/ninja" || command -v ninja)" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > $out.log
$cmake --build $out
rm -rf $out/site
$cmake --install $out --prefix $out/site/enginepost --component python > $out.log
$cmake --install $out --prefix $out/site/enginepost --component enginepost > $out.log
for part in enginepost/*.py enginepost/*/; do
  [ -e "$out/site/$part" ] || ln -s "$PWD/${part%/}" $out/site/enginepost/
done
module=$(ENGINEPOST_EMULATED_SANITIZE=1 "$python" tests/kernels/emulated_build.py)

# libstdc++ too, or the sanitizer does not find __cxa_throw in a Python that is not linked with it. -S: the installed package's
# import hook would put the ordinary extension first.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$PWD/$out/site:$PWD:$packages" OMP_NUM_THREADS=2
export ENGINEPOST_FUZZ_LIBRARY="$PWD/$out/site/enginepost/lib/libenginepost.so"
root=$PWD
run_tests() {  # from elsewhere: python -m puts the directory that it runs in before PYTHONPATH, and the package there has no extension
  (cd $out && "$python" -S -m pytest -q -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" "$root/tests/kernels" "$@")
}
for isa in avx512 avx2 portable; do
  echo "== sanitizers, ENGINEPOST_CPU=$isa"
  export ENGINEPOST_CPU=$isa
  "$python" -S tests/kernels/fuzz.py --rounds 200 --seed 1
  (cd $out && "$python" -S -c "from enginepost.kernels.backend import info; assert info()['isa'] == '$isa', info()")
  choice="not compile and not opcheck and not emulated and not emulator and not any_order and not reference"
  [ $isa = avx2 ] || choice="$choice and float64"
  # test_isa and the command start processes of the ordinary build.
  run_tests --deselect tests/kernels/test_isa.py --deselect tests/kernels/test_selftest.py::test_the_command_takes_seconds_and_exits_with_0 \
    -k "$choice" "$@"
done

echo "== sanitizers, $module"
export ENGINEPOST_EMULATED_SANITIZE=1
run_tests -k "($cuda_tests) and not compile and not opcheck" "$@"
