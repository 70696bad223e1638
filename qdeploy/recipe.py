"""A recipe: which observer finds the ranges of activations and of weights, with which options. A name or a TOML file.

    name = "tails"
    [activation]
    observer = "percentile"
    percentile = 99.99
    [weight]
    observer = "minmax"

Every observer's name is also a recipe: that observer for the activations, min-max for the weights.

The recipe `default` goes by the grid: codes of the log and float16 grids never need clipping, so their ranges are min-max; scales that
are powers of two are coarse, so weights, too, get the one of least squared error.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qdeploy.errors import InputError, OptionError, unknown_name
from qdeploy.spec import QuantSpec, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An observer by name, and its options."""

    observer: str
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How numbers are chosen. Two recipes with the same content have the same `digest`."""

    name: str
    activation: Choice
    weight: Choice = Choice(observer="minmax")
    summary: str = ""

    def choice(self, role: Role, spec: QuantSpec) -> Choice:
        """The observer for tensors of a role and spec. A constant or a bias is all seen, so its extremes are its range."""
        if role in ("constant", "bias") and spec.grid != "power_of_two":
            return EXTREMES
        if self.name == "default" and spec.grid != "uniform":
            return LEAST_ERROR if spec.grid == "power_of_two" else EXTREMES
        return self.activation if role == "activation" else self.weight

    @property
    def digest(self) -> str:
        """SHA-256 over the content, without name and summary."""
        content = asdict(self)
        del content["name"], content["summary"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


LEAST_ERROR, EXTREMES = Choice(observer="mse"), Choice(observer="minmax")
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="default",
            activation=LEAST_ERROR,
            summary="activation ranges of least squared error, weight ranges by min-max; by the grid where it is not uniform",
        ),
        Recipe(name="fast", activation=EXTREMES, summary="min-max everywhere: the least time"),
    )
}


def recipe_names() -> tuple[str, ...]:
    """All names that `find_recipe` knows: the recipes proper, then the observers."""
    from qdeploy.observer import observers

    return (*RECIPES, *(name for name in observers.names() if name not in RECIPES))


def find_recipe(reference: str) -> Recipe:
    """The recipe called `reference`, or read from the TOML file at that path."""
    from qdeploy.observer import observers

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
    known = ("name", "activation", "weight")
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
    )


def _choice(table: Mapping[str, object], key: str, path: Path, default: Choice) -> Choice:
    from qdeploy.observer import make_observer

    entry = table.get(key)
    if entry is None:
        return default
    if not isinstance(entry, dict) or not isinstance(entry.get("observer"), str):
        allowed, action = 'a table with observer = "NAME" and its options', f"put observer and options below a line [{key}]"
        raise InputError(f"recipe file '{path}': [{key}]", found=repr(entry), allowed=allowed, action=action)
    options = {name: value for name, value in entry.items() if name != "observer"}
    try:
        make_observer(entry["observer"], QuantSpec(signed=True, symmetric=True), options)
    except OptionError as error:
        raise OptionError(f"recipe file '{path}', [{key}]: {error}") from error
    return Choice(observer=entry["observer"], options=options)
