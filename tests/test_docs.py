"""The pages say what is true: every recipe key is documented, links lead somewhere, tables are those of the committed results."""

import pathlib
import re

import pytest

from bench import predicted, tables
from enginepost.recipe import Lora, Recipe, load_recipe, recipe_class

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_recipe_key_is_documented():
    page = (ROOT / "docs" / "recipe.md").read_text()
    missing = [key for key in [*Recipe.model_fields, *Lora.model_fields] if f"`{key}`" not in page]
    assert not missing


def test_every_key_of_the_online_methods_is_documented():
    page = (ROOT / "docs" / "rl.md").read_text()
    for method in ("grpo", "rloo", "ppo", "gkd"):
        assert not [
            key
            for key in recipe_class(method).model_fields
            if key not in Recipe.model_fields and f"`{key}`" not in page
        ]


def test_every_key_of_the_offline_methods_is_documented():
    page = (ROOT / "docs" / "preference.md").read_text()
    for method in ("dpo", "kto", "orpo", "simpo", "cpo", "reward", "prm", "distill"):
        own = recipe_class(method).model_fields.keys() - Recipe.model_fields.keys()
        assert not [key for key in own if f"`{key}`" not in page]
        assert (ROOT / "examples" / "recipes" / f"{method}.yaml").exists()


TRAINING = [p for p in sorted((ROOT / "examples" / "recipes").glob("*.yaml")) if not p.name.startswith("merge_")]


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda p: p.name)
def test_example_recipes_are_valid(recipe):
    load_recipe(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_predicted_table_is_what_the_planner_says():
    assert "\n".join(predicted.table()) + "\n" in (ROOT / "docs/memory.md").read_text()


def test_tables_are_those_of_the_committed_results():
    assert tables.main(check=True) == 0
