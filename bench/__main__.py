"""`python -m bench [NAME ...|all] [--json FILE]`: run benchmarks, print a table, keep the raw rows."""

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import Options, Row

HERE = pathlib.Path(__file__).parent
COLUMNS = f"{'case':<52} {'metric':<12} {'ours':>10} {'peer':>10} {'unit':<9} {'ratio':>7} {'roof':>6} {'ms':>9} {'spread':>6}  peer"


def names() -> list[str]:
    """Every benchmark of this directory: the modules that have a `run`."""
    return sorted(p.stem for p in HERE.glob("*.py") if re.search(r"^def run\(", p.read_text(), re.MULTILINE))


def device() -> str:
    """The processor's own name, as the kernel gives it; its architecture where there is none (most arm64 machines)."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> str:
    """What else the figures depend on. No host name: results are published."""
    from enginepost.kernels import backend

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {backend.info()['isa']} kernels, torch {torch.__version__}"


def commit() -> str:
    """Short hash of the checkout, with "+" when the sources differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def as_record(row: Row, bench: str, run: dict[str, Any]) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    del fields["better"]
    return {"bench": bench, **fields, "ratio": row.ratio, **run}


def write(path: str, records: list[dict[str, Any]]) -> None:
    """A JSON array with one row per line, so that a difference between two result files reads well."""
    with open(path, "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")


def line(row: Row) -> str:
    def number(value: float | None, suffix: str = "") -> str:
        return "" if value is None else f"{value:.3g}{suffix}" if abs(value) < 100 else f"{value:.0f}{suffix}"

    return (
        f"{row.case:<52} {row.metric:<12} {number(row.ours):>10} {number(row.peer_value):>10} {row.unit:<9} "
        f"{'' if row.ratio is None else f'{row.ratio:.2f}x':>7} {number(row.roof_percent, '%'):>6} "
        f"{number(row.milliseconds):>9} {number(row.spread_percent, '%'):>6}  {row.peer or ''}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run benchmarks.")
    parser.add_argument("names", nargs="*", default=[], help=f"all, or some of: {', '.join(names())}")
    parser.add_argument("--json", metavar="FILE", help="write the raw rows there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each candidate, at least 7")
    arguments = parser.parse_args(argv)
    wanted = names() if not arguments.names or "all" in arguments.names else arguments.names
    unknown = [n for n in wanted if n not in names()]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(names())}")
    torch.set_num_threads(arguments.threads)
    options = Options(threads=arguments.threads, rounds=max(7, arguments.rounds))
    run = {
        "device": device(),
        "threads": arguments.threads,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    print(f"{run['device']}, {run['threads']} threads; {run['machine']}; commit {run['commit']}\n")
    rows = {name: lambda name=name: importlib.import_module(f"bench.{name}").run(options) for name in wanted}
    return show(rows, run, arguments.json)


def show(rows: dict[str, Callable[[], Iterator[Row]]], run: dict[str, Any], path: str | None) -> int:
    """Print the rows of every benchmark as they come and write them to `path`; the exit status."""
    records: list[dict[str, Any]] = []
    failed = []
    for name, produce in rows.items():
        print(f"== {name}\n{COLUMNS}", flush=True)
        try:
            for row in produce():
                print(line(row), flush=True)
                records.append(as_record(row, name, run))
                if path:  # a run that is cut off leaves what it has
                    write(path, records)
        except Exception:  # the other benchmarks' rows are worth having all the same
            traceback.print_exc()
            failed.append(name)
        print()
    if path:
        write(path, records)
        print(f"{len(records)} rows in {path}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
