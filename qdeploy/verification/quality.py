"""Whether quantization has destroyed what the model computes: the simulation against the float model, by output and by part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from qdeploy.verification.verdict import Comparison, Output

Array = NDArray[Any]

LEAST_QUALITY = 10.0
"""dB of an output or a part of one, below which quantization has destroyed it."""
MOST_POINTS = 0.05
"""Share of right classes that quantization may cost."""


def destroyed(known: Sequence[Output], plain: Sequence[Array], simulated: Sequence[Array]) -> list[str]:
    """The outputs, or parts of them, of which the simulation keeps less than `LEAST_QUALITY` on the saved samples, a sentence each."""
    compared = Comparison(known)
    compared.add(plain, simulated, None)
    found = []
    for place, output in enumerate(known):
        if plain[place if output.part is None else output.part[0]].dtype.kind != "f":
            continue
        level, most = compared.level(place)
        if most < LEAST_QUALITY:
            what = f"part {output.name}" if output.part is not None else f"output '{output.name}'"
            found.append(f"{what} of the simulation is {level:.1f} dB from the float model, {LEAST_QUALITY:.0f} dB are asked")
    return found


def fewer_right(rates: Sequence[float | None]) -> list[str]:
    """What there is to say where labels show that quantization costs more than `MOST_POINTS` of the right classes.

    `rates` are those of the float model (first) and of the simulation (last), None where there are no labels or classes.
    """
    if len(rates) < 2 or rates[0] is None or rates[-1] is None or rates[0] - rates[-1] <= MOST_POINTS:
        return []
    lost = 100 * (rates[0] - rates[-1])
    return [f"quantization costs {lost:.1f} points of {rates[0]:.2%} right classes, {100 * MOST_POINTS:.0f} points are taken"]
