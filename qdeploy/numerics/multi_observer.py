"""Several observers of one tensor in one pass; those that keep a histogram share it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from torch import Tensor

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.histogram import HistogramObserver
from qdeploy.numerics.observer import Observer


class MultiObserver(Observer):
    """The observers `named`, the first of which gives the range; `ranges` has those of all."""

    def __init__(self, spec: QuantSpec, named: Mapping[str, Observer]):
        super().__init__(spec)
        self.named = dict(named)

    def seen_as(self, spec: QuantSpec) -> Self:
        other = super().seen_as(spec)
        other.named = {name: one.seen_as(spec) for name, one in self.named.items()}
        return other

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        counting: HistogramObserver | None = None
        for one in self.named.values():
            if isinstance(one, HistogramObserver) and counting is not None:
                one.share(counting)
                continue
            one.update(rows, low, high)
            if isinstance(one, HistogramObserver):
                counting = one

    def range(self) -> tuple[Tensor, Tensor]:
        return next(iter(self.named.values())).range()

    def ranges(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The range of every observer, by its name; without those that refuse this spec, as KL does below 8 bits."""
        found = {}
        for name, one in self.named.items():
            try:
                found[name] = one.range()
            except OptionError:
                continue
        return found
