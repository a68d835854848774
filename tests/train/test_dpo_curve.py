"""A DPO run follows TRL's (golden/dpo_curve.json): the same rows, weights and float32, 50 steps."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import torch

from enginepost.model import create_model, save_model
from enginepost.train.loop import train

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CURVE = json.loads((GOLDEN / "dpo_curve.json").read_text())
PAIRS = 4


def seeded_model(directory: pathlib.Path) -> None:
    spec = importlib.util.spec_from_file_location("make_models", GOLDEN / "make_models.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = create_model(CURVE["config"])
    for name, tensor in model.checkpoint_tensors().items():
        tensor.copy_(torch.from_numpy(script.seeded_weight(name, tuple(tensor.shape))))
    save_model(model, directory)
    special = ["<eos>", "<pad>", "<unk>"]
    words = [f"w{i}" for i in range(CURVE["config"]["vocab_size"] - len(special))]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for i, t in enumerate(special)
        ],
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate([*special, *words])}, "unk_token": "<unk>"},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"})
    )


def test_loss_curve_is_that_of_trl(tmp_path: pathlib.Path) -> None:
    seeded_model(tmp_path / "model")
    rows = CURVE["rows"]
    # Unpacked rows are taken in the order of one permutation; so the file has them where that finds them in TRL's order.
    order = np.random.default_rng(0).permutation(len(rows))
    placed = [""] * len(rows)
    for number, place in enumerate(order):
        placed[place] = json.dumps(rows[number])
    (tmp_path / "rows.jsonl").write_text("\n".join(placed) + "\n")
    run = train(
        {
            "model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl"), "method": "dpo", "lora": None, "dtype": "fp32",
            "packing": False, "batch_size": PAIRS, "gradient_accumulation": 1, "epochs": 1, "schedule": "constant",
            "warmup_ratio": 0.0, "max_length": 128, "output": str(tmp_path / "run"), **CURVE["settings"],
        }
    )  # fmt: skip
    lines = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]
    expected = CURVE["curve"]
    assert len(lines) == len(expected["loss"]) == 50
    assert max(expected["loss"]) - min(expected["loss"]) > 0.3  # the curve goes somewhere
    assert [m["loss"] for m in lines] == pytest.approx(expected["loss"], abs=1e-4)  # the bar is 1e-3
    assert [m["rewards/margins"] for m in lines] == pytest.approx(expected["rewards/margins"], abs=5e-3)
    assert [m["rewards/accuracies"] for m in lines] == pytest.approx(expected["rewards/accuracies"])
    assert [m["logps/chosen"] for m in lines] == pytest.approx(expected["logps/chosen"], abs=2e-2)
    assert [m["logps/rejected"] for m in lines] == pytest.approx(expected["logps/rejected"], abs=2e-2)
    for name in ("logits/chosen", "logits/rejected", "entropy"):
        assert [m[name] for m in lines] == pytest.approx(expected[name], abs=2e-3), name
    assert [m["grad_norm"] for m in lines] == pytest.approx(expected["grad_norm"], rel=5e-3)
