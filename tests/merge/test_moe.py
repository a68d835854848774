"""Mixtures of experts: tensors where their architecture has them, gates as the formulas say. That transformers loads and runs
them is checked by tests/golden/check_experts.py."""

import json
import pathlib

import pytest
import torch

from enginepost.checkpoint import Checkpoint
from enginepost.data import Tokenizer
from enginepost.merge import MergeError, assemble
from enginepost.model import load_model, save_model

PROMPTS = {"a": ["what is six", "numbers: 0 1"], "b": ["the quick brown fox"], "no": ["lazy dog"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: pathlib.Path) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("mixture")
    g = torch.Generator().manual_seed(3)
    for name in ("base", "a", "b"):
        model = load_model(tiny_model_dir, dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p += (name != "base") * 0.02 * torch.randn(p.shape, generator=g)
        save_model(model, directory / name, source=tiny_model_dir)
    return directory


def recipe(
    home: pathlib.Path, tmp_path: pathlib.Path, mode: str = "hidden", more: str = "", second: str = ""
) -> pathlib.Path:
    path = tmp_path / "moe.yaml"
    path.write_text(
        f"base_model: {home}/base\ngate_mode: {mode}\ndtype: float32\nexperts:\n"
        f"  - source_model: {home}/a\n    positive_prompts: {json.dumps(PROMPTS['a'])}\n"
        f"    negative_prompts: {json.dumps(PROMPTS['no'])}\n"
        f"  - source_model: {home}/b\n    positive_prompts: {json.dumps(PROMPTS['b'])}\n{second}{more}"
    )
    return path


def test_mixtral(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = assemble(recipe(home, tmp_path, second="    residual_scale: 0.5\n"), tmp_path / "out")
    out, base = Checkpoint(tmp_path / "out"), Checkpoint(home / "base")
    experts = [Checkpoint(home / name) for name in ("a", "b")]
    seen = set()
    for name in base.names:
        if ".mlp." not in name:
            assert torch.equal(out.tensor(name), base.tensor(name))
            seen.add(name)
    for i in range(2):
        for e, expert in enumerate(experts):
            for ours, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                name = f"model.layers.{i}.block_sparse_moe.experts.{e}.{ours}.weight"
                wanted = expert.tensor(f"model.layers.{i}.mlp.{theirs}.weight")
                assert torch.equal(out.tensor(name), wanted * 0.5 if (e, ours) == (1, "w2") else wanted)
                seen.add(name)
        seen.add(f"model.layers.{i}.block_sparse_moe.gate.weight")
    assert seen == set(out.names) and report.tensors == len(seen)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 2, 2)
    assert (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "mergekit_moe_config.yml").exists()
    assert any("does not run mixtures" in note for note in report.notes)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_gates(mode: str, home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Recomputed prompt by prompt: the input of layer 0 is the embedding, that of layer 1 what the first block makes of it."""
    assemble(recipe(home, tmp_path, mode), tmp_path / "out")
    model, tokenizer = load_model(home / "base", dtype=torch.float32), Tokenizer.load(home / "base")
    rows: dict[str, torch.Tensor] = {}
    for key, prompts in PROMPTS.items():
        states = []
        for prompt in prompts:
            ids = torch.tensor(tokenizer.encode(prompt))
            h0 = model.embedding[ids]
            if mode == "cheap_embed":
                states.append(torch.stack([h0.sum(0)] * 2))
                continue
            kept: list[torch.Tensor] = []
            handle = model.blocks[0].register_forward_hook(lambda m, i, output, kept=kept: kept.append(output))
            model.hidden(ids, torch.tensor([0, len(ids)], dtype=torch.int32), torch.arange(len(ids)))
            handle.remove()
            states.append(torch.stack([h.mean(0) if mode == "hidden_avg" else h[-1] for h in (h0, kept[0])]))
        whole = torch.stack(states).sum(0) if mode == "cheap_embed" else torch.stack(states).mean(0)
        rows[key] = whole / whole.norm(dim=-1, keepdim=True) if mode == "cheap_embed" else whole
    wanted = [rows["a"] - rows["no"], rows["b"]]
    out = Checkpoint(tmp_path / "out")
    for i in range(2):
        gate = out.tensor(f"model.layers.{i}.block_sparse_moe.gate.weight")
        expected = torch.stack([w[i] / w[i].norm() for w in wanted]).detach()
        torch.testing.assert_close(gate, expected, rtol=1e-5, atol=1e-6)


def test_a_shared_expert_makes_it_qwen(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shared = f"shared_experts:\n  - source_model: {home}/base\n    positive_prompts: [the]\n"
    report = assemble(recipe(home, tmp_path, "random", shared), tmp_path / "out", seed=5)
    out, base = Checkpoint(tmp_path / "out"), Checkpoint(home / "base")
    assert report.kind == "qwen2_moe"
    assert torch.equal(
        out.tensor("model.layers.1.mlp.shared_expert.up_proj.weight"), base.tensor("model.layers.1.mlp.up_proj.weight")
    )
    assert out.shape("model.layers.0.mlp.gate.weight") == (2, 32)
    assert out.shape("model.layers.0.mlp.shared_expert_gate.weight") == (1, 32)
    assert (
        out.shape("model.layers.0.self_attn.k_proj.bias") == (16,)
        and not out.tensor("model.layers.0.self_attn.k_proj.bias").any()
    )
    assemble(recipe(home, tmp_path, "random", shared), tmp_path / "again", seed=5)
    assemble(recipe(home, tmp_path, "random", shared), tmp_path / "other", seed=6)
    gates = [Checkpoint(tmp_path / d).tensor("model.layers.0.mlp.gate.weight") for d in ("out", "again", "other")]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])


@pytest.mark.parametrize(
    ("mode", "more", "says"),
    [
        ("hiden", "", "hidden"),
        ("hidden", "experts_per_token: 3\n", "experts_per_token is 3"),
        ("hidden", "architecture: mixtrall\n", "mixtral"),
        ("hidden", "architecture: qwen3_moe\n", "qwen3_moe is made of qwen3 models"),
        ("hidden", "architecture: qwen\n", "needs one shared expert"),
        ("hidden", "top_k: 3\n", "has no key 'top_k'"),
    ],
)
def test_refusals(mode: str, more: str, says: str, home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(MergeError, match=says):
        assemble(recipe(home, tmp_path, mode, more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_without_prompts_or_with_equal_ones(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "moe.yaml"
    head = f"base_model: {home}/base\nexperts:\n"
    path.write_text(head + f"  - source_model: {home}/a\n  - source_model: {home}/b\n    positive_prompts: [x]\n")
    with pytest.raises(MergeError, match="expert 0 has no positive_prompts"):
        assemble(path, tmp_path / "out")
    path.write_text(head + "".join(f"  - source_model: {home}/{n}\n    positive_prompts: [x]\n" for n in "ab"))
    with pytest.raises(MergeError, match="same prompts"):
        assemble(path, tmp_path / "out")


def test_the_command_and_the_example(
    home: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from enginepost.cli import app

    (tmp_path / "models").mkdir()
    for name, source in (("base", "base"), ("mathematics", "a"), ("chat", "b")):
        (tmp_path / "models" / name).symlink_to(home / source)
    monkeypatch.chdir(tmp_path)
    example = pathlib.Path(__file__).parents[2] / "examples" / "recipes" / "merge_moe.yaml"
    done = CliRunner().invoke(app, ["merge-moe", str(example), "models/mixture"])
    assert done.exit_code == 0 and "mixtral of 2 experts" in done.output, done.output
    assert Checkpoint(tmp_path / "models" / "mixture").dtype("model.embed_tokens.weight") == torch.bfloat16
