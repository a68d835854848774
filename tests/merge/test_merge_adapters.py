"""Adapters merged with adapters, against PEFT's add_weighted_adapter (tests/golden/make_merged_adapters.py)."""

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from enginepost.checkpoint import Adapter, LoraWeights, parse_adapter, read_adapter, write_adapter
from enginepost.merge import MergeError, adapters, merge_adapters

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CONTENT = json.loads((GOLDEN / "merged_adapters.json").read_text())
TENSORS = load_file(GOLDEN / "merged_adapters.safetensors")
CASES: dict[str, dict[str, Any]] = CONTENT["cases"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("adapters")
    for name, settings in CONTENT["settings"].items():
        own = {k.removeprefix(f"{name}."): v for k, v in TENSORS.items() if k.startswith(f"{name}.")}
        named = {f"base_model.model.{k[:-2]}.lora_{k[-1]}.weight": v for k, v in own.items()}
        write_adapter(directory / name, parse_adapter({"peft_type": "LORA", **settings}, named, name))
    return directory


def delta(adapter: Adapter, path: str) -> torch.Tensor:
    part = adapter.parts[path]
    return adapter.scaling(path) * part.B @ part.A


@pytest.mark.parametrize("key", CASES)
def test_like_peft(key: str, home: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[key]
    masks = iter([TENSORS[f"{key}.mask{i}"] for i in range(case["masks"])])
    if case["masks"]:
        monkeypatch.setattr(adapters, "keep_mask", lambda t, density, key: next(masks).bool().view(t.shape))
    options = {name: case[name] for name in ("density", "rank", "sign") if name in case}
    sources = [home / name for name in case["adapters"]]
    report = merge_adapters(sources, tmp_path / "out", method=case["method"], weights=case["weights"], **options)
    merged = read_adapter(tmp_path / "out")
    expected = {k.split(".")[1]: v for k, v in TENSORS.items() if k.startswith(f"{key}.") and k.endswith(".delta")}
    assert set(merged.parts) == set(expected) == set(report.ranks)
    assert next(masks, None) is None
    for path, wanted in expected.items():
        torch.testing.assert_close(delta(merged, path), wanted, rtol=1e-5, atol=1e-5)


def test_the_error_is_the_distance_from_the_sum(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    sources = [home / "a", home / "c"]
    assert merge_adapters(sources, tmp_path / "cat", method="cat").error < 1e-6
    report = merge_adapters(sources, tmp_path / "svd", rank=2)
    read = [read_adapter(path) for path in sources]
    square = lost = 0.0
    for path in ("first", "second"):
        d = sum(delta(adapter, path) for adapter in read if path in adapter.parts)
        s = torch.linalg.svdvals(d.double())
        square, lost = square + float((s**2).sum()), lost + float((s[2:] ** 2).sum())
    assert report.error == pytest.approx((lost / square) ** 0.5, rel=1e-4)
    assert report.ranks == {"first": 2, "second": 2}


def test_masks_follow_the_seed(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def merged(seed: int) -> torch.Tensor:
        out = tmp_path / f"{seed}-{len(list(tmp_path.iterdir()))}"
        merge_adapters([home / "a", home / "b"], out, method="dare_linear", density=0.5, seed=seed)
        return read_adapter(out).parts["first"].A

    assert torch.equal(merged(1), merged(1)) and not torch.equal(merged(1), merged(2))
    keep = adapters.keep_mask(torch.empty(1000, 100), 0.3, key=5)
    assert keep.float().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / 1e5) ** 0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "tys"}, "did you mean ties"),
        ({"weights": [1.0]}, "1 weights came for 2 adapters"),
        ({"method": "ties", "density": 0.0}, "density is"),
        ({"method": "cat", "density": 0.5}, "density does not apply"),
        ({"method": "linear", "rank": 3}, r"only svd and \*_svd choose a rank"),
        ({"method": "ties", "density": 0.5}, r"second: the ranks differ \(4 in .*a, 6 in .*c\).*ties_svd"),
    ],
)
def test_refusals(options: dict[str, Any], says: str, home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(MergeError, match=says):
        merge_adapters([home / "a", home / "c"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_base(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    part = LoraWeights(torch.ones(4, 11), torch.ones(12, 4), None, 4, 4.0)
    write_adapter(tmp_path / "wide", Adapter({"peft_type": "LORA", "r": 4, "lora_alpha": 4}, {"first": part}))
    with pytest.raises(
        MergeError, match=r"first is \[12, 11\] in .*wide and \[12, 10\] in .*a: the adapters are of different"
    ):
        merge_adapters([home / "a", tmp_path / "wide"], tmp_path / "out")
    dora = LoraWeights(torch.ones(4, 10), torch.ones(12, 4), torch.ones(12), 4, 4.0)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True}
    write_adapter(tmp_path / "dora", Adapter(config, {"first": dora}))
    with pytest.raises(MergeError, match="is a DoRA adapter"):
        merge_adapters([home / "a", tmp_path / "dora"], tmp_path / "out")


def test_the_command(home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from typer.testing import CliRunner

    from enginepost.cli import app

    done = CliRunner().invoke(
        app,
        ["merge-adapters", str(tmp_path / "out"), str(home / "a"), str(home / "b"), "--weight", "0.5", "--weight", "2"],
    )
    assert done.exit_code == 0 and "svd, 2 modules, rank 4" in done.output, done.output
    assert "Example" in CliRunner().invoke(app, ["merge-adapters", "--help"]).output
