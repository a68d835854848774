"""Makes rope.json: inverse frequencies and attention scaling of every rope type, from transformers' ROPE_INIT_FUNCTIONS.

.venv-peers/bin/python tests/golden/make_rope.py
"""

import json
import pathlib

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# name: head_dim, theta, max_position, scaling, sequence lengths
CASES = {
    "linear": (64, 1e4, 2048, dict(rope_type="linear", factor=4.0), [0]),
    "dynamic": (64, 1e4, 512, dict(rope_type="dynamic", factor=2.0), [0, 300, 1500]),
    "llama3": (
        128, 5e5, 131072,
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8192),
        [0],
    ),
    "yarn": (128, 1e6, 131072, dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768), [0]),
    "yarn, all options": (
        64, 1e4, 163840,
        dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, beta_fast=24, beta_slow=2,
             mscale=1.0, mscale_all_dim=0.7, truncate=False),
        [0],
    ),
    "yarn, attention factor": (
        64, 1e4, 8192,
        dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=4096, attention_factor=0.9),
        [0],
    ),
    "longrope": (
        16, 1e4, 131072,
        dict(rope_type="longrope", original_max_position_embeddings=4096,
             short_factor=[1 + i / 10 for i in range(8)], long_factor=[1 + 3 * i for i in range(8)]),
        [100, 4096, 4097],
    ),
    "longrope, factor": (
        16, 1e4, 4096,
        dict(rope_type="longrope", factor=8.0, short_factor=[1.0] * 8, long_factor=[2.0 + i for i in range(8)]),
        [100, 5000],
    ),
    "longrope, attention factor": (
        16, 1e4, 131072,
        dict(rope_type="longrope", original_max_position_embeddings=4096, attention_factor=1.3,
             short_factor=[1.5] * 8, long_factor=[4.0] * 8),
        [100],
    ),
}  # fmt: skip


def main() -> None:
    rows = []
    for name, (head_dim, theta, max_position, scaling, lengths) in CASES.items():
        for seq_len in lengths:
            config = LlamaConfig(
                hidden_size=head_dim,
                num_attention_heads=1,
                head_dim=head_dim,
                max_position_embeddings=max_position,
                rope_parameters={**scaling, "rope_theta": theta},
            )
            make = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
            inv_freq, attention = make(config, torch.device("cpu"), seq_len=seq_len or None)
            rows.append(
                dict(name=name, dim=head_dim, theta=theta, max_position=max_position, scaling=scaling, seq_len=seq_len)
                | dict(inv_freq=inv_freq.tolist(), attention_scaling=float(attention))
            )
    path = pathlib.Path(__file__).with_name("rope.json")
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


if __name__ == "__main__":
    main()
