"""The recipe: defaults, files, overrides, and every mistake with its file, line and key."""

import pathlib

import pytest

from enginepost.recipe import Recipe, RecipeError, changed_keys, load_recipe, parse_overrides

MINIMAL = "model: models/tiny\ndata: rows.jsonl\n"


def write(path: pathlib.Path, text: str) -> str:
    file = path / "my_run.yaml"
    file.write_text(text)
    return str(file)


def mistake(path: pathlib.Path, text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(path, text), overrides or [])
    return str(error.value).replace(str(path), "DIR")


def test_defaults(tmp_path: pathlib.Path) -> None:
    r = load_recipe(write(tmp_path, MINIMAL))
    assert (r.method, r.output, r.data) == ("sft", "runs/my_run", ["rows.jsonl"])
    assert r.lora is not None
    assert (r.lora.r, r.lora.alpha, r.lora.dropout, r.lora.targets) == (16, 32, 0, "all-linear")
    assert (r.peak_learning_rate, r.schedule, r.warmup_ratio, r.clip) == (2e-4, "cosine", 0.03, 1.0)
    assert load_recipe(write(tmp_path, MINIMAL + "lora: null\n")).peak_learning_rate == 1e-5


def test_values_of_every_kind(tmp_path: pathlib.Path) -> None:
    r = load_recipe(
        write(
            tmp_path,
            MINIMAL
            + "validation: 0.1\nlearning_rate: 2e-4\nbetas: [0.9, 0.95]\nepochs: 1\nclip: null\n"
            + "lora:\n  targets: [q_proj, v_proj]\n  rank_pattern: {q_proj: 4}\n",
        )
    )
    assert (r.validation, r.learning_rate, r.betas, r.epochs, r.clip) == (0.1, 2e-4, [0.9, 0.95], 1.0, None)
    assert r.lora is not None and r.lora.targets == ["q_proj", "v_proj"] and r.lora.rank_pattern == {"q_proj": 4}


def test_overrides_reach_into_mappings(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, MINIMAL + "lora:\n  r: 4\n  alpha: 8\n")
    r = load_recipe(file, ["lora.r=8", "max_steps=3", "learning_rate=1e-4", "data=[a.jsonl, b.jsonl]", "clip=null"])
    assert r.lora is not None and (r.lora.r, r.lora.alpha) == (8, 8)
    assert (r.max_steps, r.learning_rate, r.data, r.clip) == (3, 1e-4, ["a.jsonl", "b.jsonl"], None)
    assert load_recipe(file, {"lora.r": 2, "data": pathlib.Path("x")}).data == ["x"]
    assert load_recipe(file, ["lora=null"]).lora is None


def test_a_mapping_is_not_changed_by_overrides() -> None:
    given = {"model": "m", "data": "d", "lora": {"r": 4}}
    assert load_recipe(given, {"lora.r": 8}).lora.r == 8  # type: ignore[union-attr]
    assert given == {"model": "m", "data": "d", "lora": {"r": 4}}


def test_typo_names_file_line_and_nearest_key(tmp_path: pathlib.Path) -> None:
    text = mistake(tmp_path, MINIMAL + "\nlearning_rte: 1e-4\nlora:\n  alfa: 3\n")
    assert "DIR/my_run.yaml:4: learning_rte: unknown key; did you mean learning_rate?" in text
    assert "DIR/my_run.yaml:6: lora.alfa: unknown key; did you mean lora.alpha?" in text
    assert text.index("yaml:4") < text.index("yaml:6")
    assert "the keys are model, data" in mistake(tmp_path, MINIMAL + "zzzzz: 1\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("batch_size: four", "3: batch_size: expected a whole number, got the text 'four'"),
        ("batch_size: 0", "3: batch_size: expected a number of at least 1, got 0"),
        ("batch_size: 1.5", "3: batch_size: expected a whole number, got 1.5"),
        ("batch_size: true", "3: batch_size: expected a whole number, got true"),
        ("packing: 1", "3: packing: expected true or false, got 1"),
        ("method: stf", "3: method: expected sft, pretrain"),
        ("learning_rate: fast", "3: learning_rate: expected a number, got the text 'fast'"),
        ("warmup_ratio: 1.5", "3: warmup_ratio: expected a number below 1"),
        ("validation: 2", "3: validation: expected a fraction of the rows between 0 and 1, or a path"),
        ("lora: 16", "3: lora: expected a mapping of keys, or null, got 16"),
        ("betas: [0.9]", "3: betas: expected a list of two numbers, got a list of 1"),
        ("betas: [0.9, 1.5]", "3: betas.1: expected a number below 1"),
        ("lora: {targets: 3}", '3: lora.targets: expected "all-linear" or a list of module names'),
        ("output: 3", "3: output: expected text, got 3"),
        ("adapter: x\nlora: null", "4: lora: the recipe continues the adapter x, so it cannot train all weights"),
        ("adapter: x\nlora: {r: 4}", "4: lora: the recipe continues the adapter x, so rank, scale and targets are"),
    ],
)
def test_wrong_values(tmp_path: pathlib.Path, line: str, expected: str) -> None:
    assert f"DIR/my_run.yaml:{expected}" in mistake(tmp_path, MINIMAL + line + "\n")


def test_missing_and_empty(tmp_path: pathlib.Path) -> None:
    assert "data: missing; give a file" in mistake(tmp_path, "model: m\n")
    assert "is empty" in mistake(tmp_path, "# nothing\n")
    assert ":1: expected `key: value` lines" in mistake(tmp_path, "- model\n")
    assert "data: expected a path, a glob or a list of them" in mistake(tmp_path, "model: m\ndata: []\n")
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot read the recipe: No such file"):
        load_recipe("nowhere.yaml")


def test_broken_yaml_names_the_line(tmp_path: pathlib.Path) -> None:
    assert "DIR/my_run.yaml:3: not valid YAML" in mistake(tmp_path, MINIMAL + "lora: a: b\n")
    assert "DIR/my_run.yaml:3: model: given twice; the first is at DIR/my_run.yaml:1" in mistake(
        tmp_path, MINIMAL + "model: other\n"
    )
    assert "not valid YAML" in mistake(tmp_path, MINIMAL + "x: !!python/object/apply:os.system [true]\n")


def test_override_mistakes_name_the_override(tmp_path: pathlib.Path) -> None:
    assert mistake(tmp_path, MINIMAL, ["max_steps"]).startswith("override 'max_steps': expected key=value")
    assert mistake(tmp_path, MINIMAL, ["max_step=3"]) == (
        "override max_step=3: max_step: unknown key; did you mean max_steps?"
    )
    assert mistake(tmp_path, MINIMAL + "lora: {r: 4}\n", ["lora.r=x"]) == (
        "override lora.r=x: lora.r: expected a whole number, got the text 'x'"
    )
    with pytest.raises(RecipeError, match="not valid YAML"):
        parse_overrides(["data=[a"])


def test_dump_reads_back(tmp_path: pathlib.Path) -> None:
    r = load_recipe(write(tmp_path, MINIMAL + "lora: {r: 4, alpha_pattern: {q_proj: 2.5}}\nvalidation: v.jsonl\n"))
    assert load_recipe(write(tmp_path, r.dump())) == r
    r = load_recipe(write(tmp_path, MINIMAL + "adapter: runs/x/adapter\n"))
    assert load_recipe(write(tmp_path, r.dump())) == r


def test_changed_keys_ignores_what_alters_no_weight() -> None:
    def recipe(**more: object) -> Recipe:
        return load_recipe({"model": "m", "data": "d", **more})

    assert changed_keys(recipe(), recipe(save_every=7, keep_last=9, log_every=3, tensorboard=True)) == []
    assert changed_keys(recipe(), recipe(seed=1)) == ["seed"]
    assert changed_keys(recipe(lora={"r": 4}), recipe(lora={"r": 8})) == ["lora.r"]
    assert changed_keys(recipe(), recipe(lora=None)) == ["lora"]


@pytest.mark.parametrize("name", ["sft_lora", "sft_full", "pretrain"])
def test_example_recipes_are_valid(name: str) -> None:
    file = pathlib.Path(__file__).parent.parent / "examples" / "recipes" / f"{name}.yaml"
    r = load_recipe(file)
    assert r.output == f"runs/{name}" and (r.lora is None) == (name != "sft_lora")
    assert f"enginepost train examples/recipes/{name}.yaml" in file.read_text()
