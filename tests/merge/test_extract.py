"""A LoRA from a fine-tune: exact where the change has that rank, near the best elsewhere, and a file that fuses back."""

import json
import pathlib

import pytest
import torch

from enginepost.checkpoint import Checkpoint, fuse, read_adapter
from enginepost.merge import MergeError, extract
from enginepost.merge.low_rank import svd
from enginepost.model import create_model, save_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 120, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """base; low: base + a change of rank 4 in the linear layers of layer 0, but for k_proj; free: any change everywhere."""
    home = tmp_path_factory.mktemp("extract")
    model = create_model(CONFIG, seed=1)
    save_model(model, home / "base")
    g = torch.Generator().manual_seed(2)
    start = {name: t.clone() for name, t in model.checkpoint_tensors().items()}
    with torch.no_grad():
        for name, t in model.checkpoint_tensors().items():
            if ".layers.0." in name and t.ndim == 2 and "k_proj" not in name:
                t += 0.01 * torch.randn(t.shape[0], 4, generator=g) @ torch.randn(4, t.shape[1], generator=g)
        save_model(model, home / "low")
        for name, t in model.checkpoint_tensors().items():
            t.copy_(start[name] + 0.01 * torch.randn(t.shape, generator=g))
        save_model(model, home / "free")
    return home


def tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def test_a_change_of_low_rank_comes_back(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = extract(models / "base", models / "low", tmp_path / "adapter", rank=4)
    assert len(report.modules) == 6 and report.error < 1e-5 and not report.left_out
    assert max(module.error for module in report.modules.values()) < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # k_proj and layer 1 are as they were, so PEFT must be told the modules one by one
    assert config["r"] == config["lora_alpha"] == 4 and sorted(config["target_modules"]) == sorted(report.modules)
    fuse(models / "base", tmp_path / "adapter", tmp_path / "fused")
    ours, wanted = tensors(tmp_path / "fused"), tensors(models / "low")
    for name, t in wanted.items():
        torch.testing.assert_close(ours[name], t, rtol=0, atol=1e-6)


def test_rank_by_energy_is_the_least_that_holds_it(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = extract(models / "base", models / "free", tmp_path / "adapter", energy=0.8)
    before, after = tensors(models / "base"), tensors(models / "free")
    adapter = read_adapter(tmp_path / "adapter")
    assert len(report.modules) == 14
    for path, module in report.modules.items():
        d = (after[path + ".weight"] - before[path + ".weight"]).double()
        s = torch.linalg.svdvals(d)
        held = torch.cumsum(s**2, 0) / (s**2).sum()
        assert module.rank == int((held < 0.8).sum()) + 1 == adapter.parts[path].r
        assert module.error == pytest.approx(float((1 - held[module.rank - 1]).sqrt()), rel=1e-3)
        part = adapter.parts[path]
        rest = d - part.B.double() @ part.A.double() * adapter.scaling(path)
        assert module.error == pytest.approx(float(rest.norm() / d.norm()), rel=1e-4)
    assert "model.norm.weight" in report.left_out and "lm_head.weight" in report.left_out
    written = json.loads((tmp_path / "adapter" / "extract.json").read_text())
    assert written["error"] == report.error and len(written["modules"]) == 14


def test_the_whole_change_with_full_rank(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = extract(models / "base", models / "free", tmp_path / "adapter", rank=96, whole=True)
    assert not report.left_out and report.error < 1e-5
    fuse(models / "base", tmp_path / "adapter", tmp_path / "fused")
    ours = tensors(tmp_path / "fused")
    for name, t in tensors(models / "free").items():
        torch.testing.assert_close(ours[name], t, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(300, 200), (200, 700)])
def test_randomised_svd_is_near_the_best(m: int, n: int) -> None:
    """Error at most 2 % above Eckart and Young's, on a spectrum that decays like a fine-tune's (1 / i) and on a flat one."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, min(m, n), generator=g))[0]
    v = torch.linalg.qr(torch.randn(n, min(m, n), generator=g))[0]
    for s in (1 / torch.arange(1, min(m, n) + 1), torch.ones(min(m, n))):
        d = u * s @ v.T
        ours = svd(d, 16, seed=3)
        assert 3 * (16 + 10) < min(m, n)  # the random path
        error = torch.linalg.norm(d - ours[0] * ours[1] @ ours[2])
        assert error <= 1.02 * (s[16:] ** 2).sum().sqrt()
        assert torch.equal(ours[1], svd(d, 16, seed=3)[1])
        torch.testing.assert_close(ours[0].T @ ours[0], torch.eye(16), rtol=0, atol=1e-5)


def test_refusals(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(MergeError, match="no linear layer differs"):
        extract(models / "base", models / "base", tmp_path / "a")
    with pytest.raises(MergeError, match="energy is"):
        extract(models / "base", models / "low", tmp_path / "a", energy=1.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(MergeError, match="not an empty directory"):
        extract(models / "base", models / "low", tmp_path / "full")
    save_model(create_model({**CONFIG, "vocab_size": 121}), tmp_path / "larger")
    with pytest.raises(MergeError, match=r"embed_tokens.weight is \[120, 96\].*\[121, 96\].*[Vv]ocabular"):
        extract(models / "base", tmp_path / "larger", tmp_path / "a")
    damaged = create_model(CONFIG)
    with torch.no_grad():
        damaged.blocks[1].down.weight[3, 5] = float("nan")
    save_model(damaged, tmp_path / "damaged")
    with pytest.raises(MergeError, match=r"layers.1.mlp.down_proj.weight holds NaN"):
        extract(models / "base", tmp_path / "damaged", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_command(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from typer.testing import CliRunner

    from enginepost.cli import app

    arguments = ["extract", str(models / "base"), str(models / "low"), str(tmp_path / "adapter"), "--rank", "4"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "6 modules, rank 4" in done.output, done.output
    assert "Example" in CliRunner().invoke(app, ["extract", "--help"]).output
