"""Merging on a device of its own (tests/pretend_gpu.py): the bytes of the CPU, chunks in the right place, nothing left behind."""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pretend_gpu
import pytest
import torch
import yaml
from small_checkpoints import two

from enginepost.merge import METHODS, apply, evolution, evolve, executor, merge, merge_tensors, run
from enginepost.model import load_model, save_model

ON_THE_DEVICE = {  # of a recipe, of a model
    "linear": ("{weight: 0.5}", ""),
    "nuslerp": ("{}", "weight: 0.4"),
    "model_stock": ("{}", ""),
    "task_arithmetic": ("{}", "weight: 0.4"),
    "ties": ("{zero_sign: majority}", "weight: 0.4, density: 0.4"),
    "dare_ties": ("{}", "weight: 0.4, density: 0.4"),
    "breadcrumbs": ("{trim: model, rescale: true}", "weight: 0.4, density: 0.4"),
    "della": ("{}", "weight: 0.4, density: 0.4"),
}


@pytest.fixture(autouse=True)
def device_named_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The pretended device is what `cuda` means, in the threads of a merge too. Gives the methods whose chunks went there."""

    def choose(name: str) -> torch.device:
        return torch.device("cpu") if name == "cpu" else pretend_gpu.DEVICE

    def pool(limit: executor.Limits) -> ThreadPoolExecutor:
        def begin() -> None:
            torch.set_num_threads(1)
            pretend_gpu._Mode().__enter__()

        return ThreadPoolExecutor(limit.threads, initializer=begin)

    sent: list[str] = []
    place = apply.place

    def placed(method, inputs, p, device):  # type: ignore[no-untyped-def]
        inputs = place(method, inputs, p, device)
        if inputs.device.type != "cpu":
            sent.append(method.name)
        return inputs

    for module in (apply, run, evolution):
        monkeypatch.setattr(module, "choose", choose)
    for module in (apply, executor):
        monkeypatch.setattr(module, "place", placed)
    for module in (executor, evolution):
        monkeypatch.setattr(module, "pool_of", pool)
    yield sent


def digest(directory: pathlib.Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.glob("*.safetensors"))}


@pytest.mark.parametrize("method", ON_THE_DEVICE)
def test_the_bytes_of_the_cpu(method, family, write, tmp_path, device_named_cuda) -> None:  # type: ignore[no-untyped-def]
    shared, model = ON_THE_DEVICE[method]
    recipe = write(two(family, method, shared, model))
    merge(recipe, tmp_path / "cpu", threads=1)
    assert device_named_cuda == []
    with pretend_gpu.present():
        merge(recipe, tmp_path / "device", threads=2, device="cuda", memory=30e6)
    assert len(device_named_cuda) >= 15
    assert digest(tmp_path / "device") == digest(tmp_path / "cpu")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_tensors_in_memory(method: str, device_named_cuda: list[str]) -> None:
    """Every method takes the device; those without kernels there work on the CPU. The result lies where the first tensor does."""
    g = torch.Generator().manual_seed(1)
    base = torch.randn(700, 100, generator=g)
    models = [base + 0.1 * torch.randn(700, 100, generator=g) for _ in range(METHODS[method].models[1] or 2)]
    known = [q.name for q in METHODS[method].parameters]
    p: dict = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}.get(method, {})
    p |= {"weight": 0.3} if "weight" in known else {}
    p |= {"density": 0.4} if "density" in known else {}
    with_base = None if METHODS[method].base == "ignored" else base
    here = merge_tensors(method, models, with_base, chunk=1 << 16, **p)
    with pretend_gpu.present():
        there = merge_tensors(method, models, with_base, chunk=1 << 16, device="cuda", **p)
        assert there.device.type == "cpu" and torch.equal(there, here)
        moved = [m.to(pretend_gpu.DEVICE) for m in models]
        moved_base = None if with_base is None else with_base.to(pretend_gpu.DEVICE)
        for device in ("cuda", "cpu"):
            there = merge_tensors(method, moved, moved_base, chunk=1 << 16, device=device, **p)
            assert there.device == pretend_gpu.DEVICE and torch.equal(there.cpu(), here)
    gpu = METHODS[method].gpu(apply.complete(METHODS[method], p, len(models), "test"))
    assert device_named_cuda == [method] * (2 if gpu else 0)


def test_float64_stays_on_the_cpu(device_named_cuda: list[str]) -> None:
    x = torch.rand(5, dtype=torch.float64)
    with pretend_gpu.present():
        assert torch.equal(merge_tensors("linear", [x, -x], weight=[2, -1], normalize=False, device="cuda"), 3 * x)
    assert device_named_cuda == []


def test_a_search_merges_and_scores_there(tiny_model_dir, tmp_path, device_named_cuda) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(3)
    for name in ("base", "a", "b"):
        model = load_model(tiny_model_dir, dtype=torch.float32)
        with torch.no_grad():
            for q in model.parameters():
                q += 0.02 * torch.randn(q.shape, generator=g)
        save_model(model, tmp_path / name, source=tiny_model_dir)
    rows = [json.dumps({"prompt": f"{i} plus {j}", "completion": " fox"}) for i in range(3) for j in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    search = tmp_path / "search.yaml"
    search.write_text(
        yaml.safe_dump(
            {
                "base_model": "base", "models": ["a", "b"], "methods": ["ties", "dare_linear"], "budget": 8, "dtype": "float32",
                "parameters": {"weight": [0, 1], "density": [0.3, 1]}, "fitness": {"metric": "loss", "data": "rows.jsonl"},
            }
        )
    )  # fmt: skip
    here = evolve(search, tmp_path / "cpu", threads=1)
    with pretend_gpu.present():
        there = evolve(search, tmp_path / "device", threads=2, device="cuda")
    records = [json.loads((tmp_path / name / "evolve.json").read_text()) for name in ("cpu", "device")]
    assert [r.pop("devices") for r in records] == [["cpu"], ["pretend"]]
    assert records[0] == records[1] and there.best == here.best
    assert len(set(device_named_cuda)) == 2
    resumed = evolve(search, tmp_path / "device", threads=1, budget=9)
    assert "scored on cpu and on pretend" in resumed.text()
