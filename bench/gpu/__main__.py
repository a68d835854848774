"""`python -m bench.gpu [NAME ...] [--json FILE] [--small]`: the CUDA kernels beside their peers on this machine's GPU."""

import argparse
import datetime
import importlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import torch

from bench import Row
from bench.__main__ import commit, show
from bench.gpu import measure_roofs, rows
from enginepost.kernels import backend

HERE = pathlib.Path(__file__).parent


def names() -> list[str]:
    """Every module of this directory that has `cases`."""
    return sorted(p.stem for p in HERE.glob("*.py") if re.search(r"^def cases\(", p.read_text(), re.MULTILINE))


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


def run_small(wanted: list[str], device: torch.device) -> int:
    """Every call of every case once, on small shapes; how many there were."""
    count = 0
    for name in wanted:
        for case in importlib.import_module(f"bench.gpu.{name}").cases(device, True):
            for call in case.calls.values():
                call()
                count += 1
            print(f"{name}: {case.case}: {', '.join(case.calls)}", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Benchmarks of the CUDA kernels.")
    parser.add_argument("names", nargs="*", help=f"default all: {', '.join(names())}")
    parser.add_argument("--json", metavar="FILE", help="write the raw rows there")
    parser.add_argument(
        "--small", action="store_true", help="small shapes, each call once, no timing: for compute-sanitizer"
    )
    parser.add_argument(
        "--emulated", metavar="MODULE", help="with --small: on the emulated kernels, of this built module"
    )
    arguments = parser.parse_args()
    wanted = arguments.names or names()
    if unknown := [n for n in wanted if n not in names()]:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names())}")
    if arguments.emulated:
        backend.load_emulated(arguments.emulated)
        with backend.use_backend("emulated"):
            print(f"{run_small(wanted, torch.device('cpu'))} calls ran on the emulated kernels; nothing was timed")
        return 0
    if not torch.cuda.is_available() or not backend.info()["cuda"]:
        print("bench.gpu: no GPU, or an extension without CUDA kernels (ENGINEPOST_CUDA=ON)", file=sys.stderr)
        return 1
    if arguments.small:
        print(f"{run_small(wanted, torch.device('cuda'))} calls")
        return 0
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    run = {**card(), "threads": 1, "commit": commit(), "date": now}
    roofs = measure_roofs()
    print(
        f"{run['device']}; {run['machine']}; copy {roofs['GB/s'] / 1e9:.0f} GB/s, product {roofs['TFLOP/s'] / 1e12:.0f} TFLOP/s\n"
    )

    def rows_of(name: str) -> Iterator[Row]:
        for case in importlib.import_module(f"bench.gpu.{name}").cases(torch.device("cuda"), False):
            yield from rows(case, roofs)
            torch.cuda.empty_cache()

    return show({f"gpu/{name}": lambda name=name: rows_of(name) for name in wanted}, run, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
