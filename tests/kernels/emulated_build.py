"""Builds the emulated CUDA kernels (docs/kernels/emulator.md) into build/emulated and says where the module lies.

With ENGINEPOST_EMULATED_SANITIZE=1 in the environment (tests/sanitize.sh) it is built with AddressSanitizer and UBSan, elsewhere.
"""

import fcntl
import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


@functools.lru_cache(maxsize=1)
def build_emulated() -> pathlib.Path:
    """Path of the module; a second call does nothing. Raises RuntimeError with the end of the compiler's output."""
    import pybind11

    sanitize = os.environ.get("ENGINEPOST_EMULATED_SANITIZE") == "1"
    out = ROOT / "build" / ("emulated-sanitize" if sanitize else "emulated")
    out.mkdir(parents=True, exist_ok=True)
    cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
    ninja = shutil.which("ninja", path=str(pathlib.Path(sys.executable).parent)) or shutil.which("ninja")
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "CMakeCache.txt").exists():
            generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            run([
                *cmake, "-S", str(ROOT), "-B", str(out), *generator, "-DENGINEPOST_EMULATED=ON", "-DENGINEPOST_CUDA=OFF",
                f"-DENGINEPOST_SANITIZE={'ON' if sanitize else 'OFF'}", f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ])  # fmt: skip
        run([*cmake, "--build", str(out), "--parallel", "2"])
    return next(out.glob("_emulated*.so"))


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")


if __name__ == "__main__":
    print(build_emulated())
