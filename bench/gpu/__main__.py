"""`python -m bench.gpu [NAME ...] [--json FILE] [--small]`: kernels beside their peers, and whole runs, on this machine's GPU."""

import argparse
import datetime
import importlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from bench import Row
from bench.__main__ import commit, show
from bench.gpu import measure_roofs, rows, through_wgmma
from enginepost.device import deterministic
from enginepost.kernels import backend

HERE = pathlib.Path(__file__).parent


def names(function: str = "cases|run") -> list[str]:
    """Every module of this directory that has such a function: `cases` of kernels, `run` of whole steps and runs."""
    found = re.compile(rf"^def ({function})\(device", re.MULTILINE)
    return sorted(p.stem for p in HERE.glob("*.py") if found.search(p.read_text()))


def card() -> dict[str, str]:
    """The GPU's name, and what its speed depends on: driver, clocks, power limit, torch."""
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    try:
        state = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        state = "nvidia-smi says nothing"
    return {
        "device": torch.cuda.get_device_name(),
        "machine": f"driver, clocks, power: {state}; torch {torch.__version__}, CUDA {torch.version.cuda}",
    }


def run_small(wanted: list[str], device: torch.device, hopper: bool) -> int:
    """Every call of every case once, on small shapes; how many there were."""
    count = 0
    for name in wanted:
        module = importlib.import_module(f"bench.gpu.{name}")
        for case in module.cases(device, True):
            ours = next(iter(case.calls))
            second = {f"{ours}, wgmma": through_wgmma(case.calls[ours])} if hopper and has_wgmma(module) else {}
            calls = {**case.calls, **second}
            for call in calls.values():
                call()
                count += 1
            print(f"{name}: {case.case}: {', '.join(calls)}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def has_wgmma(module: ModuleType) -> bool:
    return bool(getattr(module, "WGMMA", False))


def run_pretended(wanted: list[str], seconds: float) -> int:
    """Whole steps and runs at a tiny size on the device that the tests pretend to have. Their rows are shown and not kept."""
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    import pretend_gpu

    def rows_of(name: str) -> Iterator[Row]:
        with pretend_gpu.present() as device, deterministic(device):
            yield from importlib.import_module(f"bench.gpu.{name}").run(device, True, seconds)

    status = show({f"gpu/{name}": lambda name=name: rows_of(name) for name in wanted}, {}, None)
    print("this was a pretended device: none of these figures means anything")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Benchmarks on this machine's GPU.")
    parser.add_argument(
        "names", nargs="*", help=f"default the kernels' ({', '.join(names('cases'))}); {', '.join(names('run'))}"
    )
    parser.add_argument("--json", metavar="FILE", help="write the raw rows there")
    parser.add_argument(
        "--small", action="store_true", help="small shapes, each call once, no timing: for compute-sanitizer"
    )
    parser.add_argument(
        "--emulated", metavar="MODULE", help="with --small: on the emulated kernels, of this built module"
    )
    parser.add_argument(
        "--pretended", action="store_true", help="whole steps and runs, tiny, on the tests' pretended device"
    )
    arguments = parser.parse_args()
    wanted = arguments.names or names("cases")
    seconds = 0.9 * float(os.environ.get("GPU_CHECK_LIMIT") or 600)
    kernels = [n for n in wanted if n in names("cases")]
    if unknown := [n for n in wanted if n not in names()]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names())}")
    if arguments.pretended:
        return run_pretended([n for n in wanted if n not in kernels], seconds)
    if arguments.emulated:
        module: Any = backend.load_emulated(arguments.emulated)
        module.set_card(
            90, 8
        )  # as an sm_90 card of 8 multiprocessors, so that small shapes take the paths of large ones
        with backend.use_backend("emulated"):
            print(
                f"{run_small(kernels, torch.device('cpu'), True)} calls ran on the emulated kernels; nothing was timed"
            )
        print(f"of them wgmma: {module.statistics()['wgmma']} instructions")
        return 0
    if not torch.cuda.is_available() or not backend.info()["cuda"]:
        print("bench.gpu: no GPU, or an extension without CUDA kernels (ENGINEPOST_CUDA=ON)", file=sys.stderr)
        return 1
    hopper = torch.cuda.get_device_capability()[0] == 9
    if arguments.small:
        print(f"{run_small(kernels, torch.device('cuda'), hopper)} calls")
        return 0
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run = {**card(), "threads": 1, "commit": commit(), "date": now}
    roofs = measure_roofs() if kernels else {}
    print(
        f"{run['device']}; {run['machine']}; "
        + ", ".join(f"{v:.4g} {k.split('/')[0]}" for k, v in roofs.items())
        + "\n"
    )

    def rows_of(name: str) -> Iterator[Row]:
        module = importlib.import_module(f"bench.gpu.{name}")
        device = torch.device("cuda", torch.cuda.current_device())
        if name not in kernels:
            with deterministic(device):
                yield from module.run(device, False, seconds / (len(wanted) - len(kernels)))
            return
        for case in module.cases(device, False):
            yield from rows(case, roofs, hopper and has_wgmma(module))
            torch.cuda.empty_cache()

    return show({f"gpu/{name}": lambda name=name: rows_of(name) for name in wanted}, run, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
