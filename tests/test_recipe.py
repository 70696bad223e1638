"""Recipes: the names, and TOML files good and bad."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qdeploy.core.errors import InputError, OptionError
from qdeploy.core.recipe import Choice, Recipe
from qdeploy.numerics.observer import observers
from qdeploy.recipes.presets import RECIPES, find_recipe, recipe_names


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_recipe_and_every_observer_is_a_name():
    names = recipe_names()
    assert set(names) == {*RECIPES, *observers.names()}
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", recipe_names())
def test_a_name_finds_its_recipe(name: str):
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.summary
    assert recipe.activation.observer in observers and recipe.weight.observer in observers


@pytest.mark.parametrize("name", observers.names())
def test_an_observers_name_is_that_observer_for_the_activations_and_minmax_for_the_weights(name: str):
    assert find_recipe(name).activation == Choice(observer=name)
    assert find_recipe(name).weight == Choice(observer="minmax")


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(OptionError, match="did you mean 'default'"):
        find_recipe("defualt")


def test_a_toml_file_sets_names_observers_and_options(tmp_path: Path):
    text = 'name = "schwänze"\n[activation]\nobserver = "percentile"\npercentile = 99.9\n[weight]\nobserver = "mse"\n'
    recipe = find_recipe(written(tmp_path, text))
    assert recipe.name == "schwänze"
    assert recipe.activation == Choice(observer="percentile", options={"percentile": 99.9})
    assert recipe.weight == Choice(observer="mse")


def test_what_a_toml_file_leaves_out_is_as_in_the_default_recipe(tmp_path: Path):
    recipe = find_recipe(written(tmp_path, ""))
    assert recipe == replace(RECIPES["default"], name="mine", summary="")
    assert recipe.digest == RECIPES["default"].digest


BAD = {
    "unknown key": ('[activations]\nobserver = "mse"', "did you mean 'activation'"),
    "name that is no string": ("name = 3", "allowed: a string"),
    "table that is a string": ('activation = "mse"', r"\[activation\].*observer = "),
    "table without an observer": ("[weight]\nbits = 3", r"\[weight\]"),
    "observer that is no string": ("[weight]\nobserver = 3", r"\[weight\]"),
    "unknown observer": ('[activation]\nobserver = "percentil"', "did you mean 'percentile'"),
    "unknown option": ('[activation]\nobserver = "percentile"\npercentil = 99.0', "did you mean 'percentile'"),
    "option where there is none": ('[activation]\nobserver = "minmax"\npercentile = 99.0', "has no options"),
    "option out of range": ('[activation]\nobserver = "percentile"\npercentile = 101.0', "50 < percentile <= 100"),
    "option of the wrong type": ('[activation]\nobserver = "percentile"\npercentile = "high"', "50 < percentile <= 100"),
    "option that is a date": ('[activation]\nobserver = "ema"\nmomentum = 2020-01-01', "momentum"),
    "broken TOML": ("[activation", "is not TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_toml_file_is_refused_with_its_path_for_its(case: str, tmp_path: Path):
    text, message = BAD[case]
    path = written(tmp_path, text)
    with pytest.raises((InputError, OptionError), match=message) as caught:
        find_recipe(path)
    assert path in str(caught.value)


def test_a_recipe_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no recipe file"):
        find_recipe(str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not TOML"):
        find_recipe(str(tmp_path / "binary.toml"))


def test_the_digest_ignores_name_and_summary_and_nothing_else():
    base = Recipe(name="a", activation=Choice(observer="percentile", options={"percentile": 99.0}))
    assert replace(base, name="b", summary="other words").digest == base.digest
    changed = [
        replace(base, activation=Choice(observer="percentile", options={"percentile": 99.1})),
        replace(base, activation=Choice(observer="percentile")),
        replace(base, activation=Choice(observer="minmax", options={"percentile": 99.0})),
        replace(base, weight=Choice(observer="mse")),
    ]
    assert len({base.digest, *(recipe.digest for recipe in changed)}) == 5


def test_the_digest_does_not_depend_on_the_order_of_options():
    options = {"a": 1, "b": 2}
    one, two = (
        Recipe(name="r", activation=Choice(observer="o", options=dict(items))) for items in (options.items(), reversed(options.items()))
    )
    assert one.digest == two.digest
