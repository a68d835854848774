"""What will not do is one message that names the file, line, key, model or tensor, and leaves nothing behind."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_checkpoints import save, tensors, two

from enginepost.checkpoint import CheckpointError
from enginepost.errors import EnginepostError
from enginepost.merge import MergeError, merge, merge_tensors

Write = Callable[[str], pathlib.Path]
HEAD = "merge_method: ties\nbase_model: base\n"


def refused(recipe: pathlib.Path, out: pathlib.Path, match: str, **options: object) -> str:
    """The message; and nothing is left of the output."""
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(EnginepostError, match=match) as caught:
        merge(recipe, out, **options)  # type: ignore[arg-type]
    assert sorted(p.name for p in out.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("a: [", "not valid YAML"),
        ("- 1", "must be a mapping"),
        ("merge_method: teis\nmodels: [{model: a}]", r":1: there is no merge method 'teis'; did you mean ties"),
        ("models: [{model: a}]", "has no merge_method"),
        (HEAD + "model: [{model: a}]", r":3: the recipe has no key 'model'; did you mean models"),
        (HEAD, "exactly one of models, slices and modules; this has none"),
        (HEAD + "models: [{model: a}]\nslices: [{sources: []}]", "models and slices"),
        (HEAD + "models: []", "at least one entry"),
        (HEAD + "models: [{modle: a}]", "did you mean model"),
        (HEAD + "models:\n  - model: a\n    parameters: {wieght: 1}", r":5: ties has no parameter 'wieght'; did you mean weight"),
        (HEAD + "models: [{model: a, parameters: {weight: heavy}}]", "weight must be a number, and it is 'heavy'"),
        (HEAD + "models: [{model: a, parameters: {weight: .nan}}]", "must be finite"),
        (HEAD + "models: [{model: a, parameters: {weight: 1, density: -1}}]", "density is -1.0; it must be between 0.0 and 1.0"),
        (HEAD + "models: [{model: a, parameters: {weight: []}}]", "empty list"),
        (HEAD + "models: [{model: a, parameters: {weight: [{filter: x}]}}]", "needs a value"),
        (HEAD + "models: [{model: a+b+c}]", "PATH.@REVISION"),
        (HEAD + "parameters: {trim: layer}\nmodels: [{model: a}]", "it can be tensor, model"),
        (HEAD + "dtype: float23\nmodels: [{model: a}]", "did you mean float32"),
        (HEAD + "tokenizer_source: base\ntokenizer: {}\nmodels: [{model: a}]", "not both"),
        (HEAD + "tokenizer: {sorce: base}\nmodels: [{model: a}]", "did you mean source"),
        (HEAD + "tokenizer: {pad_to_multiple_of: 0}\nmodels: [{model: a}]", "positive integer"),
        (HEAD + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", "exactly one of|token_id"),
        (HEAD + "slices: [{sources: [{model: a, layer_range: [3, 1]}]}]", "begin < end|layer_range is"),
        (HEAD + "slices: [{sources: [{model: a}]}]", "needs model and layer_range"),
        (
            HEAD + "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [0, 3]}]}]",
            "equally many layers",
        ),
        ("name: x\nmerge_method: linear\nmodels: [{model: x}]", "in a circle: x -> x"),
        ("merge_method: linear\nmodels: [{model: a}]\n---\nmerge_method: linear\nmodels: [{model: a}]", "have no name"),
        (HEAD + "models: [{model: a, model: b}]", "twice"),
    ],
)  # fmt: skip
def test_recipes(text: str, match: str, write: Write, tmp_path: pathlib.Path) -> None:
    refused(write(text), tmp_path / "out", match)


def test_missing_parameter_names_the_line_and_the_tensor(
    family: pathlib.Path, write: Write, tmp_path: pathlib.Path
) -> None:
    message = refused(write(two(family, "ties", model="density: 0.5")), tmp_path / "out", "needs the parameter weight")
    assert "recipe.yaml:2" in message and "lm_head.weight" in message


def test_parameter_of_another_method_is_a_note(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    [report] = merge(write(two(family, "task_arithmetic", "{t: 0.5}")), tmp_path / "out", dry_run=True)
    assert any("does not use t" in note for note in report.notes)


def test_missing_model(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    refused(write(HEAD + "models: [{model: org/name}]"), tmp_path / "out", "there is no model 'base' here")


def test_output_is_an_input_or_in_use(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    refused(write(two(family, "ties")), family / "a", "is the input .*never writes over its inputs")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    refused(write(two(family, "ties")), tmp_path / "full", "not an empty directory")


def changed(family: pathlib.Path, tmp_path: pathlib.Path, weights: dict[str, torch.Tensor], **config: object) -> str:
    """A recipe of base, a and a changed b."""
    save(tmp_path / "in" / "b", weights, **config)
    return two(family, "ties").replace(f"{family}/b\n", f"{tmp_path}/in/b\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_named_and_counted(
    value: float, family: pathlib.Path, write: Write, tmp_path: pathlib.Path
) -> None:
    weights = tensors(2)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5:8] = value
    recipe = write(changed(family, tmp_path, weights))
    count = "3 NaN and 0 infinite" if value != value else "0 NaN and 3 infinite"
    message = refused(recipe, tmp_path / "out", count)
    assert "in/b" in message and "model.layers.1.mlp.down_proj.weight" in message


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_ties", "della", "task_arithmetic", "sce"])
def test_inf_in_the_base(method: str, family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    """Also where a reduction has looked at the numbers already, and where an election would leave the element out."""
    weights = tensors(0)
    weights["lm_head.weight"][3999, 39] = float("inf")
    save(tmp_path / "base", weights)
    model = "" if method == "sce" else "weight: 0.5, density: 0.6" if method != "task_arithmetic" else "weight: 0.5"
    recipe = two(family, method, model=model).replace(f"{family}/base", f"{tmp_path}/base")
    message = refused(write(recipe), tmp_path / "out", "0 NaN and 1 infinite")
    assert f"{tmp_path}/base" in message and "lm_head.weight" in message


def test_finite_numbers_whose_difference_is_not(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    weights = tensors(2)
    weights["model.norm.weight"][0] = 3e38
    base = {**tensors(0), "model.norm.weight": tensors(0)["model.norm.weight"].clone()}
    base["model.norm.weight"][0] = -3e38
    save(tmp_path / "base", base)
    recipe = changed(family, tmp_path, weights).replace(f"{family}/base", f"{tmp_path}/base")
    merge(write(recipe), tmp_path / "out")


def test_missing_tensor(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    weights = tensors(2)
    del weights["model.layers.1.mlp.down_proj.weight"]
    message = refused(write(changed(family, tmp_path, weights)), tmp_path / "out", "has no tensor")
    assert "in/b" in message and "model.layers.1.mlp.down_proj.weight" in message


def test_extra_tensor(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    weights = {**tensors(2), "model.layers.0.self_attn.q_proj.bias": torch.zeros(40)}
    refused(write(changed(family, tmp_path, weights)), tmp_path / "out", "a has no tensor .*q_proj.bias")


def test_transposed(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    weights = tensors(2)
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].T.contiguous()
    refused(write(changed(family, tmp_path, weights)), tmp_path / "out", r"\[40, 56\].*\[56, 40\].*looks transposed")


def test_quantised(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    recipe = write(changed(family, tmp_path, tensors(2), quantization_config={"quant_method": "bitsandbytes"}))
    refused(recipe, tmp_path / "out", r"is quantised \(bitsandbytes\)")


def test_other_architecture_and_layers(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    refused(
        write(changed(family, tmp_path, tensors(2), model_type="qwen2")), tmp_path / "out", "llama model and .* a qwen2"
    )
    refused(
        write(changed(family, tmp_path, tensors(2), num_attention_heads=8)), tmp_path / "out", "num_attention_heads"
    )
    fewer = {n: t for n, t in tensors(2).items() if "layers.2" not in n}
    refused(write(changed(family, tmp_path, fewer)), tmp_path / "out", "says 3 layers, and the checkpoint holds 2")
    recipe = write(changed(family, tmp_path, fewer, num_hidden_layers=2))
    refused(recipe, tmp_path / "out", "different numbers of layers")


def test_other_vocabulary_without_a_tokenizer(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    weights = tensors(2)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:3990].clone()
    refused(
        write(changed(family, tmp_path, weights, vocab_size=3990)),
        tmp_path / "out",
        "vocabularies differ. Add `tokenizer",
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("method", "della"), "must lie between 0 and 1; density is 0.1"),
        (("path", "@main"), "is a directory here, which has no revisions"),
        (("density", "1.5"), "density is 1.5; it must be between 0.0 and 1.0"),
    ],
)
def test_what_a_dry_run_sees(
    change: tuple[str, str], match: str, family: pathlib.Path, write: Write, tmp_path: pathlib.Path
) -> None:
    key, value = change
    recipe = two(family, value if key == "method" else "ties", model="weight: 0.5, density: 0.1")
    if key != "method":
        old, new = (f"{family}/a", f"{family}/a{value}") if key == "path" else ("density: 0.1", f"density: {value}")
        recipe = recipe.replace(old, new)
    with pytest.raises(MergeError, match=match):
        merge(write(recipe), tmp_path / "out", dry_run=True)


def test_weights_that_cancel(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    recipe = two(family, "linear", "{weight: 1}", "").replace(
        f"{family}/b\n    parameters: {{}}", f"{family}/b\n    parameters: {{weight: -1}}"
    )
    recipe = recipe.replace(f"base_model: {family}/base\n", "")
    for dry_run in (True, False):
        with pytest.raises(
            MergeError, match="the weights sum to zero, so they cannot be normalised; set normalize: false"
        ):
            merge(write(recipe), tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / ".out.partial").exists()


def test_two_merges_into_one_directory(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    """The second one says so and leaves the first alone, whatever its recipe."""
    second = tmp_path / "second"
    second.mkdir()
    (second / "recipe.yaml").write_text(two(family, "dare_ties"))
    refusals = []

    def meanwhile(done: int, total: int, name: str) -> None:
        for recipe in (second / "recipe.yaml", tmp_path / "recipe.yaml"):
            with pytest.raises(MergeError, match="another process is merging into it") as raised:
                merge(recipe, tmp_path / "out")
            refusals.append(raised)

    merge(write(two(family, "ties")), tmp_path / "out", threads=1, progress=meanwhile)
    assert len(refusals) == 30 and (tmp_path / "out" / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml", "second"]


def test_an_index_that_lies(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    recipe = write(changed(family, tmp_path, tensors(2)))
    directory = tmp_path / "in" / "b"
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    names = {name: "part.safetensors" for name in [*tensors(2), "model.layers.9.x"]}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"layers\.9\.x"):
        merge(recipe, tmp_path / "out")


def test_tied_and_untied_heads(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    """A model whose head is its embedding joins one with a head of its own; the result is untied."""
    weights = tensors(2)
    del weights["lm_head.weight"]
    save(tmp_path / "in" / "b", weights, tie_word_embeddings=True)
    recipe = (
        f"models: [{{model: {tmp_path}/in/b}}, {{model: {family}/a}}]\nmerge_method: linear\nparameters: {{weight: 1}}"
    )
    merge(write(recipe), tmp_path / "out")
    from safetensors.torch import load_file

    got = load_file(tmp_path / "out" / "model.safetensors")
    mean = (weights["model.embed_tokens.weight"].float() + tensors(1)["lm_head.weight"].float()) / 2
    torch.testing.assert_close(got["lm_head.weight"].float(), mean.bfloat16().float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: merge_tensors("linaer", [x]), "did you mean linear"),
        (lambda x: merge_tensors("linear", [x], weight=1, wieght=2), "did you mean weight"),
        (lambda x: merge_tensors("linear", [x]), "needs the parameter weight"),
        (lambda x: merge_tensors("linear", [x, x], weight=[1]), "1 values for 2 models"),
        (lambda x: merge_tensors("linear", [x, x], weight=[1, -1]), "sum to zero"),
        (lambda x: merge_tensors("linear", [x], x, weight=1), "has no base"),
        (lambda x: merge_tensors("ties", [x], weight=1), "needs a base model"),
        (lambda x: merge_tensors("slerp", [x, x], x, t=0.5), "exactly 1 model besides the base, and 2 came"),
        (lambda x: merge_tensors("linear", [x, x[:2]], weight=1), r"tensors\[1\] has shape"),
        (lambda x: merge_tensors("linear", [x.int()], weight=1), "floating point"),
        (lambda x: merge_tensors("della", [x], x, weight=1, density=0.1), "must lie between 0 and 1"),
        (lambda x: merge_tensors("linear", []), "nothing to merge"),
        (lambda x: merge_tensors("multislerp", [x, -x, x - x], weight=[1, 1, 1]), "cancel"),
    ],
)
def test_merge_tensors(call: Callable[[torch.Tensor], object], match: str) -> None:
    with pytest.raises(MergeError, match=match):
        call(torch.arange(1.0, 4.0))


def test_numpy_in_numpy_out() -> None:
    out = merge_tensors("linear", [np.float32([1, 2]), np.float32([3, 6])], weight=1)
    assert isinstance(out, np.ndarray) and out.tolist() == [2, 4]


def test_empty_and_scalar_tensors() -> None:
    assert merge_tensors("ties", [torch.zeros(0, 4)], torch.zeros(0, 4), weight=1, density=0.5).shape == (0, 4)
    assert merge_tensors("linear", [torch.tensor(2.0), torch.tensor(4.0)], weight=1).item() == 3
    assert merge_tensors(
        "della", [torch.ones(3, 1)], torch.zeros(3, 1), weight=1, density=0.5, rescale=False
    ).shape == (3, 1)


def test_a_method_of_ones_own() -> None:
    """Ten lines of Python."""
    from enginepost.merge import METHODS, Param, method

    @method("halfway", base="required", models=(1, 1), parameters=[Param("t", float, 0.5)])
    def halfway(chunk, p, facts):  # type: ignore[no-untyped-def]
        return torch.lerp(chunk.b, chunk.x[0], p["t"])

    try:
        out = merge_tensors("halfway", [torch.full((3,), 4.0)], torch.zeros(3), t=0.25)
        assert out.tolist() == [1, 1, 1]
        with pytest.raises(MergeError, match="already"):
            method("halfway")(halfway)
    finally:
        del METHODS["halfway"]
