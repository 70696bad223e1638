"""The few edits of an FX graph that every pass needs: parameters, names, copies, and the tidying behind a pass."""

from __future__ import annotations

import copy as copying
import warnings
from itertools import accumulate

from torch import Tensor, fx, nn

from qdeploy.core.names import free_attribute
from qdeploy.graph.query import parameter


def set_parameter(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a new parameter at a dotted path, making the modules on the way."""
    module, name = _owner(module, path)
    if name in module._buffers:
        del module._buffers[name]
    setattr(module, name, nn.Parameter(tensor, requires_grad=tensor.requires_grad))


def set_constant(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a tensor at a dotted path, a float one as a parameter, making the modules on the way."""
    if tensor.is_floating_point():
        set_parameter(module, path, tensor)
        return
    module, name = _owner(module, path)
    module.register_buffer(name, tensor)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds what is at `path`, made where it is not there, and the name there."""
    owner, _, name = path.rpartition(".")
    for part in owner.split(".") if owner else ():
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module, name


def parameter_node(graph: fx.Graph, path: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """A `get_attr` node for the parameter at `path`, inserted before `before`."""
    with graph.inserting_before(before):
        node = graph.get_attr(path)
    node.meta["val"] = tensor.detach()
    node.meta["tensor_name"] = path
    return node


def finish(module: fx.GraphModule) -> None:
    """After a pass: drop what nobody reads, and renew the code."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    _drop_unused_submodules(module)
    module.recompile()


def _drop_unused_submodules(module: fx.GraphModule) -> None:
    """What `delete_all_unused_submodules` does, which looks every module up in a list of all that are used."""
    used, called = set[str](), set[str]()
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            used.update(accumulate(path.split("."), "{}.{}".format))
            if node.op == "call_module":
                called.add(path)
    unused = [path for path, _ in module.named_modules() if path and path not in used]
    for path in unused:
        if not any(above in called for above in accumulate(path.split("."), "{}.{}".format)):  # else a part of what is called
            module.delete_submodule(path)


def copy(module: fx.GraphModule, own_parameters: bool = False) -> fx.GraphModule:
    """A copy of the graph to edit; its parameters are those of `module`, or copies of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, while it copies the structure of inputs and outputs
        made = fx.GraphModule(module, copying.deepcopy(module.graph))
    if own_parameters:
        for node in made.graph.find_nodes(op="get_attr"):
            found = parameter(made, str(node.target))
            if isinstance(found, nn.Parameter) and found is parameter(module, str(node.target)):
                set_parameter(made, str(node.target), found.detach().clone().requires_grad_(found.requires_grad))
    return made


def free_path(module: fx.GraphModule, path: str) -> str:
    """`path`, or with a number behind it where something has that name."""
    owner, _, name = path.rpartition(".")
    try:
        holder = module.get_submodule(owner)
    except AttributeError:
        return path
    return f"{owner}.{free_attribute(holder, name)}".lstrip(".")
