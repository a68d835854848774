"""Compiles the CUDA kernels for every architecture and reads what ptxas says of them: `make cuda-check`.

Fails on a stack frame, a spilled register, more registers than the kernel's budget below, or a remark that wgmma is serialised or
setmaxnreg ignored, and writes docs/kernels/ptxas.md. A budget is what the kernel's occupancy was planned with: a change that costs
registers must change it here, knowingly. Needs nvcc and c++filt, no GPU.
"""

import argparse
import concurrent.futures
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[1]
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# Registers of a thread, by family and kernel ("*": all others of the family).
BUDGETS = {
    "adamw": {"step8": 80, "*": 64},
    # Of 384 threads, at entry; setmaxnreg gives 232 or 240 to those that multiply.
    "attention_backward_wgmma": {"attention_backward_wgmma_kernel": 168, "*": 64},
    "attention_forward_wgmma": {"*": 168},
    "glu": {"*": 64},
    "linear_kl": {"*": 64},
    "linear_logprob_backward": {"product": 240, "product_wgmma": 168, "*": 64},
    "linear_logprob_forward": {"product": 240, "product_wgmma": 168, "*": 64},
    "lora": {"*": 40},
    "matmul": {"product": 240, "product_wgmma": 168, "few_rows": 128, "*": 64},
    "merge": {"inner_products": 96, "*": 64},
    "merge_select": {"task_sum": 96, "*": 64},
    "nf4": {"*": 64},
    "nf4_matmul": {"*": 64, "few_rows": 255},
    "norm": {"forward_held": 64, "backward_held": 128, "*": 64},
    "rope": {"*": 48},
}
DEFAULT_BUDGET = 255


@dataclass(frozen=True)
class Kernel:
    family: str
    name: str
    instance: str
    architecture: str
    registers: int
    stack: int
    spilled: int


def compile_family(source: pathlib.Path, architectures: tuple[str, ...]) -> tuple[list[Kernel], list[str], float]:
    """Every kernel of a source file as ptxas made it, its remarks on lost performance, and the seconds that took.

    Raises RuntimeError with nvcc's output.
    """
    begin = time.monotonic()
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v", "-cubin" if len(architectures) == 1 else "-c"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command += [f"-I{ROOT / 'csrc' / d}" for d in ("include", "cpu", "cuda")] + [str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    remarks = [line for line in text.splitlines() if "Potential Performance Loss" in line]
    kernels, entry = [], None
    stack = spilled = 0
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(.*)' for 'sm_(\w+)'", line):
            entry, stack, spilled = (match[1], match[2]), 0, 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spilled = int(match[1]), int(match[2]) + int(match[3])
        elif (match := re.search(r"Used (\d+) registers", line)) and entry is not None:
            instance = re.sub(r"\(anonymous namespace\)::|ep::|cuda::|^void ", "", entry[0])
            instance = instance[: instance.rfind("(")] if instance.endswith(")") else instance
            name = re.match(r"[\w:]+", instance)
            name_text = name[0].split("::")[-1] if name else instance
            kernels.append(Kernel(source.stem, name_text, instance, entry[1], int(match[1]), stack, spilled))
            entry = None
    return kernels, remarks, time.monotonic() - begin


def budget_of(kernel: Kernel) -> int:
    family = BUDGETS.get(kernel.family, {})
    return family.get(kernel.name, family.get("*", DEFAULT_BUDGET))


def faults(kernels: list[Kernel]) -> list[str]:
    out = []
    for k in kernels:
        where = f"{k.family}: {k.instance} for sm_{k.architecture}"
        if k.stack or k.spilled:
            out.append(f"{where}: {k.stack} bytes of stack, {k.spilled} of spills")
        if k.registers > budget_of(k):
            out.append(f"{where}: {k.registers} registers, its budget is {budget_of(k)}")
    return out


def table(kernels: list[Kernel], architectures: tuple[str, ...]) -> str:
    """A row per kernel: the most registers of its instances, by architecture."""
    rows: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for k in kernels:
        rows[k.family, k.name].append(k)
    head = ["family", "kernel", "instances", *(f"sm_{a}" for a in architectures), "budget", "stack, spills"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (family, name), of in sorted(rows.items()):
        most = [max((k.registers for k in of if k.architecture == a), default=0) for a in architectures]
        lost = sum(k.stack + k.spilled for k in of)
        cells = [family, f"`{name}`", len({k.instance for k in of}), *most, budget_of(of[0]), lost]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", help="default: all of csrc/cuda")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    for tool in ("nvcc", "c++filt"):
        if shutil.which(tool) is None:
            print(f"cuda-check: skipped, {tool} is not on PATH")
            return 0
    architectures = tuple(arguments.architectures.split(","))
    sources = sorted(
        s for s in (ROOT / "csrc/cuda").glob("*.cu") if not arguments.families or s.stem in arguments.families
    )
    kernels: list[Kernel] = []
    remarks: list[str] = []
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for source, result in zip(sources, pool.map(lambda s: compile_family(s, architectures), sources), strict=True):
            kernels += result[0]
            remarks += [f"{source.stem}: {line}" for line in result[1]]
            print(f"{source.stem}: {len(result[0])} kernels, {result[2]:.0f} s", flush=True)
    print(f"all: {time.monotonic() - begin:.0f} s")
    text = table(kernels, architectures)
    print(text)
    wrong = faults(kernels) + remarks
    print("\n".join(wrong) if wrong else "no spills, no stack frames, every kernel within its budget")
    if not arguments.families and architectures == ARCHITECTURES:
        page = f"# Registers of the CUDA kernels\n\n{(__doc__ or '').strip()}\n\n{text}\n"
        (ROOT / "docs/kernels/ptxas.md").write_text(page)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
