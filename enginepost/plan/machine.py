"""What a run may use: the memory of a GPU by name, that of this machine, and how fast either is.

Cards: capacity in GiB and memory bandwidth in GB/s as the vendors state them; dense bf16 TFLOP/s with float32 accumulation (which
halves GeForce's headline figure); GB/s from host memory over PCIe, four fifths of the slot's.
"""

import dataclasses
import difflib
import os
import re
from pathlib import Path

from enginepost.errors import EnginepostError

# name: (GiB, GB/s of its memory, TFLOP/s, GB/s from the host)
GPUS: dict[str, tuple[float, float, float, float]] = {
    "rtx3060": (12, 360, 25.5, 25), "rtx3070": (8, 448, 40.6, 25), "rtx3080": (10, 760, 59.5, 25),
    "rtx3090": (24, 936, 71, 25), "rtx3090ti": (24, 1008, 80, 25), "rtx4060": (8, 272, 30, 12.5),
    "rtx4060ti": (16, 288, 44, 12.5), "rtx4070": (12, 504, 58, 25), "rtx4070ti": (12, 504, 80, 25),
    "rtx4070tisuper": (16, 672, 88, 25), "rtx4080": (16, 717, 97.5, 25), "rtx4090": (24, 1008, 165, 25),
    "rtx5060ti": (16, 448, 47, 25), "rtx5070": (12, 672, 62, 50), "rtx5070ti": (16, 896, 88, 50),
    "rtx5080": (16, 960, 113, 50), "rtx5090": (32, 1792, 210, 50), "a10": (24, 600, 125, 25), "l4": (24, 300, 121, 25),
    "a6000": (48, 768, 155, 25), "l40s": (48, 864, 362, 25), "rtx6000ada": (48, 960, 364, 25),
    "a100-40gb": (40, 1555, 312, 25), "a100-80gb": (80, 2039, 312, 25), "h100": (80, 3350, 989, 50),
    "h200": (141, 4800, 989, 50), "b200": (180, 8000, 2250, 50),
}  # fmt: skip
USABLE = 0.97  # of a card's capacity; the driver keeps the rest
DISK = 2.0  # GB/s, when weights come from disk


@dataclasses.dataclass(frozen=True)
class Machine:
    """memory: bytes that the run may take on the device; host: bytes of host memory beside a GPU, None when not said; rates in
    FLOP/s and bytes/s. known: False when the rates are guesses."""

    name: str
    device: str
    memory: float | None
    flops: float
    bandwidth: float
    link: float
    host: float | None = None
    threads: int = 1


def size(text: str) -> float:
    """Bytes of an amount of memory such as 12GB. Raises EnginepostError for anything else."""
    from enginepost.recipe import memory_size  # pydantic is in there, which who only counts does not need

    nbytes = memory_size(text)
    if nbytes is None:
        raise EnginepostError(f"{text!r} is not an amount of memory; expected one such as 12GB, 512MB or 8GiB")
    return nbytes


def gpu(text: str, host: float | None = None, tflops: float | None = None) -> Machine:
    """A card by name (rtx4090, "RTX 4090"), or one of a size (8GB). Raises EnginepostError that lists the names."""
    from enginepost.recipe import memory_size

    name = re.sub(r"[\s_]|nvidia|geforce", "", text.lower())
    if name not in GPUS and memory_size(text) is not None:
        # Of a size alone: rates of a card of that class.
        memory = size(text)
        nearest = min(GPUS.values(), key=lambda card: abs(card[0] * 2**30 - memory))
        card = (memory / USABLE / 2**30, *nearest[1:])
        name = f"a GPU of {text}"
    elif name in GPUS:
        card = GPUS[name]
    else:
        near = difflib.get_close_matches(name, GPUS, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(GPUS)}"
        raise EnginepostError(f"--gpu {text!r} is neither an amount of memory such as 12GB nor a known card; {hint}")
    rate = tflops * 1e12 if tflops else 0.5 * card[2] * 1e12  # half of the peak is what a run sees
    return Machine(name, "cuda", card[0] * 2**30 * USABLE, rate, card[1] * 1e9, 0.9 * card[3] * 1e9, host)


def card(name: str, total: float, free: float, memory: float | None = None) -> Machine:
    """The GPU at hand, as its driver names it: `free` of its `total` bytes, at most `memory`, and the host memory that is free now.
    Rates are those of the card of that name, or of one with as much memory."""
    plain = re.sub(r"[\s_-]|nvidia|geforce", "", name.lower())

    def likeness(known: str) -> tuple[int, float]:
        named = known.partition("-")[0]  # "a100" of a100-80gb; the longest that is part of the name, so not a10
        return -len(named) if named in plain else 0, abs(GPUS[known][0] * 2**30 - total)

    nearest = min(GPUS, key=likeness)
    _, bandwidth, tflops, link = GPUS[nearest]
    room = free if memory is None else min(memory, free)
    return Machine(name, "cuda", room, 0.5e12 * tflops, bandwidth * 1e9, 0.9e9 * link, available())


def this_machine(memory: float | None = None, tflops: float | None = None) -> Machine:
    """The CPU at hand: memory that is free now (within a container's limit), cores, and a rate by instruction set."""
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))
    flags = ""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read(8192)
    except OSError:
        pass
    core = 100e9 if "avx512f" in flags else 60e9 if "avx2" in flags else 8e9
    rate = tflops * 1e12 if tflops else core * threads
    return Machine("this CPU", "cpu", memory or available(), rate, 20e9, DISK * 1e9, threads=threads)


def available() -> float | None:
    """Bytes of memory that a new process could take now: free memory within the container's limit; None where unknown."""
    found = []
    try:
        with open("/proc/meminfo") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    except OSError:
        pass
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            top = Path(limit).read_text().strip()
            if top != "max" and int(top) < 2**60:
                found.append(max(0, int(top) - int(Path(used).read_text())))
        except (OSError, ValueError):
            continue
    return float(min(found)) if found else None
