"""LoRA fine-tuning of a 135M-parameter Llama shape on ragged rows: real tokens per second and peak memory, beside TRL + PEFT.

Every run is a process of its own and reads the same files: a random bf16 checkpoint in Hugging Face form, a word-level tokenizer
(so that the length of a row is exact: one token a word) and a jsonl of texts with lognormal lengths. The runs take turns:
ours, TRL, ours, TRL, then the lean loop (`bench/train_lean.py`: what a good engineer writes by hand in torch).
The roof is what the matrix products alone allow: 4 FLOP a token and frozen weight (forward, and the gradient of the input), at the
speed of torch's faster product on this machine.
Speed counts the tokens of the rows, never padding, from the end of the first optimizer step to the end of the last. Memory is
VmHWM of the training process, everything included (interpreter, libraries, mapped weights).

TRL gets the settings that were fastest on the machine where `ladder` was run (`python -m bench.train ladder` prints every one).
On a CPU without bfloat16 instructions torch multiplies bfloat16 many times slower than float32 (`bench.roof.widening_wins`); there
both peers get float32 weights and arithmetic, their fastest, while ours stays bfloat16. The name of the peer says so.
"""

import dataclasses
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file

from bench import Options, Row, roof

HERE = pathlib.Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MAX_LENGTH = 512
MEAN_LENGTH = 200
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training process reported."""

    tokens_per_second: float
    peak_bytes: int
    tokens: int
    steps: int

    @classmethod
    def read(cls, path: str | pathlib.Path) -> "Result":
        """From {"steps": [{"seconds", "tokens"}], "peak_bytes"}; the first step is warm-up, its end is second zero."""
        report = json.loads(pathlib.Path(path).read_text())
        steps = report["steps"]
        if len(steps) < 2:
            raise RuntimeError(f"{path}: {len(steps)} steps reported, at least 2 are needed to time one")
        seconds = steps[-1]["seconds"] - steps[0]["seconds"]
        tokens = sum(step["tokens"] for step in steps[1:])
        return cls(tokens / seconds, report["peak_bytes"], tokens, len(steps) - 1)


def lengths(count: int, seed: int = 0) -> list[int]:
    """`count` lognormal row lengths: mean 200 before the cut at 512, sigma 0.6, at least 16."""
    rng = random.Random(seed)
    sigma = 0.6
    mu = math.log(MEAN_LENGTH) - sigma**2 / 2
    return [min(MAX_LENGTH, max(16, round(rng.lognormvariate(mu, sigma)))) for _ in range(count)]


def write_data(path: pathlib.Path, rows: int, seed: int = 0) -> int:
    """Texts of `lengths` tokens each, the end-of-sequence token that trainers append included. Returns the number of tokens."""
    rng = random.Random(seed + 1)
    counts = lengths(rows, seed)
    with open(path, "w") as f:
        for n in counts:
            words = " ".join(f"w{rng.randrange(SHAPE['vocab_size'] - 3)}" for _ in range(n - 1))
            f.write(json.dumps({"text": words}) + "\n")
    return sum(counts)


def write_tokenizer(directory: pathlib.Path, vocab_size: int) -> None:
    """A word-level `tokenizer.json`: the words are w0, w1, ..., parted by spaces."""
    import tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    special = [EOS, PAD, UNKNOWN]
    vocab = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(vocab_size - len(special)))])}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "model_max_length": MAX_LENGTH,
        "add_bos_token": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_model(directory: pathlib.Path, shape: dict[str, Any] = SHAPE, seed: int = 0) -> None:
    """A Hugging Face Llama checkpoint with random bf16 weights, and its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    generator = torch.Generator().manual_seed(seed)

    def matrix(*size: int) -> torch.Tensor:
        return torch.empty(size).normal_(0.0, 0.02, generator=generator).bfloat16()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": matrix(shape["vocab_size"], hidden), "model.norm.weight": ones()}
    for i in range(shape["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors |= {
            layer + "input_layernorm.weight": ones(),
            layer + "self_attn.q_proj.weight": matrix(queries, hidden),
            layer + "self_attn.k_proj.weight": matrix(keys, hidden),
            layer + "self_attn.v_proj.weight": matrix(keys, hidden),
            layer + "self_attn.o_proj.weight": matrix(hidden, queries),
            layer + "post_attention_layernorm.weight": ones(),
            layer + "mlp.gate_proj.weight": matrix(inner, hidden),
            layer + "mlp.up_proj.weight": matrix(inner, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(directory, shape["vocab_size"])


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every trainer is given."""

    model: pathlib.Path
    data: pathlib.Path
    settings: dict[str, Any]

    def launch(self, command: list[str], settings: dict[str, Any], timeout: float = 900) -> Result:
        """Run `command MODEL DATA SETTINGS OUT` to its end; its output is shown only when it fails."""
        out = self.data.parent / "result.json"
        out.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.settings["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [*command, str(self.model), str(self.data), json.dumps({**self.settings, **settings}), str(out)],
            cwd=HERE.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout[-4000:]}")
        return Result.read(out)

    def ours(self, **settings: Any) -> Result:
        return self.launch([sys.executable, "-m", "bench.train_ours"], settings)

    def trl(self, **settings: Any) -> Result:
        best = {"dtype": "float32", "autocast": False} if roof.widening_wins() else {}
        return self.launch([str(PEERS), str(HERE / "train_trl.py")], {**TRL, **best, **settings})

    def lean(self, **settings: Any) -> Result:
        dtype = "float32" if roof.widening_wins() else "bfloat16"
        return self.launch([sys.executable, "-m", "bench.train_lean"], {"dtype": dtype, **settings})


# TRL's defaults, but for bf16 weights (its default of float32 weights under autocast takes more of both).
TRL = {
    "per_device_batch": 8,
    "packing": False,
    "padding_free": False,
    "sampling": "random",
    "checkpointing": True,
    "dtype": "bfloat16",
    "autocast": True,
}
LADDER = {
    "batch 8, checkpointing (TRL's defaults), bf16 weights": {},
    "float32 weights, autocast (TRL's defaults)": {"dtype": "float32"},
    "batch 8, no autocast": {"autocast": False},
    "batch 8, no checkpointing": {"checkpointing": False},
    "batch 8, length-grouped": {"sampling": "group_by_length"},
    "batch 1 x 8": {"per_device_batch": 1},
    "batch 1 x 8, no checkpointing": {"per_device_batch": 1, "checkpointing": False},
    "batch 8, padding-free": {"padding_free": True},
    "packing bfd, 4 bins": {"packing": True, "per_device_batch": 4},
}


def workload(directory: pathlib.Path, *, threads: int, steps: int) -> Workload:
    rows = 8
    write_model(directory / "model")
    write_data(directory / "rows.jsonl", rows * steps)
    settings = {
        "rows": rows,
        "steps": steps,
        "rank": 16,
        "alpha": 32,
        "max_length": MAX_LENGTH,
        "learning_rate": 2e-4,
        "threads": threads,
    }
    return Workload(directory / "model", directory / "rows.jsonl", settings)


def run(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        work = workload(pathlib.Path(scratch), threads=options.threads, steps=4)
        results: dict[str, list[Result]] = {"ours": [], "trl": [], "lean": []}
        for _ in range(2):
            results["ours"].append(work.ours())
            if PEERS.exists():
                results["trl"].append(work.trl())
        results["lean"].append(work.lean())
    yield from rows_of(results)


def rows_of(results: dict[str, list[Result]]) -> Iterator[Row]:
    """Two rows (speed, memory) against each peer that ran; medians over the runs of each."""
    case = "LoRA r16 135M Llama bf16 lognormal 200/512"
    dtype = "float32" if roof.widening_wins() else "bf16"
    labels = {
        "trl": f"TRL SFTTrainer + PEFT, {dtype}, batch 8, checkpointing",
        "lean": f"lean torch + LoRA loop, {dtype}, unpadded rows",
    }
    speeds = {name: [r.tokens_per_second for r in runs] for name, runs in results.items() if runs}
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    memory = {name: statistics.median(r.peak_bytes for r in runs) / 1e9 for name, runs in results.items() if runs}
    spread = 100 * (max(speeds["ours"]) - min(speeds["ours"])) / speed["ours"]
    roof_percent = 100 * speed["ours"] * 4 * linear_parameters() / max(map(roof.gemm, (torch.float32, torch.bfloat16)))
    present = [name for name in labels if name in speed]
    for name in present or [None]:
        peer = labels[name] if name else None
        yield Row(
            case,
            "speed",
            "tokens/s",
            speed["ours"],
            peer,
            speed[name] if name else None,
            better="higher",
            spread_percent=spread,
            roof_percent=roof_percent,
        )
        yield Row(case, "peak memory", "GB", memory["ours"], peer, memory[name] if name else None)


def linear_parameters() -> int:
    """Weights that every token is multiplied by: the linear layers and the head."""
    hidden, inner, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    heads = 2 * (SHAPE["num_attention_heads"] + SHAPE["num_key_value_heads"])  # q and o, k and v
    return SHAPE["num_hidden_layers"] * hidden * (heads * head + 3 * inner) + SHAPE["vocab_size"] * hidden


def ladder(only: list[str]) -> None:
    """Print speed and memory of TRL at each of its settings: how `TRL` was chosen."""
    with tempfile.TemporaryDirectory() as scratch:
        work = workload(pathlib.Path(scratch), threads=torch.get_num_threads(), steps=4)
        for name, settings in LADDER.items():
            if only and not any(word in name for word in only):
                continue
            try:
                result = work.trl(**settings)
            except RuntimeError as error:
                print(f"{name:<60} {str(error)[-1500:]}", flush=True)
                continue
            print(f"{name:<60} {result.tokens_per_second:7.1f} tokens/s {result.peak_bytes / 1e9:6.2f} GB", flush=True)


if __name__ == "__main__":
    ladder(sys.argv[2:])
