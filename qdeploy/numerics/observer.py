"""What an observer is: statistics of a stream of tensors, in bounded memory, from which a range follows.

An observer never computes a scale; `arith.choose_scale` does that from the range. The observers themselves are the files of
`calibration/`, one each, found by name in `observers`.
"""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qdeploy.core.errors import InputError, OptionError, unknown_name
from qdeploy.core.registry import Registry
from qdeploy.core.spec import QuantSpec


class Observer(ABC):
    """Statistics of a stream. Subclasses take `spec` and their own keyword options, and register with `@observer(name)`.

    What `update` gathers does not depend on `spec`; only `range` does, which therefore calls `check` as well.
    """

    uniform_only: ClassVar[str] = ""
    """Why it is for codes with even steps only, with `{}` in place of another scheme; empty where it is for all."""

    def __init__(self, spec: QuantSpec):
        self.spec = spec
        self.check()

    def check(self) -> None:
        """`OptionError` where there is no range for `spec`."""
        if self.uniform_only and not self.spec.linear:
            raise OptionError(f"observer {self.uniform_only.format(self.spec.describe())}", action="use minmax")

    def seen_as(self, spec: QuantSpec) -> Self:
        """The same statistics, for the range of another spec."""
        other = copy.copy(self)
        other.spec = spec
        return other

    @abstractmethod
    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in one batch: float32 `[C, N]`, C = 1 for a per-tensor spec, finite; `low` and `high` `[C]` are its row extremes."""

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """`(low, high)`, float64 `[C]` each, of what was seen so far."""


MASK = -1e4
"""What a captured graph adds to masked places, or puts there: a softmax makes exp(-1e4) = 0 of it."""
MARGIN = 16.0
"""How far below the least other value a masked place is seen: exp(-16) is 1e-7."""
_CERTAIN = -1e3
"""No number of a model is as low."""
WIDE = 128.0
"""That of a tensor that is a mask and nothing else: it stays far below all that it is added to, and takes no code from anything."""


@dataclass(frozen=True, slots=True)
class Mask:
    """What a tensor with masked places has there: about `level`, by which they are told; a positive one where high numbers hide.

    They are seen `margin` beyond all other values.
    """

    level: float = MASK
    margin: float = MARGIN


observers: Registry[type[Observer]] = Registry("observer", "qdeploy.calibration")


def observer(name: str) -> Any:
    """Class decorator: register an `Observer` under `name`."""
    return lambda cls: observers.add(name, cls)


def observer_options(name: str) -> dict[str, object]:
    """The options of the observer `name` with their defaults."""
    parameters = inspect.signature(observers[name].__init__).parameters
    return {p.name: p.default for p in parameters.values() if p.name not in ("self", "spec")}


def make_observer(name: str, spec: QuantSpec, options: Mapping[str, object]) -> Observer:
    """The observer `name` for `spec`; `OptionError` for an option that it does not have or a value that it refuses."""
    check_options(f"observer '{name}'", options, observer_options(name))
    return observers[name](spec, **options)


def check_options(whose: str, options: Mapping[str, object], known: Mapping[str, object]) -> None:
    """`OptionError` for one of `options` that is not `known`, with the nearest name."""
    for option in options:
        if option not in known:
            if not known:
                raise OptionError(f"{whose} has no options", found=option, action="leave it out")
            raise unknown_name(f"option of {whose}:", option, known)


def as_rows(x: Tensor, axis: int | None) -> Tensor:
    """`x` as `[C, N]` along the channel `axis`, or `[1, N]`."""
    x = x.detach()
    if axis is not None:
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)
    # statistics do not depend on the order, and in the order of the memory nothing is copied
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(1, -1)


def unmasked(rows: Tensor, mask: Mask = Mask(), alone: bool = True) -> Tensor:
    """`rows` `[C, N]` of a tensor with masked places: there, the least of all others less the margin of `mask`.

    The range then ends where a softmax makes next to nothing of a masked place, which saturates; the others keep their resolution.
    `alone`: no other tensor has the same encoding, so that one of two values, mask or none, may be as far apart as is safe. A level
    that numbers of a model may have, too, is taken for a mask only where there is a gap between masked places and others.
    """
    if mask.level > 0:
        return -unmasked(-rows, Mask(-mask.level, mask.margin), alone)
    hidden = rows <= mask.level / 2
    if not bool(hidden.any()):
        return rows
    least, greatest = float(torch.where(hidden, torch.inf, rows).amin()), float(torch.where(hidden, -torch.inf, rows).amax())
    if mask.level > _CERTAIN and not least - float(torch.where(hidden, rows, -torch.inf).amax()) >= mask.margin < math.inf > least:
        return rows
    margin = max(WIDE, mask.margin) if alone and least == greatest else mask.margin
    return torch.where(hidden, (least if math.isfinite(least) else 0.0) - margin, rows)


def finite_minmax(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Per-row `(low, high)`; `InputError` naming the tensor when NaN or Inf is among the values."""
    if rows.shape[0] == 1:
        low, high = (v.reshape(1) for v in torch.aminmax(rows))
        finite = math.isfinite(low.item()) and math.isfinite(high.item())
    else:
        low, high = torch.aminmax(rows, dim=1)
        finite = bool(torch.isfinite(low).all() and torch.isfinite(high).all())
    if not finite:
        raise InputError(
            f"tensor '{name}' holds NaN or Inf during calibration",
            action="check the calibration data and the float model on it",
        )
    return low, high
