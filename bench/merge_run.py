"""One run of bench/merge.py, in a process of its own: `merge_run.py ours|mergekit|copy RECIPE OUT THREADS [INPUTS]` prints JSON."""

import json
import os
import pathlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor


def anonymous() -> int:
    """Bytes of private memory that is no mapped file."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def copy(inputs: list[str], out: str, threads: int) -> None:
    """Read every weights file, write as many bytes as one of them has, fsync."""
    pathlib.Path(out).mkdir()
    files = [path for directory in inputs for path in pathlib.Path(directory).glob("*.safetensors")]
    size, step = files[0].stat().st_size, 1 << 23
    target = os.open(f"{out}/copy", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(target, 0, size)

    def part(i: int) -> None:
        buffer = bytearray(step)
        for path in files:
            with open(path, "rb", buffering=0) as f:
                for at in range(i * step, size, threads * step):
                    f.seek(at)
                    f.readinto(buffer)
                    if path == files[-1]:
                        os.pwrite(target, memoryview(buffer)[: min(step, size - at)], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(threads)))
    os.fsync(target)


def main() -> None:
    kind, recipe, out, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    if kind == "mergekit":
        import torch
        import yaml
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        torch.set_num_threads(threads)
        config = MergeConfiguration.model_validate(yaml.safe_load(pathlib.Path(recipe).read_text()))
        options = MergeOptions(quiet=True, copy_tokenizer=False)
    elif kind == "ours":
        import torch  # the clock starts after the imports

        from enginepost.merge import merge
    for directory in sys.argv[5:]:  # into the page cache
        for path in pathlib.Path(directory).glob("*.safetensors"):
            with open(path, "rb", buffering=0) as f:
                while f.read(1 << 24):
                    pass
    peak = [anonymous()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, busy = time.perf_counter(), time.process_time()
    if kind == "ours":
        merge(recipe, out, threads=threads)
    elif kind == "mergekit":
        run_merge(config, out, options)
    else:
        copy(sys.argv[5:], out, threads)
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak[0]}))


if __name__ == "__main__":
    main()
