"""libenginepost linked from outside: found by CMake from both places, and the three examples built and run."""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import enginepost

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "link"


def run(*command, **options):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def tool(name):
    """cmake or ninja: of the environment or of the system."""
    beside = pathlib.Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is absent")


@functools.cache
def python_with(module):
    """A Python that can import `module`: this one, or the one that `make link` makes."""
    for python in (sys.executable, ROOT / ".venv-link/bin/python", ROOT / ".venv-peers/bin/python"):
        if (
            pathlib.Path(python).exists()
            and not subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode
        ):
            return str(python)
    return None


@pytest.fixture(scope="module", params=["package", "cmake --install"])
def prefix(request, tmp_path_factory):
    """Where find_package looks: the Python package as installed (as the wheel has it), and a fresh `cmake --install`."""
    if request.param == "package":
        place = pathlib.Path(enginepost.cmake_prefix())
        if not (place / "lib" / "cmake").exists():
            pytest.skip(f"{place} holds a module built by hand, not an installed package")
        return place
    for cache in sorted((ROOT / "build").glob("*/CMakeCache.txt")):
        text = cache.read_text()
        if f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" in text and "ENGINEPOST_SANITIZE:BOOL=ON" not in text:
            place = tmp_path_factory.mktemp("prefix")
            run(tool("cmake"), "--install", cache.parent, "--prefix", place)
            return place
    pytest.skip("no build directory: `make setup` makes it")


def build(example, prefix, where, *options):
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run(tool("cmake"), "-S", EXAMPLES / example, "-B", where, f"-DCMAKE_PREFIX_PATH={prefix}", *generator, *options)
    run(tool("cmake"), "--build", where)


def test_what_is_installed(prefix):
    files = {str(p.relative_to(prefix)) for p in prefix.rglob("*") if p.is_file()}
    headers = {p.name for p in (ROOT / "csrc/include/enginepost").iterdir()}
    assert {f"include/enginepost/{h}" for h in headers} <= files
    package = {"lib/cmake/enginepost/enginepostConfig.cmake", "lib/cmake/enginepost/enginepostConfigVersion.cmake"}
    assert {"lib/libenginepost.so", *package} <= files


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads the symbols with nm")
def test_only_the_c_api_is_exported(prefix):
    listing = run("nm", "-D", "--defined-only", prefix / "lib/libenginepost.so")
    exported = {line.split()[-1] for line in listing.splitlines()}
    headers = "".join(p.read_text() for p in (prefix / "include/enginepost").glob("*.h"))
    declared = set(re.findall(r"EP_EXPORT[^;]*?\b(ep_\w+)\(", headers))
    assert exported == declared and len(declared) > 20


def test_cpp_without_python_or_torch(prefix, tmp_path):
    build("cpp", prefix, tmp_path)
    text = run(tmp_path / "attention", env={})
    assert "largest error" in text and "without k: attention_forward: k is missing" in text
    needs = run("ldd", tmp_path / "attention")
    assert "libenginepost.so" in needs and "libtorch" not in needs and "libpython" not in needs


def test_headers_are_plain_c(prefix, tmp_path):
    source = tmp_path / "all.c"
    names = sorted(p.name for p in (prefix / "include/enginepost").iterdir())
    source.write_text(
        "".join(f"#include <enginepost/{n}>\n" for n in names) + "int main(void) { return ep_num_threads() < 1; }\n"
    )
    compiler = shutil.which("gcc") or pytest.skip("gcc is absent")
    flags = [
        "-std=c99",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        f"-I{prefix}/include",
        f"-L{prefix}/lib",
        f"-Wl,-rpath,{prefix}/lib",
    ]
    run(compiler, *flags, source, "-o", tmp_path / "all", "-lenginepost")
    run(tmp_path / "all")


def test_jax(prefix, tmp_path):
    python = python_with("jax") or pytest.skip("JAX is absent: `make link` installs it")
    include = run(python, "-c", "import jax; print(jax.ffi.include_dir())").strip()
    build("jax", prefix, tmp_path, f"-DXLA_FFI_INCLUDE={include}")
    assert "largest difference of a gradient" in run(
        python, EXAMPLES / "jax/attention.py", tmp_path / "attention_ffi.so"
    )


def test_numpy_and_jax_arrays_in_the_python_api():
    python = python_with("jax") or pytest.skip("JAX is absent: `make link` installs it")
    if python == sys.executable:
        pytest.skip("JAX is in this environment: tests/kernels/test_api.py does it")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    tests = ROOT / "tests/kernels/test_api.py"
    text = run(python, "-m", "pytest", "-v", "-p", "no:cacheprovider", tests, "-k", "jax", env=environment, cwd=ROOT)
    assert "1 passed" in text


def test_transformers():
    python = python_with("transformers") or pytest.skip("transformers is absent: `make link` installs it")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    text = run(python, EXAMPLES / "transformers/attention.py", env=environment)
    assert text.count("agree") == 2


def test_the_wheel_ships_the_library(tmp_path):
    pytest.importorskip("scikit_build_core")
    if not list((ROOT / "build").glob("cp3*/CMakeCache.txt")):
        pytest.skip("no build of the package to make a wheel of: `make setup` makes it")
    make = "import sys; from scikit_build_core.build import build_wheel; print(build_wheel(sys.argv[1]))"
    run(sys.executable, "-c", make, tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    package = tmp_path / "site" / "enginepost"
    test_what_is_installed(package)
    assert len(list(package.glob("_core*.so"))) == 1 and (package / "kernels/attention.py").exists()
    test_cpp_without_python_or_torch(package, tmp_path / "example")
