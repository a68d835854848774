"""The same bytes for any threads, memory and interruption; memory within its budget; what the output directory holds."""

import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from small_checkpoints import save, tensors, two

from enginepost.errors import EnginepostError
from enginepost.kernels import backend
from enginepost.merge import METHODS, MergeError, merge, merge_tensors

METHODS_OF_TWO = {
    "linear": ("{weight: 0.5}", ""),
    "ties": ("{}", "weight: 0.5, density: 0.4"),
    "dare_ties": ("{}", "weight: 0.5, density: 0.4"),
    "della": ("{}", "weight: 0.5, density: 0.4"),
    "breadcrumbs_ties": ("{rescale: true}", "weight: 0.5, density: 0.4"),
    "model_stock": ("{filter_wise: true}", ""),
    "nuslerp": ("{nuslerp_flatten: false}", "weight: 0.4"),
    "sce": ("{select_topk: 0.3}", ""),
    "ramplus_tl": ("{}", ""),
    "karcher": ("{}", ""),
}


def digest(directory: pathlib.Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.glob("*.safetensors*"))}


@pytest.mark.parametrize("method", METHODS_OF_TWO)
def test_same_bytes_for_any_threads_and_memory(method, family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    shared, model = METHODS_OF_TWO[method]
    recipe = write(two(family, method, shared, model))
    found = []
    for i, (threads, memory) in enumerate([(1, 512e6), (2, 30e6), (8, 512e6), (3, 1e9)]):
        merge(recipe, tmp_path / str(i), threads=threads, memory=memory)
        found.append(digest(tmp_path / str(i)))
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("method", METHODS_OF_TWO)
def test_gpu_writes_the_bytes_of_the_cpu(method, family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    if not (torch.cuda.is_available() and backend.info()["cuda"]):
        pytest.skip("no CUDA GPU, or a build without CUDA kernels")
    shared, model = METHODS_OF_TWO[method]
    recipe = write(two(family, method, shared, model))
    for device in ("cpu", "cuda"):
        merge(recipe, tmp_path / device, device=device)
    assert digest(tmp_path / "cuda") == digest(tmp_path / "cpu")


def test_a_device_that_is_not_here_is_an_error(family, write, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    recipe = write(two(family, "linear", "{weight: 0.5}"))
    with pytest.raises(EnginepostError, match="'tpu' is not known; expected auto, cpu, cuda"):
        merge(recipe, tmp_path / "out", device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnginepostError, match=r"torch finds no GPU|without CUDA"):
        merge(recipe, tmp_path / "out", device="cuda")
    with pytest.raises(EnginepostError, match=r"torch finds no GPU|without CUDA"):
        merge_tensors("linear", [torch.ones(3)], weight=1, device="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_chunks_do_not_matter(method: str) -> None:
    """Bitwise, for a tensor of several chunks, in memory."""
    g = torch.Generator().manual_seed(1)
    base = torch.randn(700, 300, generator=g)
    models = [base + 0.1 * torch.randn(700, 300, generator=g) for _ in range(2)]
    p: dict = {"linear": {"weight": 0.3}, "slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}.get(method, {})
    if method in ("nuslerp", "multislerp") or "density" in [q.name for q in METHODS[method].parameters]:
        p["weight"] = [0.3, 0.6]
    if any(q.name == "density" for q in METHODS[method].parameters) and method != "task_arithmetic":
        p["density"] = 0.4
    count = METHODS[method].models[1] or 2
    with_base = None if METHODS[method].base == "ignored" else base
    small = merge_tensors(method, models[:count], with_base, chunk=1 << 16, **p)
    large = merge_tensors(method, models[:count], with_base, chunk=1 << 20, **p)
    assert torch.equal(small, large)


def test_output_is_a_model(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "merged"
    [report] = merge(write(two(family, "ties")), out, shard_bytes=200_000)
    assert report.tensors == 15 and report.written == 2 * sum(t.numel() for t in tensors(0).values())
    assert not (tmp_path / ".merged.partial").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(0)) and len(set(index["weight_map"].values())) > 2
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["num_hidden_layers"] == 3
    record = json.loads((out / "merge_run.json").read_text())
    for name, file in index["weight_map"].items():
        raw = load_file(out / file)[name].view(torch.uint8).numpy().tobytes()
        assert xxhash.xxh3_128(raw).hexdigest() == record["xxh3_128"][name]
    assert "merge_method: ties" in (out / "mergekit_config.yml").read_text()
    readme = (out / "README.md").read_text()
    assert "graph TD" in readme and "base_model:" in readme and "ties" in readme
    assert (out / "family_tree.svg").read_text().startswith("<svg")


def test_family_tree_goes_through_ancestors(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    merge(write(two(family, "ties")), tmp_path / "child")
    recipe = f"models: [{{model: {tmp_path}/child}}, {{model: {family}/c}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    merge(write(recipe), tmp_path / "grandchild")
    readme = (tmp_path / "grandchild" / "README.md").read_text()
    for name in ("base", "child<br/><i>ties", "grandchild<br/><i>linear"):
        assert name in readme


def test_documents_use_earlier_ones(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    text = f"""merge_method: linear
models: [{{model: first, parameters: {{weight: 1}}}}, {{model: {family}/c, parameters: {{weight: 1}}}}]
---
name: first
merge_method: linear
models: [{{model: {family}/a, parameters: {{weight: 1}}}}, {{model: {family}/b, parameters: {{weight: 1}}}}]
dtype: float32
"""
    reports = merge(write(text), tmp_path / "out")
    assert [r.directory.name for r in reports] == ["first", "out"]
    got = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].float()
    a, b, c = (tensors(i)["model.norm.weight"].float() for i in (1, 2, 3))
    torch.testing.assert_close(got, ((a + b) / 2 + c) / 2, rtol=1e-6, atol=1e-6)


def test_dry_run_writes_nothing(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    [report] = merge(write(two(family, "ties")), tmp_path / "out", dry_run=True)
    assert report.tensors == 15 and "model.embed_tokens.weight" in report.text(dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_finished_merge_is_not_made_again(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    recipe = write(two(family, "ties"))
    merge(recipe, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    [report] = merge(recipe, tmp_path / "out")
    assert "was there already" in report.notes[0] and report.tensors == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(MergeError, match="not an empty directory"):
        merge(recipe, tmp_path / "out", seed=1)


def test_trim_over_the_model(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """trim: model keeps the largest changes of all tensors together, every tie included."""
    merge(write(two(family, "ties", "{trim: model, normalize: false}", "weight: 1.0, density: 0.3")), tmp_path / "out")
    base, a, b = (tensors(i) for i in (0, 1, 2))
    kept = []
    for model in (a, b):
        deltas = {n: model[n].float() - base[n].float() for n in base}
        everything = torch.cat([d.flatten().abs() for d in deltas.values()])
        k = int(0.3 * everything.numel())
        threshold = everything.sort(descending=True).values[k - 1]
        kept.append({n: torch.where(d.abs() >= threshold, d, 0.0) for n, d in deltas.items()})
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name in base:
        x, y = kept[0][name], kept[1][name]
        sign = torch.where(x + y >= 0, 1.0, -1.0)
        merged = torch.where(torch.sign(x) == sign, x, 0.0) + torch.where(torch.sign(y) == sign, y, 0.0)
        assert torch.equal(got[name], (base[name].float() + merged).bfloat16())


def test_rescale_by_density_as_in_the_paper() -> None:
    g = torch.Generator().manual_seed(0)
    base, model = torch.zeros(10000), torch.rand(10000, generator=g) + 1
    out = merge_tensors("dare_linear", [model], base, weight=1.0, density=0.25, rescale_rule="density")
    kept = out != 0
    torch.testing.assert_close(out[kept], 4 * model[kept])
    assert abs(kept.float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 10000) ** 0.5


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_masks_keep_their_share_and_depend_on_the_key(method: str) -> None:
    base = torch.zeros(256, 256)
    model = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) + 0.5

    def kept(**keys):  # type: ignore[no-untyped-def]
        return merge_tensors(method, [model, model], base, weight=[1.0, 0.0], density=0.4, rescale=False, **keys) != 0

    first = kept(name="x", seed=0)
    assert abs(first.float().mean().item() - 0.4) < 5 * (0.24 / 65536) ** 0.5
    assert torch.equal(first, kept(name="x", seed=0))
    for other in (kept(name="y", seed=0), kept(name="x", seed=1)):
        both = (first & other).float().mean().item()  # as often as two independent draws
        assert abs(both - 0.16) < 0.02
    if method == "della_linear":  # the larger half of a row is kept more often: 0.4 + 0.15 / 2 against 0.4 - 0.15 / 2
        large = model > model.median(dim=1, keepdim=True).values
        gap = first[large].float().mean() - first[~large].float().mean()
        assert abs(gap.item() - 0.15) < 0.02


KILLED = """
import sys
from enginepost.merge import merge
merge(sys.argv[1], sys.argv[2], threads=2, memory=30e6, progress=lambda done, total, name: print(name, flush=True))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed(kills, family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    recipe = write(two(family, "dare_ties"))
    merge(recipe, tmp_path / "whole")
    expected = digest(tmp_path / "whole")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    rng = random.Random(kills)
    for attempt in range(kills):
        out = tmp_path / f"out{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(recipe), str(out)], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert process.stdout is not None
        for _ in range(rng.randrange(1, 12)):
            process.stdout.readline()
        time.sleep(rng.random() * 0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not out.exists():
            journal = tmp_path / f".out{attempt}.partial" / "journal.jsonl"
            finished = len(journal.read_text().splitlines()) - 1
            assert finished >= 1
            [report] = merge(recipe, out)
            assert report.resumed >= finished - 1  # a line may have been cut
        assert digest(out) == expected


def test_a_damaged_tensor_is_made_again(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    recipe = write(two(family, "ties"))
    merge(recipe, tmp_path / "whole")

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out", threads=1, progress=stop)
    partial = tmp_path / ".out.partial"
    with open(partial / "model.safetensors", "r+b") as f:  # the end of the file is of the tensor finished or of none
        data = bytearray(f.read())
        f.seek(len(data) // 2)
        f.write(bytes(64))
    merge(recipe, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_another_recipe_does_not_resume(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(write(two(family, "ties")), tmp_path / "out", threads=1, progress=stop)
    [report] = merge(write(two(family, "dare_ties")), tmp_path / "out")
    assert report.resumed == 0


def test_memory_budget_too_small_is_said(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MergeError, match=r"at least \d+ MB are needed"):
        merge(write(two(family, "ties")), tmp_path / "out", memory=1e6)


def test_peak_memory_stays_in_the_budget(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A tensor of 32 MB in each of three models, merged in 24 MB."""
    weights = {"model.embed_tokens.weight": torch.randn(1 << 19, 32).bfloat16()}
    config = {"num_hidden_layers": 0, "vocab_size": 1 << 19}
    for name in ("base", "a", "b"):
        save(tmp_path / name, {n: t + (name != "base") * 0.1 for n, t in weights.items()}, **config)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(two(tmp_path, "della"))
    script = f"""
import threading, time
from enginepost.merge import merge, merge_tensors
import torch
merge_tensors("della", [torch.ones(9, 9)] * 2, torch.zeros(9, 9), weight=1.0, density=0.5)
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
t = threading.Thread(target=watch); t.start()
merge({str(recipe)!r}, {str(tmp_path / "out")!r}, threads=2, memory=24e6)
done.set(); t.join()
print(peak[0] - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) < 24e6
