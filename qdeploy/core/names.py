"""Names that generated source has for itself."""

from __future__ import annotations

import keyword

GENERATED = frozenset({"self", "torch", "inf", "nan", "NoneType", "device", "fx_pytree", "pytree"})
"""What torch's source of a graph calls by these names; a value of the graph that is called so would hide it."""


def reserved(name: str) -> bool:
    """Whether no value of a graph may be called `name`.

    >>> reserved("None"), reserved("torch"), reserved("relu")
    (True, True, False)
    """
    return keyword.iskeyword(name) or name in GENERATED
