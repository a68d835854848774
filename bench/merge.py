"""Merging bfloat16 checkpoints of a 1.2B Llama shape, beside mergekit: seconds, peak private memory, and the time of mere copying.

Checkpoints are random, in a temporary directory (ENGINEPOST_BENCH_DIR says where; 13 GB are needed), and in the page cache when the
clock starts. Every run is a process of its own (`bench/merge_run.py`); the clock starts after the imports and stops when the output
is written, by us with an fsync. Memory is the peak of RssAnon: what is not a mapped file. `copy` reads all inputs and writes (and
fsyncs) as many bytes as the output has, with the same number of threads: the roof. ENGINEPOST_BENCH_MERGE_LAYERS makes the model
smaller. mergekit runs in .venv-mergekit (`make peers`).
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

from bench import Options, Row

HERE = pathlib.Path(__file__).parent
PEER = pathlib.Path(os.environ.get("ENGINEPOST_MERGEKIT", HERE.parent / ".venv-mergekit" / "bin" / "python"))
LAYERS = int(os.environ.get("ENGINEPOST_BENCH_MERGE_LAYERS", "16"))
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip
RECIPES = {  # method: (number of models without the base, parameters of a model, of the recipe)
    "linear": (2, "weight: 0.5", ""),
    "slerp": (1, "", "t: 0.4"),
    "ties": (2, "weight: 0.5, density: 0.5", ""),
    "ties ": (3, "weight: 0.4, density: 0.5", ""),
    "dare_ties": (2, "weight: 0.5, density: 0.5", ""),
    "della": (2, "weight: 0.5, density: 0.5", ""),
    "breadcrumbs": (2, "weight: 0.5, density: 0.5", ""),
}


def shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, kv = 2048, 8192, 512
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, hidden)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        found |= {
            at + f"self_attn.{n}_proj.weight": (rows, hidden)
            for n, rows in zip("qkvo", (hidden, kv, kv, hidden), strict=True)
        }
        found |= {at + "mlp.gate_proj.weight": (inner, hidden), at + "mlp.up_proj.weight": (inner, hidden)}
        found |= {at + "mlp.down_proj.weight": (hidden, inner)}
        found |= {at + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return {**found, "model.norm.weight": (hidden,)}


def make_models(directory: pathlib.Path) -> float:
    """base, m0, m1, m2: random, the latter a small step (sigma 0.002, weights 0.02) away. Returns the bytes of one."""
    from enginepost.checkpoint import Writer

    declared = {name: (torch.bfloat16, shape) for name, shape in shapes().items()}
    writers = [Writer(directory / name, declared, shard_bytes=float("inf")) for name in ("base", "m0", "m1", "m2")]
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes().items():
        width = shape[-1] if len(shape) > 1 else 1
        pattern = torch.randn(1 << 22, generator=generator) * 0.02  # repeated with a step of its own, for speed
        steps = [torch.randn(1 << 22, generator=generator) * 0.002 for _ in range(3)]
        count = width * shape[0]
        for start in range(0, count, 1 << 22):
            n = min(1 << 22, count - start)
            base = pattern[:n].roll(start % 977)
            writers[0].write(name, base.bfloat16(), start)
            for writer, step in zip(writers[1:], steps, strict=True):
                writer.write(name, (base + step[:n]).bfloat16(), start)
    for writer in writers:
        writer.close()
        (writer.directory / "config.json").write_text(json.dumps(CONFIG))
    return float(sum(2 * torch.Size(shape).numel() for shape in shapes().values()))


def recipe(method: str, directory: pathlib.Path) -> tuple[str, list[str]]:
    """mergekit YAML and the directories read."""
    count, parameters, shared = RECIPES[method]
    method = method.strip()
    names = [f"m{i}" for i in range(count)]
    lines = ["models:", *(f"  - model: {directory / name}\n    parameters: {{{parameters}}}" for name in names)]
    based = method != "linear"
    lines += [f"merge_method: {method}", "dtype: bfloat16", f"parameters: {{{shared}}}"]
    if based:
        lines.append(f"base_model: {directory / 'base'}")
    return "\n".join(lines) + "\n", [str(directory / name) for name in (["base"] if based else []) + names]


def execute(
    python: str, kind: str, recipe_file: pathlib.Path, out: pathlib.Path, threads: int, inputs: list[str]
) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [python, str(HERE / "merge_run.py"), kind, str(recipe_file), str(out), str(threads), *inputs]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(HERE.parent) if kind == "ours" else "",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(options: Options) -> Iterator[Row]:
    place = os.environ.get("ENGINEPOST_BENCH_DIR")
    chosen = os.environ.get("ENGINEPOST_BENCH_MERGE_METHODS", ",".join(RECIPES)).split(",")
    with tempfile.TemporaryDirectory(dir=place, prefix="bench-merge-") as temporary:
        directory = pathlib.Path(temporary)
        size = make_models(directory)
        for method in chosen:
            text, inputs = recipe(method, directory)
            file = directory / "recipe.yaml"
            file.write_text(text)
            out = directory / "out"
            ours, roof = [], []
            for _ in range(3):
                roof.append(execute(sys.executable, "copy", file, out, options.threads, inputs)["seconds"])
                ours.append(execute(sys.executable, "ours", file, out, options.threads, inputs))
            peer = execute(str(PEER), "mergekit", file, out, options.threads, inputs) if PEER.exists() else None
            named = "mergekit" if peer else None
            best = min(o["seconds"] for o in ours)
            case = f"{method.strip()}, {len(inputs)} x {size / 1e9:.1f} GB bf16"
            yield Row(
                case, "time", "s", best, named, peer["seconds"] if peer else None, roof_percent=100 * min(roof) / best
            )
            memory = max(o["peak"] for o in ours) / 1e6
            yield Row(case, "private memory", "MB", memory, named, peer["peak"] / 1e6 if peer else None)
