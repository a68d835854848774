#!/usr/bin/env bash
# Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer, then run the kernel tests and the fuzzer in it, on the
# instruction set of this machine and on the portable one. Leaks are not looked for: Python and torch keep much until the end.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
out=build/sanitize
mkdir -p build
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m cmake --version > /dev/null 2>&1 && cmake="$python -m cmake" || cmake=cmake
$cmake -S . -B $out -G Ninja -DENGINEPOST_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(realpath -s "$python")" \
  -DCMAKE_MAKE_PROGRAM="$(command -v "$(dirname "$python")/ninja" || command -v ninja)" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" > $out.log
$cmake --build $out
rm -rf $out/site
$cmake --install $out --prefix $out/site/enginepost --component python > $out.log
$cmake --install $out --prefix $out/site/enginepost --component enginepost > $out.log
for part in enginepost/*.py enginepost/*/; do
  [ -e "$out/site/$part" ] || ln -s "$PWD/${part%/}" $out/site/enginepost/
done

# libstdc++ too, or the sanitizer does not find __cxa_throw in a Python that is not linked with it. -S: the installed package's
# import hook would put the ordinary extension first.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$PWD/$out/site:$PWD:$packages" OMP_NUM_THREADS=2
export ENGINEPOST_FUZZ_LIBRARY="$PWD/$out/site/enginepost/lib/libenginepost.so"
for isa in "" portable; do
  echo "== sanitizers, ENGINEPOST_CPU=$isa"
  ENGINEPOST_CPU=$isa "$python" -S tests/kernels/fuzz.py --rounds 400 --seed 1
done
"$python" -S -m pytest tests/kernels -p no:cacheprovider --deselect tests/kernels/test_isa.py \
  -k "not compile and not opcheck and not emulated and not emulator and not any_order" "$@"

# The CUDA kernels in the emulator, whose own shared memory is fenced off from the sanitizer too.
unset LD_PRELOAD
module=$(ENGINEPOST_EMULATED_SANITIZE=1 "$python" tests/kernels/emulated_build.py)
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)" ENGINEPOST_EMULATED_SANITIZE=1
echo "== sanitizers, $module"
"$python" -S -m pytest tests/kernels -p no:cacheprovider -k "(emulated or emulator or any_order) and not compile and not opcheck" "$@"
