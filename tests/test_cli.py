"""The command line: examples in every --help, errors without a traceback, and the verbs end to end."""

import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from enginepost.cli import main

ROWS = [
    {"messages": [{"role": "user", "content": f"what is {i} plus one?"}, {"role": "assistant", "content": str(i + 1)}]}
    for i in range(12)
]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> Call:
    """`enginepost ARGUMENTS` in this process (torch takes seconds to import), in the test's directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["enginepost", *arguments])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


def spawn(*arguments: str, **kwargs: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "enginepost.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}, **kwargs,
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
def test_help_shows_an_example(call: Call, verb: list[str]) -> None:
    done = call(*verb, "--help")
    assert done.returncode == 0 and f"enginepost {' '.join(verb)}" in done.stdout.split("Example")[1]


def cpu_seconds(*command: str) -> tuple[float, str]:
    """Processor time of the best of some runs: what a quiet machine would take."""
    best, out = 9.0, ""
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best, out


def test_help_lists_the_verbs_and_is_quick() -> None:
    seconds, out = cpu_seconds("-m", "enginepost.cli", "--help")
    assert all(verb in out for verb in ("train", "generate", "fuse", "data", "kernels"))
    assert seconds < 0.5


def test_import_is_quick_and_loads_no_torch() -> None:
    seconds, out = cpu_seconds("-c", "import enginepost, sys; print('torch' in sys.modules)")
    assert seconds < 0.2 and out.strip() == "False"


def test_train_generate_fuse_generate(
    call: Call, recipe_file: pathlib.Path, tiny_model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = recipe_file.parent
    done = call("train", "small.yaml", "lora.r=2", "learning_rate=1e-2")
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout and "done: runs/small/adapter" in done.stdout
    assert json.loads((here / "runs/small/adapter/adapter_config.json").read_text())["r"] == 2
    assert len((here / "runs/small/metrics.jsonl").read_text().splitlines()) == 3
    again = call("train", "small.yaml", "lora.r=2", "learning_rate=1e-2")
    assert again.returncode == 1 and again.stderr.startswith("error: runs/small: the run directory is not empty")
    assert "Traceback" not in again.stderr
    ask = ["--prompt", "what is 3 plus one?", "--max-new-tokens", "8", "--dtype", "float32"]
    with_adapter = call("generate", str(tiny_model_dir), "--adapter", "runs/small/adapter", *ask)
    assert with_adapter.returncode == 0, with_adapter.stderr
    fused = call("fuse", str(tiny_model_dir), "runs/small/adapter", "fused")
    assert fused.returncode == 0 and "fused" in fused.stdout, fused.stderr
    alone = call("generate", "fused", *ask)
    assert alone.stdout == with_adapter.stdout
    base = call("generate", str(tiny_model_dir), *ask)
    assert base.returncode == 0 and base.stdout != alone.stdout
    raw = call("generate", str(tiny_model_dir), "--raw", *ask)
    assert raw.returncode == 0 and raw.stdout != base.stdout
    monkeypatch.setenv("ENGINEPOST_CACHE", str(here / "cache"))
    assert call("quantize", str(tiny_model_dir), "four", "--type", "nf4").returncode == 0
    in_4_bits = call("generate", str(tiny_model_dir), "--quantize", "nf4", *ask)
    assert in_4_bits.returncode == 0 and in_4_bits.stdout == call("generate", "four", *ask).stdout != base.stdout
    refused = call("generate", str(tiny_model_dir), "--quantize", "nf9", *ask)
    assert refused.returncode == 1 and "quantize 'nf9' is not known; use nf4, nf4-double, fp4" in refused.stderr
    refused = call("generate", str(tiny_model_dir), "--raw", "--system", "be brief", *ask)
    assert refused.returncode == 1 and "--system needs a chat template" in refused.stderr


def test_sampling_follows_the_seed(call: Call, tiny_model_dir: pathlib.Path) -> None:
    ask = ["generate", str(tiny_model_dir), "-p", "the", "--raw", "--max-new-tokens", "12", "--temperature", "1.5"]
    a, b, c = (call(*ask, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert a == b != c


def test_sigterm_saves_and_says_how_to_resume(recipe_file: pathlib.Path) -> None:
    here = recipe_file.parent
    process = spawn("train", "small.yaml", "max_steps=100000", "save_every=100000", cwd=here)
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


def test_mistakes_are_messages(call: Call, recipe_file: pathlib.Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "learning_rte: 1e-4\n")
    done = call("train", "small.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: small.yaml:9: learning_rte: unknown key; did you mean learning_rate?\n"
    done = call("train", "nowhere.yaml")
    assert done.stderr == "error: nowhere.yaml: cannot read the recipe: No such file or directory\n"
    done = call("generate", "no/model", "--prompt", "x")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "no/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert call("train").returncode == 2  # usage


def test_data_preview(call: Call, recipe_file: pathlib.Path, tiny_model_dir: pathlib.Path) -> None:
    for arguments in (["small.yaml"], ["rows.jsonl", "--model", str(tiny_model_dir)]):
        done = call("data", "preview", *arguments, "--rows", "2")
        assert done.returncode == 0, done.stderr
        assert "what is 0 plus one?" in done.stdout and "what is 2 plus one?" not in done.stdout
        assert "12" in done.stdout and "trained on" in done.stdout
    done = call("data", "preview", "rows.jsonl")
    assert done.returncode == 1 and "--model" in done.stderr


def test_kernels_lists_what_runs(call: Call) -> None:
    done = call("kernels")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("attention", "linear_logprob", "lora", "norm", "rope", "glu", "adamw"))
    assert "instruction set" in done.stdout


def test_init_writes_a_model_that_other_verbs_read(
    call: Call, tmp_path: pathlib.Path, tiny_tokenizer_dir: pathlib.Path
) -> None:
    small = ["num_hidden_layers=2", "hidden_size=64", "intermediate_size=96", "num_attention_heads=4", "num_key_value_heads=2",
             "head_dim=16", "vocab_size=400"]  # fmt: skip
    done = call("init", "--like", "llama-3.1-8b", "m", *small, "--tokenizer", str(tiny_tokenizer_dir))
    assert done.returncode == 0 and "112,960 parameters, random, in bfloat16" in done.stdout
    again = call("init", "--config", "m/config.json", "again", "num_hidden_layers=1", "--dtype", "float32")
    assert again.returncode == 0 and "float32" in again.stdout
    said = call("generate", "m", "--raw", "--prompt", "hello", "--max-new-tokens", "3")
    assert said.returncode == 0, said.stderr
    assert "give either --like NAME or --config FILE" in call("init", "out").stderr
    assert "did you mean" in call("init", "--like", "llama-3.1-80b", "out").stderr


def test_plan_tells_before_anything_is_there(call: Call, tmp_path: pathlib.Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: llama-3.1-8b\ndata: rows.jsonl\nquantize: nf4\n")
    done = call("plan", "recipe.yaml", "lora.r=32", "--gpu", "24GB")
    assert done.returncode == 0, done.stderr
    for part in ("weights that stay", "optimizer moments", "peak", "fits in 24.00 GB", "one sequence of up to"):
        assert part in done.stdout
    assert "does not fit in 8.00 GB" in call("plan", "recipe.yaml", "batch_size=4", "--gpu", "8GB").stdout
    wrong = call("plan", "recipe.yaml", "--gpu", "voodoo2")
    assert wrong.returncode == 1 and "neither an amount of memory such as 12GB nor a known card" in wrong.stderr
