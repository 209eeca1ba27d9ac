"""Recipes: every form of input, and errors that name the nearest right thing."""

from pathlib import Path

import pytest

from recast.passes.forms.form import Form
from recast.passes.recipe import Recipe, Rule
from recast.patterns.errors import FormError, RecipeError

FULL = {
    "default": "int8",
    "rules": [
        {"match": "*.query", "form": "low_rank(ratio=0.5) | int8"},
        {"match": "re:head\\..*", "form": "dense", "kind": "linear"},
    ],
    "exclude": ["*.classifier"],
    "compute_dtype": "bf16",
    "budget": 0.4,
    "candidates": ["int8", "int4(group=64)"],
    "min_coverage": 0.9,
    "allow_larger": True,
    "tied": True,
}  # fmt: skip


def test_text_form_recipe_and_dict_say_the_same(tmp_path: Path) -> None:
    form = Form.parse("int4(group=32) + low_rank(rank=4)")
    file = tmp_path / "recipe.yaml"
    file.write_text("default: int4(group=32) + low_rank(rank=4)\n")
    bare = tmp_path / "bare.yml"
    bare.write_text(f"{form}\n")
    wanted = Recipe(default=form)
    for given in (str(form), form, wanted, {"default": str(form)}, {"default": form}, file, str(file), bare):
        assert Recipe.of(given) == wanted


def test_to_dict_and_text_are_read_back(tmp_path: Path) -> None:
    recipe = Recipe.of(FULL)
    assert Recipe.of(recipe.to_dict()) == recipe
    file = tmp_path / "full.yaml"
    file.write_text(str(recipe))
    assert Recipe.of(file) == recipe
    assert recipe.to_dict() == FULL
    assert Recipe().to_dict() == {}


@pytest.mark.parametrize(("text", "share"), [(0.4, 0.4), ("0.4x", 0.4), ("40%", 0.4), (1, 1.0)])
def test_shares(text: object, share: float) -> None:
    assert Recipe.of({"budget": text}).budget == pytest.approx(share)


def test_first_rule_that_matches_decides_and_exclusion_goes_first() -> None:
    recipe = Recipe.of(FULL)
    assert str(recipe.form_for("layer.0.query")[0]) == "low_rank(ratio=0.5) | int8"
    assert recipe.form_for("head.3") == (Form.parse("dense"), "rule 're:head\\..*'")
    assert recipe.form_for("overhead.3") == (Form.parse("int8"), "default")
    assert recipe.form_for("layer.classifier") == (None, "excluded by '*.classifier'")
    assert Recipe(rules=(Rule("*.a", None),)).form_for("x.a") == (None, "rule '*.a'")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"defualt": "int8"}, "unknown key 'defualt' in recipe; did you mean 'default'?"),
        ({"rules": [{"match": "*", "frm": "int8"}]}, r"unknown key 'frm' in rules\[0\]; did you mean 'form'?"),
        ({"rules": [{"match": "*"}]}, "has no 'form'; write form: dense"),
        ({"rules": [{"match": "*", "form": "int8", "kind": "liner"}]}, "kind 'liner' .* did you mean 'linear'"),
        ({"rules": "int8"}, "'rules' in recipe must be a list, not str"),
        ({"rules": ["int8"]}, r"rules\[0\] must be a mapping"),
        ({"rules": [{"match": 3, "form": "int8"}]}, "must be a glob or 're:' pattern"),
        ({"rules": [{"match": "re:(", "form": "int8"}]}, r"'re:\(' is not a regular expression"),
        ({"exclude": "*"}, "'exclude' in recipe must be a list, not str"),
        ({"default": 8}, "must be a form's text such as int8, not 8"),
        ({"compute_dtype": "bf17"}, "compute_dtype 'bf17' .* did you mean 'bf16'"),
        ({"budget": "lots"}, "budget in recipe must be a share such as 0.4"),
        ({"budget": 0}, "budget in recipe must be a share"),
        ({"min_coverage": 1.5}, "min_coverage in recipe must be a share"),
        ({"tied": "yes"}, "tied in recipe must be true or false, not 'yes'"),
        ("missing.yaml", "'missing.yaml' cannot be read: No such file"),
        (8, "a form's text, a path to a YAML file, a dict, a Form or a Recipe is needed, not 8"),
        (None, "is needed, not None"),
    ],
)  # fmt: skip
def test_mistakes_are_named(given: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.of(given)  # type: ignore[arg-type]


def test_a_mistyped_form_is_a_form_error_with_its_place() -> None:
    with pytest.raises(FormError, match="int9"):
        Recipe.of("int9")
    with pytest.raises(FormError, match=r"in the recipe, rules\[0\]"):
        Recipe.of({"rules": [{"match": "*", "form": "int9"}]})


@pytest.mark.parametrize(
    ("text", "message"), [("- int8", "holds list"), ("a: [", "not valid YAML"), ("\xff", "int8|form|known")]
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises((RecipeError, FormError), match=message):
        Recipe.of(file)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not text"):
        Recipe.of(file)
