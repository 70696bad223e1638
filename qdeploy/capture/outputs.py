"""What a captured graph returns: its tensors, and the keys by which the user's model returns them."""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qdeploy.core.errors import CaptureError
from qdeploy.core.names import Names
from qdeploy.graph import query


def check(module: fx.GraphModule) -> None:
    """`CaptureError` unless a floating-point tensor is among what is returned, and nothing but tensors and constants is."""
    (output,) = module.graph.find_nodes(op="output")
    for node in pytree.tree_leaves(output.args):
        if isinstance(node, fx.Node) and not isinstance(query.value(node), Tensor):
            found = f"{type(query.value(node)).__name__} '{node.name}'"
            raise CaptureError("the model returns a number that depends on its inputs", found=found, action="return tensors only")
    if not any(query.is_float(node) for node in query.outputs(module.graph)):
        raise CaptureError("the model returns no floating-point tensor", action="return the tensors to be deployed")


def keys(module: fx.GraphModule, taken: Set[str], of_file: bool = False) -> dict[fx.Node, str]:
    """The key of every tensor that is returned under one, the first of several: keys and places on the way, such as `past.0`.

    Numbers are places, unless they are names of a file. Names that are `taken` get `_output` behind them. All keys are noted at the
    graph's output, for `names`.
    """
    (output,) = module.graph.find_nodes(op="output")
    codegen = module.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, fx.graph._PyTreeCodeGen) else None
    leaves = pytree.tree_leaves(output.args)
    paths = list(_paths(spec)) if spec is not None else [()] * len(leaves)
    returned: list[str | None] = []
    found: dict[fx.Node, str] = {}
    used: set[str] = set()
    for node, path in zip(leaves, paths, strict=True):
        if not isinstance(node, fx.Node):
            continue
        name = ".".join(path)
        keyed = (of_file or any(not part.isdecimal() for part in path)) and name not in used
        returned.append(name + "_output" * (name in taken) if keyed else None)
        if keyed and node not in found:
            found[node] = str(returned[-1])
            used.add(found[node])
    output.meta["keys"] = returned
    return found


def names(module: fx.GraphModule) -> list[str]:
    """Names of the model outputs: those of the tensors returned, or new ones for what is returned twice or is an input as well."""
    (output,) = module.graph.find_nodes(op="output")
    taken = Names(query.tensor_name(node) for node in module.graph.nodes)
    found: dict[str, None] = {}
    for node, key in zip(query.outputs(module.graph), output.meta["keys"], strict=True):
        name = query.tensor_name(node)
        alias = name in found or node.op != "call_function"
        found[taken.free(key or f"{name}_output") if alias else name] = None
    return list(found)


def _paths(spec: pytree.TreeSpec) -> Iterator[tuple[str, ...]]:
    """The way to every leaf."""
    if spec.is_leaf():
        yield ()
        return
    children = spec.children()
    for part, child in zip(_parts(spec, len(children)), children, strict=True):
        for rest in _paths(child):
            yield (part, *rest)


def _parts(spec: pytree.TreeSpec, count: int) -> list[str]:
    """What the children of a container are called: keys of dicts, fields of tuples and dataclasses, else their places."""
    context = spec.context
    fields = getattr(context, "_fields", None)  # of a named tuple
    if fields is None and isinstance(context, list | tuple):
        first = context[0] if context and isinstance(context[0], list | tuple) else context  # a dataclass has its None fields beside
        fields = first if all(isinstance(part, str | int) for part in first) else None
    return [str(part) for part in fields] if fields is not None and len(fields) == count else [str(n) for n in range(count)]
