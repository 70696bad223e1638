"""Watch tensors of a float graph while data passes: every observer of every target sees its tensor in one pass.

The observers hang on a copy of the captured graph as `ObserverTap` modules, one after each watched tensor. Rows and their extremes are
computed once a tensor and channel axis, whatever the number of observers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set

from torch import Tensor, fx, nn

from qdeploy.graph import edit, query
from qdeploy.numerics.observer import Mask, Observer, as_rows, finite_minmax, unmasked

FOLDER = "taps"


class ObserverTap(nn.Module):
    """Shows a tensor to its observers."""

    def __init__(self, tensor: str, observers: Sequence[Observer], mask: Mask | None, alone: Set[int]):
        super().__init__()
        self.tensor = tensor
        self.mask = mask
        self.alone = {id(one) for one in observers} & alone
        """Observers of this tensor only."""
        self.by_axis: dict[int | None, list[Observer]] = {}
        for observer in observers:
            self.by_axis.setdefault(observer.spec.axis, []).append(observer)

    def forward(self, x: Tensor) -> None:
        """Update all observers; `InputError` naming the tensor when NaN or Inf is among the values."""
        for axis, observers in self.by_axis.items():
            rows = as_rows(x, axis)
            for alone in (True, False):
                showing = [one for one in observers if (id(one) in self.alone) is alone]
                if showing:
                    seen = rows if self.mask is None else unmasked(rows, self.mask, alone)
                    low, high = finite_minmax(seen, self.tensor)
                    for observer in showing:
                        observer.update(seen, low, high)


class WidthTap(nn.Module):
    """Measures from where to where the finite values of a tensor reach, 0 included."""

    def __init__(self) -> None:
        super().__init__()
        self.low = self.high = 0.0

    def forward(self, x: Tensor) -> None:
        """Take in a batch."""
        values = x.detach()[x.detach().isfinite()]
        if values.numel():
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    @property
    def width(self) -> float:
        """The length of the range."""
        return self.high - self.low


def insert_observers(
    module: fx.GraphModule, observers: Mapping[str, Sequence[Observer]], widths: Mapping[str, WidthTap] | None = None
) -> fx.GraphModule:
    """A copy of the float graph `module` in which the tensors that `observers` and `widths` name show themselves."""
    copy = edit.copy(module)
    copy.add_module(FOLDER, nn.Module())
    times = Counter(id(one) for several in observers.values() for one in several)
    alone = {one for one, count in times.items() if count == 1}
    for node in list(copy.graph.nodes):
        name = query.tensor_name(node)
        taps: list[nn.Module] = []
        if node.op in ("placeholder", "call_function") and name in observers:
            taps.append(ObserverTap(name, observers[name], node.meta.get("masked"), alone))
        if node.op in ("placeholder", "call_function") and name in (widths or {}):
            taps.append((widths or {})[name])
        for tap in taps:
            path = f"{FOLDER}.t{len(copy.get_submodule(FOLDER)._modules)}"
            copy.add_submodule(path, tap)
            with copy.graph.inserting_after(node):
                copy.graph.call_module(path, (node,))
    copy.recompile()
    return copy
