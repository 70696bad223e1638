"""The recipes that have a name, and recipes from TOML files.

    name = "tails"
    [activation]
    observer = "percentile"
    percentile = 99.99
    [weight]
    observer = "minmax"
    [[start]]
    observer = "minmax"
    [[step]]
    name = "bias_correction"
    samples = 128

Each [[start]] are ranges of all activations that are tried beside those of [activation]. What a file leaves out is as in the recipe
`default`, but with an [activation] of its own no other ranges are tried. Every observer's name is also a recipe: that observer for the
activations, min-max for the weights, no steps.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from qdeploy.core.errors import InputError, OptionError, unknown_name
from qdeploy.core.recipe import EXTREMES, Choice, Recipe, StepChoice
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.observer import make_observer, observers
from qdeploy.recipes.step import make_step

EQUALIZE, RANGES, CORRECT = StepChoice(step="equalize"), StepChoice(step="ranges"), StepChoice(step="bias_correction")
FEW_RANGES = StepChoice(step="ranges", options={"samples": 16})
"""Enough for 8 bits, where it makes little difference (0.3 dB at the most) and is a tenth of the time of a whole calibration."""
STARTS = (EXTREMES, Choice(observer="percentile", options={"percentile": 99.99}))
"""Ranges that are tried beside those of least squared error: some networks have tensors that one kind destroys."""
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="default",
            starts=STARTS,
            steps=(EQUALIZE, FEW_RANGES, CORRECT),
            by_grid=True,
            summary="equalization, ranges of least error behind the layer, bias correction: a few passes",
        ),
        Recipe(name="fast", activation=EXTREMES, summary="min-max everywhere, no steps: the least time"),
        Recipe(name="plain", by_grid=True, summary="ranges of least squared error, no steps: one pass"),
        Recipe(
            name="gptq",
            starts=STARTS,
            steps=(EQUALIZE, RANGES, StepChoice(step="gptq"), CORRECT),
            by_grid=True,
            summary="the default with GPTQ rounding of weights: minutes, for few bits",
        ),
        Recipe(
            name="adaround",
            starts=STARTS,
            steps=(EQUALIZE, RANGES, StepChoice(step="adaround")),
            by_grid=True,
            summary="learned rounding of weights, layer by layer",
        ),
        Recipe(
            name="brecq",
            starts=STARTS,
            steps=(RANGES, StepChoice(step="brecq")),
            by_grid=True,
            summary="learned rounding of weights, then steps of activations, block by block",
        ),
        Recipe(
            name="qdrop",
            starts=STARTS,
            steps=(RANGES, StepChoice(step="qdrop")),
            by_grid=True,
            summary="learned rounding and steps, block by block, with activations quantized at random: the best for few bits",
        ),
        Recipe(
            name="data_free",
            starts=STARTS,
            steps=(EQUALIZE, RANGES, StepChoice(step="bias_correction", options={"statistics": "batch_norm"})),
            by_grid=True,
            summary="the default with biases corrected by batch-norm statistics; made for distilled images, which need no --data",
        ),
    )
}


def recipe_names() -> tuple[str, ...]:
    """All names that `find_recipe` knows: the recipes proper, then the observers."""
    return (*RECIPES, *(name for name in observers.names() if name not in RECIPES))


def find_recipe(reference: str | Recipe) -> Recipe:
    """The recipe called `reference`, or read from the TOML file at that path; a recipe is itself."""
    if isinstance(reference, Recipe):
        return reference
    if reference in RECIPES:
        return RECIPES[reference]
    if reference in observers:
        return Recipe(name=reference, activation=Choice(observer=reference), summary=f"activation ranges by {reference}")
    if reference.endswith(".toml"):
        return _read(Path(reference))
    raise unknown_name("recipe", reference, recipe_names())


def _read(path: Path) -> Recipe:
    if not path.is_file():
        raise InputError(f"no recipe file '{path}'", action="name a TOML file or a recipe: qdeploy recipes")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe file '{path}' is not TOML", found=str(error), action="mend the file") from error
    known = ("name", "activation", "weight", "start", "step")
    for key in table:
        if key not in known:
            raise unknown_name(f"recipe key in '{path}':", key, known)
    name = table.get("name", path.stem)
    if not isinstance(name, str):
        raise InputError(f"recipe file '{path}': name", found=repr(name), allowed="a string", action="put it in quotes")
    default = RECIPES["default"]
    return Recipe(
        name=name,
        activation=_choice(table, "activation", path, default.activation),
        weight=_choice(table, "weight", path, default.weight),
        steps=_steps(table, path) if "step" in table else default.steps,
        starts=_starts(table, path) if "start" in table else () if "activation" in table else default.starts,
        by_grid=not table.keys() & {"activation", "weight"},
    )


def _steps(table: Mapping[str, object], path: Path) -> tuple[StepChoice, ...]:
    entries = table["step"]
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries):
        action = "put the name and options of each below a line [[step]]; step = [] for none"
        raise InputError(f"recipe file '{path}': step", found=repr(entries), allowed="[[step]] tables with a name", action=action)
    made = []
    for position, entry in enumerate(entries, 1):
        options = {name: value for name, value in entry.items() if name != "name"}
        try:
            make_step(entry["name"], options)
        except OptionError as error:
            raise OptionError(f"recipe file '{path}', [[step]] {position}: {error}") from error
        made.append(StepChoice(step=entry["name"], options=options))
    return tuple(made)


def _starts(table: Mapping[str, object], path: Path) -> tuple[Choice, ...]:
    entries = table["start"]
    if not isinstance(entries, list):
        action = "put the observer and its options below a line [[start]]; start = [] for none"
        raise InputError(f"recipe file '{path}': start", found=repr(entries), allowed="[[start]] tables", action=action)
    return tuple(_choice({"start": entry}, "start", path, EXTREMES) for entry in entries)


def _choice(table: Mapping[str, object], key: str, path: Path, default: Choice) -> Choice:
    entry = table.get(key)
    if entry is None:
        return default
    if not isinstance(entry, dict) or not isinstance(entry.get("observer"), str):
        allowed, action = 'a table with observer = "NAME" and its options', f"put observer and options below a line [{key}]"
        raise InputError(f"recipe file '{path}': [{key}]", found=repr(entry), allowed=allowed, action=action)
    options = {name: value for name, value in entry.items() if name != "observer"}
    try:
        make_observer(entry["observer"], QuantSpec.parse("int8 power-of-two"), options)
    except OptionError as error:
        raise OptionError(f"recipe file '{path}', [{key}]: {error}") from error
    return Choice(observer=entry["observer"], options=options)
