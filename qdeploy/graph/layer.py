"""A layer with its parameters, as one noun: what passes that change weights and biases ask, and how they set them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from qdeploy.core.ops import Op
from qdeploy.graph import edit, query


class Layer:
    """A call of an op that takes a weight and a bias, such as a convolution; `weight` and `bias` are the nodes that make them."""

    def __init__(self, module: fx.GraphModule, node: fx.Node, op: Op):
        self.module = module
        self.node = node
        self.op = op
        self.weight = query.argument(node, op.weight)
        self.bias = query.argument(node, op.bias)

    @classmethod
    def at(cls, module: fx.GraphModule, node: fx.Node) -> Layer | None:
        """The layer at `node`, if there is one."""
        op = query.op_of(node) if node.op == "call_function" else None
        return None if op is None or op.weight is None or op.bias is None else cls(module, node, op)

    @property
    def constant(self) -> bool:
        """Whether weight and bias are parameters, and not computed."""
        return self.weight is not None and all(n is None or n.op == "get_attr" for n in (self.weight, self.bias))

    @property
    def rank(self) -> int:
        """The dimensions of its output."""
        made = query.value(self.node)
        assert isinstance(made, Tensor)
        return made.dim()

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a constant layer as they are stored."""
        assert self.weight is not None and self.constant
        weight = query.parameter(self.module, str(self.weight.target))
        return weight, None if self.bias is None else query.parameter(self.module, str(self.bias.target))

    def rewrite(self, weight: Tensor, bias: Tensor) -> None:
        """Give a constant layer these numbers, in the dtype of its weight. Other layers that shared the old ones keep those."""
        assert self.weight is not None
        old, _ = self.parameters()
        path = str(self.weight.target)
        if len(self.weight.users) > 1:
            path = edit.free_path(self.module, path)
        bias_path = self._bias_path(path)
        grad = old.requires_grad
        self.weight = self._put(self.op.weight, path, weight.detach().to(old.dtype).requires_grad_(grad))
        self.bias = self._put(self.op.bias, bias_path, bias.detach().to(old.dtype).requires_grad_(grad))

    def add_bias(self) -> bool:
        """Give a constant layer a bias of zeros, where it has none. Returns whether it had none."""
        if self.bias is not None or not self.constant:
            return False
        made = query.value(self.node)
        assert isinstance(made, Tensor) and self.weight is not None
        weight, _ = self.parameters()
        zeros = torch.zeros(int(made.shape[-1 if self.op.name == "linear" else 1]), dtype=weight.dtype)
        self.bias = self._put(self.op.bias, self._bias_path(str(self.weight.target)), zeros)
        return True

    def untie_bias(self) -> str:
        """Give the layer a copy of its bias, under the path that is returned."""
        assert self.bias is not None
        shared = query.parameter(self.module, str(self.bias.target))
        path = edit.free_path(self.module, str(self.bias.target))
        self.bias = self._put(self.op.bias, path, shared.detach().clone().requires_grad_(shared.requires_grad))
        return path

    def _bias_path(self, weight: str) -> str:
        """Where a bias goes: its own place, or a free one beside the weight."""
        if self.bias is not None and len(self.bias.users) == 1:
            return str(self.bias.target)
        return edit.free_path(self.module, f"{weight.rpartition('.')[0]}.bias".lstrip("."))

    def _put(self, position: int | None, path: str, tensor: Tensor) -> fx.Node:
        """Make `tensor` the parameter at `path`, and the argument at `position`."""
        assert position is not None
        edit.set_parameter(self.module, path, tensor)
        made = edit.parameter_node(self.module.graph, path, tensor, self.node)
        arguments = list(self.node.args) + [None] * (position + 1 - len(self.node.args))
        arguments[position] = made
        self.node.args = tuple(arguments)
        self.node.kwargs = {k: v for k, v in self.node.kwargs.items() if k not in ("weight", "bias")}
        return made


def each_layer(module: fx.GraphModule) -> Iterator[Layer]:
    """All layers, in graph order, for a pass that edits them: each as it then is. The graph is tidied behind the pass."""
    for node in list(module.graph.nodes):
        found = Layer.at(module, node)
        if found is not None:
            yield found
    edit.finish(module)
