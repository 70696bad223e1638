"""A recipe: how ranges are found, and the steps that follow. `presets` has those with a name, and reads TOML files.

A recipe that goes `by_grid` departs from its observers where the grid asks for it: codes of the log and float16 grids never need
clipping, so their ranges are min-max; scales that are powers of two are coarse, and weights of few bits have outliers to clip, so they
get the range of least error. p = 2.4 for few bits is from BRECQ (Li et al. 2021, its code).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from qdeploy.core.spec import QuantSpec, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An observer by name, and its options."""

    observer: str
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short words, different for different choices.

        >>> Choice(observer="percentile", options={"percentile": 99.9}).label
        'percentile percentile=99.9'
        """
        return " ".join([self.observer, *(f"{name}={value}" for name, value in sorted(self.options.items()))])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChoice:
    """A step by name, and its options."""

    step: str
    options: Mapping[str, object] = field(default_factory=dict)


LEAST_ERROR, EXTREMES = Choice(observer="mse"), Choice(observer="minmax")
FEW_BITS, CLIPPED = 6, Choice(observer="mse", options={"p": 2.4})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How numbers are chosen. Two recipes with the same content have the same `digest`.

    `starts` are ranges of all activations that are tried beside those of `activation`: the steps start from the best of them.
    """

    name: str
    activation: Choice = LEAST_ERROR
    weight: Choice = EXTREMES
    steps: tuple[StepChoice, ...] = ()
    starts: tuple[Choice, ...] = ()
    by_grid: bool = False
    summary: str = ""

    def choice(self, role: Role, spec: QuantSpec) -> Choice:
        """The observer for tensors of a role and spec. A constant or a bias is all seen, so its extremes are its range."""
        if role in ("constant", "bias") and spec.grid != "power_of_two":
            return EXTREMES
        if self.by_grid and spec.grid != "uniform":
            return LEAST_ERROR if spec.grid == "power_of_two" else EXTREMES
        if self.by_grid and role == "weight" and spec.bits <= FEW_BITS:
            return CLIPPED
        return self.activation if role == "activation" else self.weight

    @property
    def digest(self) -> str:
        """SHA-256 over the content, without name and summary."""
        content = asdict(self)
        del content["name"], content["summary"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
