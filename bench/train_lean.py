"""The second peer of the training benchmark: what a good engineer writes by hand in an afternoon, with torch alone.

    python -m bench.train_lean MODEL DATA.jsonl SETTINGS_JSON OUT.json

One unpadded row at a time, SDPA, LoRA on every linear layer, fused AdamW, no checkpointing, cross entropy on [T, V] logits.
It knows nothing of enginepost. Arguments and report are those of `bench/train_trl.py`.
"""

import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """y = x W^T + alpha / r * (x A^T) B^T, W frozen; everything in the dtype of W."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = weight
        self.scaling = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.A), self.B) * self.scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, tensors: dict[str, Tensor], prefix: str, config: dict, rank: int, alpha: float) -> None:
        super().__init__()

        def linear(name: str) -> LoraLinear:
            return LoraLinear(tensors[f"{prefix}{name}.weight"], rank, alpha)

        self.q, self.k, self.v, self.o = (linear(f"self_attn.{n}_proj") for n in "qkvo")
        self.gate, self.up, self.down = (linear(f"mlp.{n}_proj") for n in ("gate", "up", "down"))
        self.norm1 = tensors[prefix + "input_layernorm.weight"]
        self.norm2 = tensors[prefix + "post_attention_layernorm.weight"]
        self.eps, self.head_dim = config["rms_norm_eps"], config["head_dim"]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = F.rms_norm(x, self.norm1.shape, self.norm1, self.eps)
        q, k, v = (
            f(h).unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for f in (self.q, self.k, self.v)
        )  # [H, T, D]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        x = x + self.o(a.transpose(0, 1).flatten(1))
        h = F.rms_norm(x, self.norm2.shape, self.norm2, self.eps)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, directory: str, rank: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__()
        with open(f"{directory}/config.json") as f:
            config = json.load(f)
        tensors = {name: t.to(dtype) for name, t in load_file(f"{directory}/model.safetensors").items()}
        self.embedding = tensors["model.embed_tokens.weight"]  # [V, H], also the head
        self.norm = tensors["model.norm.weight"]
        self.eps = config["rms_norm_eps"]
        self.blocks = nn.ModuleList(
            Block(tensors, f"model.layers.{i}.", config, rank, alpha) for i in range(config["num_hidden_layers"])
        )
        inverse = config["rope_theta"] ** (-torch.arange(0, config["head_dim"], 2).float() / config["head_dim"])
        angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [positions, D]

    def forward(self, ids: Tensor) -> Tensor:
        """Sum of the token losses of one row, ids [T]."""
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[: len(ids)], self.sin[: len(ids)]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = F.rms_norm(x, self.norm.shape, self.norm, self.eps)
        logits = F.linear(x[:-1], self.embedding)
        return F.cross_entropy(logits.float(), ids[1:], reduction="sum")


def main(directory: str, data: str, settings: dict, out: str) -> None:
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    eos = tokenizer.token_to_id("<eos>")
    with open(data) as f:
        rows = [torch.tensor([*tokenizer.encode(json.loads(line)["text"]).ids, eos]) for line in f]
    model = Model(directory, settings["rank"], settings["alpha"], getattr(torch, settings["dtype"]))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    steps, losses, first = [], [], 0.0
    for step in range(settings["steps"]):
        batch = rows[step * settings["rows"] : (step + 1) * settings["rows"]]
        labels = sum(len(row) - 1 for row in batch)
        total = 0.0
        for row in batch:
            loss = model(row) / labels
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        first = first or now
        steps.append({"seconds": now - first, "tokens": sum(len(row) for row in batch)})
        losses.append(total)
    with open(out, "w") as f:
        json.dump({"steps": steps, "peak_bytes": peak_bytes(), "loss": losses}, f)


def peak_bytes() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
