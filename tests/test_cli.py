"""The command line: examples in every --help, errors without a traceback, and the verbs end to end."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

ROWS = [
    {"messages": [{"role": "user", "content": f"what is {i} plus one?"}, {"role": "assistant", "content": str(i + 1)}]}
    for i in range(12)
]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "TERM": "dumb", **more}


def run(*arguments: str, cwd: pathlib.Path | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "enginepost.cli", *arguments],
        capture_output=True, text=True, timeout=120, cwd=cwd, env=environment(), **kwargs,
    )  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path: pathlib.Path, tiny_model_dir: pathlib.Path) -> pathlib.Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "small.yaml"
    file.write_text(
        f"model: {tiny_model_dir}\ndata: rows.jsonl\nmax_length: 64\nmax_steps: 3\ndtype: fp32\nlora: {{r: 4, alpha: 8}}\n"
        "batch_size: 2\ngradient_accumulation: 1\n"
    )
    return file


@pytest.mark.parametrize("verb", [["train"], ["generate"], ["fuse"], ["kernels"], ["data", "preview"]])
def test_help_shows_an_example(verb: list[str]) -> None:
    done = run(*verb, "--help")
    assert done.returncode == 0 and f"enginepost {' '.join(verb)}" in done.stdout.split("Example")[1]


def test_help_lists_the_verbs_and_is_quick() -> None:
    best = 9.0
    for _ in range(5):  # the best of some: the machine may be busy
        begin = time.perf_counter()
        done = run("--help")
        best = min(best, time.perf_counter() - begin)
    assert all(verb in done.stdout for verb in ("train", "generate", "fuse", "data", "kernels"))
    assert best < 0.5, f"--help took {best:.2f} s"


def test_import_is_quick_and_loads_no_torch() -> None:
    code = "import time; t = time.perf_counter(); import enginepost, sys; print(time.perf_counter() - t, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert float(seconds) < 0.2 and torch == "False"


def test_train_generate_fuse_generate(recipe_file: pathlib.Path, tiny_model_dir: pathlib.Path) -> None:
    here = recipe_file.parent
    done = run("train", "small.yaml", "lora.r=2", "learning_rate=1e-2", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout and "done: runs/small/adapter" in done.stdout
    assert json.loads((here / "runs/small/adapter/adapter_config.json").read_text())["r"] == 2
    assert len((here / "runs/small/metrics.jsonl").read_text().splitlines()) == 3
    again = run("train", "small.yaml", "lora.r=2", "learning_rate=1e-2", cwd=here)
    assert again.returncode == 1 and again.stderr.startswith("error: runs/small: the run directory is not empty")
    assert "Traceback" not in again.stderr
    ask = ["--prompt", "what is 3 plus one?", "--max-new-tokens", "8", "--dtype", "float32"]
    with_adapter = run("generate", str(tiny_model_dir), "--adapter", "runs/small/adapter", *ask, cwd=here)
    assert with_adapter.returncode == 0, with_adapter.stderr
    fused = run("fuse", str(tiny_model_dir), "runs/small/adapter", "fused", cwd=here)
    assert fused.returncode == 0 and "fused" in fused.stdout, fused.stderr
    alone = run("generate", "fused", *ask, cwd=here)
    assert alone.stdout == with_adapter.stdout
    base = run("generate", str(tiny_model_dir), *ask, cwd=here)
    assert base.returncode == 0 and base.stdout != alone.stdout
    raw = run("generate", str(tiny_model_dir), "--raw", *ask, cwd=here)
    assert raw.returncode == 0 and raw.stdout != base.stdout
    refused = run("generate", str(tiny_model_dir), "--raw", "--system", "be brief", *ask, cwd=here)
    assert refused.returncode == 1 and "--system needs a chat template" in refused.stderr


def test_sampling_follows_the_seed(tiny_model_dir: pathlib.Path) -> None:
    ask = ["generate", str(tiny_model_dir), "-p", "the", "--raw", "--max-new-tokens", "12", "--temperature", "1.5"]
    a, b, c = (run(*ask, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert a == b != c


def test_sigterm_saves_and_says_how_to_resume(recipe_file: pathlib.Path) -> None:
    here = recipe_file.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "enginepost.cli", "train", "small.yaml", "max_steps=100000", "save_every=100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    stop = re.search(r"stopped by SIGTERM after step (\d+) of 100000; saved (\S+)\ncontinue with: (.*)", out)
    assert stop is not None, out
    assert (here / stop[2] / "trainer_state.json").exists()
    assert stop[3] == "enginepost train small.yaml max_steps=100000 save_every=100000 --resume"
    assert err == ""


def test_mistakes_are_messages(recipe_file: pathlib.Path) -> None:
    here = recipe_file.parent
    recipe_file.write_text(recipe_file.read_text() + "learning_rte: 1e-4\n")
    done = run("train", "small.yaml", cwd=here)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: small.yaml:9: learning_rte: unknown key; did you mean learning_rate?\n"
    done = run("train", "nowhere.yaml", cwd=here)
    assert done.stderr == "error: nowhere.yaml: cannot read the recipe: No such file or directory\n"
    done = run("generate", "no/model", "--prompt", "x")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "no/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("train").returncode == 2  # usage


def test_data_preview(recipe_file: pathlib.Path, tiny_model_dir: pathlib.Path) -> None:
    here = recipe_file.parent
    for arguments in (["small.yaml"], ["rows.jsonl", "--model", str(tiny_model_dir)]):
        done = run("data", "preview", *arguments, "--rows", "2", cwd=here)
        assert done.returncode == 0, done.stderr
        assert "what is 0 plus one?" in done.stdout and "what is 2 plus one?" not in done.stdout
        assert "12" in done.stdout and "trained on" in done.stdout
    done = run("data", "preview", "rows.jsonl", cwd=here)
    assert done.returncode == 1 and "--model" in done.stderr


def test_kernels_lists_what_runs() -> None:
    done = run("kernels")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("attention", "linear_logprob", "lora", "norm", "rope", "glu", "adamw"))
    assert "instruction set" in done.stdout
