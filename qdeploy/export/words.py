"""Names without spaces, for targets whose files are split at them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import onnx

from qdeploy.core.spec import Encoding
from qdeploy.export.onnx_file import tensor_names


def without_spaces(names: Iterable[str]) -> Callable[[str], str]:
    """How to write names: each space as so many underlines, one where that does, that no two of `names` become the same.

    >>> join = without_spaces(["a b", "a_b"])
    >>> join("a b"), join("a_b")
    ('a__b', 'a_b')
    """
    known, width = set(names), 1
    while len({re.sub(r"\s", "_" * width, name) for name in known}) < len(known):
        width += 1
    return lambda name: re.sub(r"\s", "_" * width, name)


def rename(data: bytes, join: Callable[[str], str]) -> bytes:
    """An ONNX file with other names of its tensors and nodes."""
    model = onnx.load_from_string(data)
    graph = model.graph
    for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        named.name = join(named.name)
    for node in graph.node:
        node.input[:] = [join(name) for name in node.input]
        node.output[:] = [join(name) for name in node.output]
    made: bytes = model.SerializeToString(deterministic=True)
    return made


def names_of(models: Iterable[bytes]) -> set[str]:
    """The names of all tensors and nodes of ONNX files."""
    found: set[str] = set()
    for model in map(onnx.load_from_string, models):
        found |= tensor_names(model) | {node.name for node in model.graph.node}
    return found


def renamed(encodings: Sequence[Encoding], join: Callable[[str], str]) -> tuple[Encoding, ...]:
    """The same encodings under other names."""
    return tuple(Encoding(tensor=join(e.tensor), role=e.role, spec=e.spec, scale=e.scale, zero_point=e.zero_point) for e in encodings)


def note(mapping: dict[str, str]) -> list[str]:
    """Which inputs and outputs have other names in the file; empty where all have their own."""
    pairs = ", ".join(f"'{given}' is '{name}'" for given, name in mapping.items())
    return [f"the target splits names at spaces, so that in its files {pairs}"] if mapping else []
