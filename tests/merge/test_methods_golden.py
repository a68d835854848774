"""Every method against mergekit 0.1.5 (tests/golden/make_merge.py), in float32."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from enginepost.kernels import merge as kernel
from enginepost.merge import METHODS, merge_tensors

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "merge.json").read_text())
TENSORS = load_file(GOLDEN / "merge.safetensors")


def inputs(case: dict) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    models = [TENSORS[f"{case['shape']}.{i}"] for i in range(case["models"])]
    return models, TENSORS[f"{case['shape']}.base"] if case["base"] else None


def parameters(case: dict) -> dict:
    """mergekit lists values for the base too where a parameter is for every input; here there are none of those with a base."""
    return case["parameters"]


def identify(case: dict) -> str:
    return f"{case['key']}-{case['method']}-{case['shape']}"


def test_every_method_has_a_case() -> None:
    assert set(METHODS) == {case["method"] for case in CASES}


@pytest.mark.parametrize("case", [c for c in CASES if c["masks"] == 0], ids=identify)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_deterministic_methods(case: dict, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEPOST_BACKEND", "" if backend == "cpu" else backend)
    models, base = inputs(case)
    ours = merge_tensors(case["method"], models, base, **parameters(case))
    torch.testing.assert_close(ours, TENSORS[case["key"]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c["masks"]], ids=identify)
def test_random_methods_given_the_same_masks(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINEPOST_BACKEND", "reference")
    models, base = inputs(case)
    masks = [TENSORS[f"{case['key']}.mask{i}"].reshape(-1).bool() for i in range(case["masks"])]
    drawing = [i for i, m in enumerate(models) if density(case, i) < 1]
    by_values = {tuple(models[i].reshape(-1)[:2].tolist()): mask for i, mask in zip(drawing, masks, strict=True)}
    ours = kernel.keep_mask

    def recorded(x, base, select, start, columns):  # type: ignore[no-untyped-def]
        if select.kind in ("random", "ranked"):
            return by_values[tuple(x[:2].tolist())]
        return ours(x, base, select, start, columns)

    monkeypatch.setattr(kernel, "keep_mask", recorded)
    result = merge_tensors(case["method"], models, base, **parameters(case))
    torch.testing.assert_close(result, TENSORS[case["key"]], rtol=1e-6, atol=2e-6)


def density(case: dict, i: int) -> float:
    d = case["parameters"].get("density", 1.0)
    return d[i] if isinstance(d, list) else d


@pytest.mark.parametrize("case", [c for c in CASES if c["method"].startswith("della")], ids=identify)
def test_della_probabilities(case: dict) -> None:
    """mergekit's probability of every element; elements whose magnitudes agree in 6 bits of the fraction share it."""
    models, base = inputs(case)
    for i, model in enumerate(models):
        columns = model.shape[-1]
        bits = kernel.magnitude_bits(model.reshape(-1), base.reshape(-1)).view(-1, columns)
        limits = kernel.rank_limits(bits.numpy(), density(case, i), case["parameters"].get("epsilon", 0.15))
        ours = torch.from_numpy(limits / 2.0**24)
        theirs = TENSORS[f"{case['key']}.probability{i}"].reshape(-1, columns).double()
        alike = ((bits[:, :, None] >> 17) == (bits[:, None, :] >> 17)).double()
        theirs = (alike @ theirs[:, :, None])[:, :, 0] / alike.sum(-1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
        assert alike.sum(-1).mean() < 2  # most have no equal


def test_della_where_magnitudes_are_equal() -> None:
    """mergekit ranks equal magnitudes by the accident of an unstable sort, and in bfloat16 rounds ranks and probabilities; ours have
    the mean of their ranks. So the elements of one magnitude stay as often as mergekit's do (tests/golden/make_della.py)."""
    golden = load_file(GOLDEN / "della.safetensors")
    base, tuned = golden["base"], golden["tuned"]
    density, epsilon = 0.6, 0.25
    rows, columns = base.shape
    bits = kernel.magnitude_bits(tuned.reshape(-1), base.reshape(-1)).view(rows, columns)
    ours = torch.from_numpy(kernel.rank_limits(bits.numpy(), density, epsilon) / 2.0**24)
    row = torch.arange(rows)[:, None].expand(rows, columns)
    _, alike, size = torch.stack([row.reshape(-1), (bits >> 17).reshape(-1)]).unique(
        dim=1, return_inverse=True, return_counts=True
    )
    assert (size[alike] > 1).float().mean() > 0.95  # nearly every element has its equals

    def of_equals(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(size), dtype=torch.float64).index_add_(0, alike, x.reshape(-1).double()) / size

    torch.testing.assert_close(of_equals(golden["probability.float32"]), of_equals(ours), rtol=0, atol=2e-6)
    # 768 ranks in 8 bits of precision, then a probability in as many: half a unit in the last place each
    torch.testing.assert_close(of_equals(golden["probability.bfloat16"]), of_equals(ours), rtol=2**-7, atol=0)
    spread = (golden["probability.float32"].double() - ours).abs().reshape(-1)
    assert (spread <= epsilon * (size[alike] - 1) / (columns - 1) + 2e-6).all()  # no further than its equals reach

    draws = 300
    kept = torch.zeros(rows, columns)
    for key in range(draws):
        select = kernel.Select("ranked", density=density, epsilon=epsilon, key=key)
        kept += kernel.keep_mask(tuned.reshape(-1), base.reshape(-1), select, 0, columns).view(rows, columns)
    theirs = of_equals(golden["probability.float32"])
    off = (of_equals(kept / draws) - theirs) / (theirs * (1 - theirs) / (draws * size)).sqrt()
    assert off.abs().max() < 5 and abs(off.square().mean().item() - 1) < 5 * (2 / len(size)) ** 0.5
