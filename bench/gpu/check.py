"""`make gpu-check`: everything about this engine that needs a GPU, in one command, within ten minutes.

    GPU_CHECK=kernels,memory make gpu-check       some of the sections (build goes first by itself)
    GPU_CHECK=emulated make gpu-check             the dry run without a GPU: the same sections, tiny, on the emulated kernels
                                                  and on the pretended device of the tests; nothing is timed
    GPU_CHECK_SECONDS=3000 make gpu-check         more time than the 570 seconds of a call

    build       the extension for this card
    kernels     the kernel tests on the GPU, and once more through wgmma on Hopper
    trainer     runs on the GPU beside the CPU's, twice, and killed and resumed
    plan        the planner's peak beside what steps take
    memory      the longest context under caps of memory, a 70B shape that streams, QLoRA beside dequantise + matmul
    bench       the kernels beside their peers
    sanitizer   compute-sanitizer on small shapes

A section gets its share of the time that is left, so those that end early leave theirs to the ones behind; one that runs long or
dies loses only itself. Rows are written as they come, to build/gpu/rows/SECTION.json, and build/gpu/rows.json holds them all; what
was printed is in build/gpu/log. Calls one after the other add up: a section that was not asked for keeps its rows.

Offline; needs nvcc, torch with CUDA, cmake, ninja, pybind11, pytest. The section trainer also needs what the trainer does (pydantic,
tokenizers and so on): where the Python at hand lacks them, `make gpu-packages` on a machine with a network puts them into
build/gpu/packages.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

from bench.__main__ import write

ROOT = pathlib.Path(__file__).parents[2]
OUT = ROOT / "build" / "gpu"
SECONDS = 570.0
# The kernels that have a second path for sm_90a.
HOPPER_TESTS = ("attention", "gpu_products", "linear_kl", "linear_logprob", "lora", "matmul", "nf4")
KERNEL_BENCHES = ("attention", "products", "memory_bound", "merge")
# One test of each family and each kind in the dry run: `make test` runs them all.
DRY_TESTS = ("glu", "norm", "rope", "matmul")


@dataclasses.dataclass(frozen=True)
class Command:
    """arguments: of python; environment: beside the caller's; needs: a program without which it is left out."""

    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    needs: str | None = None


@dataclasses.dataclass
class Machine:
    """python: with the options that every command gets; environment: of every command; directory: where they run, which Python
    looks into first; hopper: the card is an sm_90 one."""

    python: list[str]
    directory: pathlib.Path
    environment: dict[str, str]
    emulated: bool
    hopper: bool


SHARES = {"build": 0, "kernels": 120, "trainer": 45, "plan": 45, "memory": 120, "bench": 110, "sanitizer": 50}


def commands(section: str, machine: Machine) -> list[Command]:
    """What a section runs, one after the other."""
    pretended = ("--pretended",) if machine.emulated else ()
    rows = ("--json", str(OUT / "rows" / f"{section}.json"))
    if section == "kernels":
        ini = ("-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}")
        tests = ("-m", "pytest", *ini, "-p", "no:cacheprovider", "--continue-on-collection-errors")
        if machine.emulated:
            return [Command((*tests, *test_files(DRY_TESTS), "-k", "emulated"))]
        hopper = Command((*tests, *test_files(HOPPER_TESTS), "-k", "cuda"), (("ENGINEPOST_WGMMA", "1"),))
        return [Command((*tests, *test_files(("*",)), "-k", "cuda")), *([hopper] if machine.hopper else [])]
    if section in ("trainer", "plan", "memory"):
        return [Command(("-m", "bench.gpu", section, *rows, *pretended))]
    if section == "bench":
        if machine.emulated:
            return [Command(("-m", "bench.gpu", *KERNEL_BENCHES, "--small", "--emulated", str(emulated_module())))]
        return [Command(("-m", "bench.gpu", *KERNEL_BENCHES, *rows))]
    assert section == "sanitizer"
    return [
        Command(
            ("--tool", tool, "--error-exitcode", "9", *machine.python, "-m", "bench.gpu", *KERNEL_BENCHES, "--small"),
            needs="compute-sanitizer",
        )
        for tool in ("memcheck", "racecheck")
        if not machine.emulated
    ]


def test_files(names: Iterable[str]) -> list[str]:
    return sorted(str(path) for name in names for path in (ROOT / "tests" / "kernels").glob(f"test_{name}.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"all, or some of: {', '.join(SHARES)}; `emulated` for the dry run")
    arguments = parser.parse_args()
    asked = [word for text in arguments.sections for word in text.split(",") if word]
    emulated = "emulated" in asked
    wanted = [s for s in asked if s not in ("emulated", "all")] or list(SHARES)
    if unknown := [s for s in wanted if s not in SHARES]:
        parser.error(f"no section named {', '.join(unknown)}; there are: {', '.join(SHARES)}")
    machine = this_machine(emulated)
    end = time.monotonic() + float(os.environ.get("GPU_CHECK_SECONDS") or SECONDS)
    (OUT / "rows").mkdir(parents=True, exist_ok=True)
    (OUT / "log").mkdir(exist_ok=True)
    plan = list(dict.fromkeys(["build", *(s for s in SHARES if s in wanted)]))
    outcomes: dict[str, str] = {}
    for i, section in enumerate(plan):
        # Nothing goes without the build, so it may take all there is; what it has compiled stays for the next call.
        share = 1.0 if section == "build" else SHARES[section] / sum(SHARES[s] for s in plan[i:])
        limit = max(1.0, (end - time.monotonic()) * share)
        print(f"\n== gpu-check: {section} (at most {limit:.0f} s)", flush=True)
        begin = time.monotonic()
        if section == "build":
            outcomes[section] = build(machine, limit)
        else:
            outcomes[section] = run_section(section, machine, limit)
        seconds = time.monotonic() - begin
        print(f"== gpu-check: {section}: {outcomes[section]} ({seconds:.0f} s)", flush=True)
        note(section, outcomes[section], seconds, machine)
        if section == "build" and outcomes[section] != "passed":
            break
    collect()
    if emulated:
        print("\nnothing here was run or timed on a GPU")
    print(f"rows in {OUT / 'rows.json'}; " + "; ".join(f"{s}: {outcome}" for s, outcome in outcomes.items()))
    return 0 if all(o in ("passed", "left out") for o in outcomes.values()) else 1


def this_machine(emulated: bool) -> Machine:
    """How Python is started. On a GPU with -S and the paths by hand: the import hook of an editable installation would put the
    ordinary extension first."""
    if emulated:
        return Machine([sys.executable], ROOT, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, True, False)
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch finds no GPU; GPU_CHECK=emulated is the dry run without one")
    path = os.pathsep.join(map(str, [OUT / "site", ROOT, *(p for p in sys.path if p), OUT / "packages"]))
    hopper = torch.cuda.get_device_capability()[0] == 9
    return Machine([sys.executable, "-S"], OUT / "site", {"PYTHONPATH": path}, False, hopper)


def emulated_module() -> pathlib.Path:
    return next((ROOT / "build" / "emulated").glob("_emulated*.so"))


def build(machine: Machine, limit: float) -> str:
    """The extension for this card under build/gpu/site, the Python sources linked beside it; in the dry run the emulated kernels."""
    if machine.emulated:
        return run(
            [str(ROOT / "tests" / "kernels" / "emulated_build.py")], machine, limit, "build", program=[sys.executable]
        )
    import pybind11
    import torch

    cmake = [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]
    major, minor = torch.cuda.get_device_capability()
    architecture = "90a" if major == 9 else f"{major}{minor}"
    make, site = OUT / "cmake", OUT / "site"
    shutil.rmtree(site, ignore_errors=True)
    (site / "enginepost").mkdir(parents=True)
    steps = [
        ["-S", str(ROOT), "-B", str(make), "-G", "Ninja", "-DENGINEPOST_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        ["--build", str(make)],
        *(["--install", str(make), "--prefix", str(site / "enginepost"), "--component", c] for c in ("python", "enginepost")),
    ]  # fmt: skip
    end = time.monotonic() + limit
    for step in steps:
        outcome = run(step, machine, end - time.monotonic(), "build", program=cmake)
        if outcome != "passed":
            return outcome
    for source in (ROOT / "enginepost").iterdir():
        if (source.is_dir() and source.name not in ("lib", "include")) or source.suffix == ".py":
            (site / "enginepost" / source.name).symlink_to(source)
    check = "from enginepost.kernels import backend; assert backend.info()['cuda'], backend.info()"
    return run(["-c", check], machine, end - time.monotonic(), "build")


def run_section(section: str, machine: Machine, limit: float) -> str:
    """passed, or what became of its commands; each gets an equal part of the time that is left."""
    outcomes = []
    todo = commands(section, machine)
    (OUT / "rows" / f"{section}.json").unlink(missing_ok=True)
    end = time.monotonic() + limit
    for i, command in enumerate(todo):
        if command.needs is not None and shutil.which(command.needs) is None:
            print(f"{command.needs} is not on PATH: left out", flush=True)
            continue
        part = (end - time.monotonic()) / (len(todo) - i)
        program = None if command.needs is None else [command.needs]
        outcomes.append(run(list(command.arguments), machine, part, section, dict(command.environment), program))
    return next((o for o in outcomes if o != "passed"), "passed") if outcomes else "left out"


def run(
    arguments: list[str], machine: Machine, limit: float, log: str, environment: dict[str, str] | None = None,
    program: list[str] | None = None,
) -> str:  # fmt: skip
    """A command with its output shown and kept; it and all that it started are ended at the limit."""
    said = environment or {}
    given = {**os.environ, **machine.environment, **said, "GPU_CHECK_LIMIT": f"{max(1.0, limit):.0f}"}
    given["PYTHONUNBUFFERED"] = "1"
    line = [*(program or machine.python), *arguments]
    print("$", *(f"{k}={v}" for k, v in said.items()), *line, flush=True)
    process = subprocess.Popen(
        line,
        cwd=machine.directory,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(1.0, limit), stop)
    timer.start()
    assert process.stdout is not None
    try:
        with open(OUT / "log" / f"{log}.txt", "a") as kept:
            for text in process.stdout:
                kept.write(text)
                print(text, end="", flush=True)
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return "out of time" if late.is_set() else "passed" if status == 0 else f"failed ({status})"


def note(section: str, outcome: str, seconds: float, machine: Machine) -> None:
    """A row that says how the section went: last in its file."""
    path = OUT / "rows" / f"{section}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    where = "emulated" if machine.emulated else "GPU"
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    row = {
        "bench": "gpu/check",
        "case": f"{section}, {where}: {outcome}",
        "metric": "time",
        "unit": "s",
        "ours": seconds,
    }
    write(str(path), [*rows, {**row, "threads": os.cpu_count(), "date": now}])


def collect() -> None:
    """All sections' rows in one file."""
    found = [row for path in sorted((OUT / "rows").glob("*.json")) for row in json.loads(path.read_text())]
    write(str(OUT / "rows.json"), found)


if __name__ == "__main__":
    sys.exit(main())
