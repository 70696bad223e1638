"""Fold batch normalization into the convolution or linear layer before it, in float64.

    y = (W x + b - mean) * g + beta,  g = gamma / sqrt(var + eps)     becomes     W' = W g,  b' = (b - mean) g + beta

with g along the output channels of W. (Jacob et al. 2018, section 3.2; for inference.) Every folded layer gets a weight and a
bias of its own, so that a layer that is called twice, each time before another batch norm, folds as well.

What the batch norm knew of its output stays: `meta["statistics"]` of the layer is then `(beta, |gamma|)`, mean and standard deviation
of each channel before any activation, float64 `[C]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from qdeploy.graph import edit, query
from qdeploy.graph.layer import Layer, each_layer


def fold(module: fx.GraphModule, with_biases: bool) -> None:
    """Leave no batch norm, and give every layer a bias of its own; with `with_biases` also where it has none."""
    fold_batch_norms(module)
    plain_batch_norms(module)
    if with_biases:
        add_biases(module)
    untie_biases(module)


class BatchNorm:
    """A batch norm in inference: its numbers are constants, float64 `[C]`, and its output is `gain * x + shift`."""

    def __init__(self, module: fx.GraphModule, node: fx.Node):
        self.module = module
        self.node = node
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.source = source
        gamma, beta, mean, variance = (
            query.parameter(module, str(n.target)).detach().double() if isinstance(n, fx.Node) else None for n in node.args[1:5]
        )
        assert mean is not None and variance is not None
        # aten.batch_norm ends in (momentum, eps, cudnn); the functional form ends in (momentum, eps)
        eps = node.args[7] if str(node.target) == "aten.batch_norm.default" else node.args[-1]
        assert isinstance(eps, float)
        gain = (variance + eps).rsqrt()
        self.gain = gain if gamma is None else gain * gamma
        self.shift = -mean * self.gain if beta is None else beta - mean * self.gain
        mean_after = torch.zeros_like(self.gain) if beta is None else beta.clone()
        self.statistics = mean_after, torch.ones_like(self.gain) if gamma is None else gamma.abs()
        """Mean and standard deviation of its output."""

    def replace(self, made: fx.Node) -> None:
        """Put `made` in its place; the functional form returns a tuple, of which the parts are taken."""
        for user in list(self.node.users):
            if str(user.target) == "<built-in function getitem>":
                user.replace_all_uses_with(made)
                self.node.graph.erase_node(user)
        self.node.replace_all_uses_with(made)
        self.node.graph.erase_node(self.node)


def _batch_norms(module: fx.GraphModule) -> Iterator[BatchNorm]:
    """All whose numbers are constants, for a pass that replaces them; the graph is tidied behind it."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and query.op_of(node).name == "batch_norm" and _has_statistics(node):
            yield BatchNorm(module, node)
    edit.finish(module)


def _has_statistics(norm: fx.Node) -> bool:
    return all(not isinstance(n, fx.Node) or n.op == "get_attr" for n in norm.args[1:5]) and isinstance(norm.args[3], fx.Node)


def fold_batch_norms(module: fx.GraphModule) -> int:
    """Fold every batch norm that is the only reader of a layer with constant weights. Returns the number folded."""
    return sum(_fold(norm) for norm in _batch_norms(module))


def _fold(norm: BatchNorm) -> bool:
    layer = Layer.at(norm.module, norm.source)
    if layer is None or not layer.constant or len(norm.source.users) != 1:
        return False
    weight, bias = layer.parameters()
    grouped_transpose = layer.op.channel_axis == 1 and weight.shape[1] != norm.gain.numel()
    if grouped_transpose or (layer.op.name == "linear" and layer.rank != 2):
        return False
    shape = [-1 if axis == layer.op.channel_axis else 1 for axis in range(weight.dim())]
    old_bias = torch.zeros_like(norm.shift) if bias is None else bias.detach().double()
    layer.rewrite(weight.detach().double() * norm.gain.reshape(shape), old_bias * norm.gain + norm.shift)
    norm.source.meta["statistics"] = norm.statistics
    norm.replace(norm.source)
    return True


def plain_batch_norms(module: fx.GraphModule) -> int:
    """Make of every batch norm that is left a per-channel scale and shift that targets compute. Returns their number.

    Where only convolutions without padding read it, it is folded forward into their weights:

        W (g x + h) + b = (W g) x + (b + W h),      with g and h along the input channels of W

    Else it becomes a depthwise convolution with kernels of one element, or, on `[N, C]`, a product and a sum.
    """
    count = 0
    for norm in _batch_norms(module):
        if not _fold_forward(norm):
            _make_plain(norm)
        count += 1
    return count


def _fold_forward(norm: BatchNorm) -> bool:
    """Fold `norm` into the convolutions behind it, if they alone read it and add no zeros at the border."""
    (made,) = norm.node.users if str(next(iter(norm.node.users)).target) == "<built-in function getitem>" else (norm.node,)
    readers = [Layer.at(norm.module, reader) for reader in made.users]
    behind = [layer for layer in readers if layer is not None and _takes_forward(layer, made)]
    if not readers or len(behind) < len(readers):
        return False
    for layer in behind:
        weight, bias = layer.parameters()
        wide = weight.detach().double()
        groups = len(norm.gain) // wide.shape[1]
        along = [groups, 1, wide.shape[1], *[1] * (wide.dim() - 2)]
        parts = wide.view(groups, -1, *wide.shape[1:])
        added = (parts * norm.shift.view(along)).sum(tuple(range(2, parts.dim()))).flatten()
        added += 0 if bias is None else bias.detach().double()
        layer.rewrite((parts * norm.gain.view(along)).view_as(wide), added)
    norm.replace(norm.source)
    return True


def _takes_forward(layer: Layer, source: fx.Node) -> bool:
    """Whether `layer` is a convolution of constant weights that reads `source`, and no zeros beside it."""
    node = layer.node
    if node.args[0] is not source or not str(node.target).endswith(("conv1d.default", "conv2d.default")):
        return False
    padding = node.args[4] if len(node.args) > 4 else node.kwargs.get("padding", 0)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return not padded and layer.constant


def _make_plain(norm: BatchNorm) -> None:
    before = query.value(norm.source)
    assert isinstance(before, Tensor)
    module, node, dtype, sides = norm.module, norm.node, before.dtype, before.dim() - 2
    name = query.tensor_name(node)
    places = [edit.free_path(module, f"{name}.{part}") for part in ("scale", "shift")]
    tensors = [norm.gain.to(dtype).view(-1, *[1] * (sides + 1) if sides else []), norm.shift.to(dtype)]
    nodes = []
    for place, tensor in zip(places, tensors, strict=True):
        edit.set_parameter(module, place, tensor)
        nodes.append(edit.parameter_node(module.graph, place, tensor, node))
    with module.graph.inserting_before(node):
        if sides:
            conv = getattr(torch.ops.aten, f"conv{sides}d").default
            made = module.graph.call_function(conv, (norm.source, *nodes, [1] * sides, [0] * sides, [1] * sides, len(norm.gain)))
        else:
            scaled = module.graph.call_function(torch.ops.aten.mul.Tensor, (norm.source, nodes[0]))
            scaled.meta = dict(norm.source.meta) | {"tensor_name": f"{name}.scaled"}
            made = module.graph.call_function(torch.ops.aten.add.Tensor, (scaled, nodes[1]))
    made.meta = dict(node.meta) | {"val": before, "statistics": norm.statistics}
    norm.replace(made)


def add_biases(module: fx.GraphModule) -> int:
    """Give every layer with constant weights a bias, of zeros where it had none. Returns the number added."""
    return sum(layer.add_bias() for layer in each_layer(module))


def untie_biases(module: fx.GraphModule) -> int:
    """Give every layer a bias of its own, since an integer bias depends on its layer's input. Returns the number of copies."""
    count = 0
    seen: set[str] = set()
    for layer in each_layer(module):
        if layer.bias is None or layer.bias.op != "get_attr":
            continue
        if str(layer.bias.target) in seen:
            seen.add(layer.untie_bias())
            count += 1
        seen.add(str(layer.bias.target))
    return count
