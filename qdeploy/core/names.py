"""Names: those that generated source has for itself, and a number behind one that is taken, without counting through all namesakes."""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Container, Iterable
from weakref import WeakKeyDictionary

GENERATED = frozenset({"self", "torch", "inf", "nan", "NoneType", "device", "fx_pytree", "pytree"})
"""What torch's source of a graph calls by these names; a value of the graph that is called so would hide it."""


def reserved(name: str) -> bool:
    """Whether no value of a graph may be called `name`.

    >>> reserved("None"), reserved("torch"), reserved("relu")
    (True, True, False)
    """
    return keyword.iskeyword(name) or name in GENERATED


class Names(set[str]):
    """Names that are taken."""

    def __init__(self, taken: Iterable[str] = ()):
        super().__init__(taken)
        self._counts: Counter[str] = Counter()

    def free(self, name: str) -> str:
        """`name`, with a number where it is taken; from now on it is.

        >>> names = Names(["relu", "relu_2"])
        >>> [names.free("relu") for _ in range(3)]
        ['relu_1', 'relu_3', 'relu_4']
        """
        unique = name
        while unique in self:  # names are never given back, so that no number below the last one is free
            self._counts[name] += 1
            unique = f"{name}_{self._counts[name]}"
        self.add(unique)
        return unique


_attributes: WeakKeyDictionary[object, Counter[str]] = WeakKeyDictionary()
"""The last numbers behind the names of attributes, by their owner."""


def free_attribute(owner: object, name: str, refused: Container[str] = ()) -> str:
    """`name`, with a number where `owner` has an attribute of that name, or where it is `refused`."""
    if not hasattr(owner, name) and name not in refused:
        return name
    counts = _attributes.setdefault(owner, Counter())
    counts[name] = max(counts[name] - 1, 0)  # the last one may not have been used
    while True:
        counts[name] += 1
        unique = f"{name}_{counts[name]}"
        if not hasattr(owner, unique) and unique not in refused:
            return unique
