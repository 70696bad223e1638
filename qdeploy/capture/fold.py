"""Fold batch normalization into the convolution or linear layer before it, in float64.

    y = (W x + b - mean) * g + beta,  g = gamma / sqrt(var + eps)     becomes     W' = W g,  b' = (b - mean) g + beta

with g along the output channels of W. (Jacob et al. 2018, section 3.2; for inference.) Every folded layer gets a weight and a
bias of its own, so that a layer that is called twice, each time before another batch norm, folds as well.

What the batch norm knew of its output stays: `meta["statistics"]` of the layer is then `(beta, |gamma|)`, mean and standard deviation
of each channel before any activation, float64 `[C]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qdeploy.graph import edit, query


def fold_batch_norms(module: fx.GraphModule) -> int:
    """Fold every batch norm that is the only reader of a layer with constant weights. Returns the number folded."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and query.op_of(node).name == "batch_norm":
            count += _fold(module, node)
    edit.finish(module)
    return count


def plain_batch_norms(module: fx.GraphModule) -> int:
    """Make of every batch norm that is left a per-channel scale and shift that targets compute. Returns their number.

    Where only convolutions without padding read it, it is folded forward into their weights:

        W (g x + h) + b = (W g) x + (b + W h),      with g and h along the input channels of W

    Else it becomes a depthwise convolution with kernels of one element, or, on `[N, C]`, a product and a sum.
    """
    count = 0
    for norm in list(module.graph.nodes):
        if norm.op == "call_function" and query.op_of(norm).name == "batch_norm" and _has_statistics(norm):
            if not _fold_forward(module, norm):
                _make_plain(module, norm)
            count += 1
    edit.finish(module)
    return count


def _has_statistics(norm: fx.Node) -> bool:
    return all(not isinstance(n, fx.Node) or n.op == "get_attr" for n in norm.args[1:5]) and isinstance(norm.args[3], fx.Node)


def _fold_forward(module: fx.GraphModule, norm: fx.Node) -> bool:
    """Fold `norm` into the convolutions behind it, if they alone read it and add no zeros at the border."""
    (made,) = norm.users if str(next(iter(norm.users)).target) == "<built-in function getitem>" else (norm,)
    layers = list(made.users)
    if not layers or not all(_takes_forward(layer, made) for layer in layers):
        return False
    gain, shift = _affine(module, norm)
    for layer in layers:
        op = query.op_of(layer)
        weight, bias = query.argument(layer, op.weight), query.argument(layer, op.bias)
        assert op.weight is not None and op.bias is not None and weight is not None
        old = query.parameter(module, str(weight.target))
        wide = old.detach().double()
        groups = len(gain) // wide.shape[1]
        along = [groups, 1, wide.shape[1], *[1] * (wide.dim() - 2)]
        parts = wide.view(groups, -1, *wide.shape[1:])
        inner = tuple(range(2, parts.dim()))
        added = (parts * shift.view(along)).sum(inner).flatten()
        added += 0 if bias is None else query.parameter(module, str(bias.target)).detach().double()
        path = str(weight.target) if len(weight.users) == 1 else _free_path(module, str(weight.target))
        own = bias is not None and len(bias.users) == 1
        bias_path = str(bias.target) if bias is not None and own else _free_path(module, f"{path.rpartition('.')[0]}.bias".lstrip("."))
        for position, place, tensor in ((op.weight, path, (parts * gain.view(along)).view_as(wide)), (op.bias, bias_path, added)):
            edit.set_parameter(module, place, tensor.to(old.dtype).requires_grad_(old.requires_grad))
            _set_argument(layer, position, edit.parameter_node(module.graph, place, tensor.to(old.dtype), layer))
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    _bypass(norm, source)
    return True


def _takes_forward(layer: fx.Node, source: fx.Node) -> bool:
    """Whether `layer` is a convolution of constant weights that reads `source`, and no zeros beside it."""
    if (
        layer.op != "call_function"
        or layer.args[0] is not source
        or not str(layer.target).endswith(("conv1d.default", "conv2d.default"))
    ):
        return False
    op = query.op_of(layer)
    parameters = [query.argument(layer, position) for position in (op.weight, op.bias)]
    padding = layer.args[4] if len(layer.args) > 4 else layer.kwargs.get("padding", 0)
    padded = any(padding) if isinstance(padding, list | tuple) else bool(padding)
    return not padded and all(p is None or p.op == "get_attr" for p in parameters)


def _make_plain(module: fx.GraphModule, norm: fx.Node) -> None:
    gain, shift = _affine(module, norm)
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    dtype = query.value(source).dtype  # type: ignore[attr-defined]
    sides = _rank(norm if isinstance(query.value(norm), Tensor) else source) - 2
    name = query.tensor_name(norm)
    places = [_free_path(module, f"{name}.{part}") for part in ("scale", "shift")]
    tensors = [gain.to(dtype).view(-1, *[1] * (sides + 1) if sides else []), shift.to(dtype)]
    nodes = []
    for place, tensor in zip(places, tensors, strict=True):
        edit.set_parameter(module, place, tensor)
        nodes.append(edit.parameter_node(module.graph, place, tensor, norm))
    with module.graph.inserting_before(norm):
        if sides:
            conv = getattr(torch.ops.aten, f"conv{sides}d").default
            made = module.graph.call_function(conv, (source, *nodes, [1] * sides, [0] * sides, [1] * sides, len(gain)))
        else:
            scaled = module.graph.call_function(torch.ops.aten.mul.Tensor, (source, nodes[0]))
            scaled.meta = dict(source.meta) | {"tensor_name": f"{name}.scaled"}
            made = module.graph.call_function(torch.ops.aten.add.Tensor, (scaled, nodes[1]))
    made.meta = dict(norm.meta) | {"val": query.value(source), "statistics": _statistics(module, norm, len(gain))}
    _bypass(norm, made)


def add_biases(module: fx.GraphModule) -> int:
    """Give every layer with constant weights a bias, of zeros where it had none. Returns the number added."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        op = query.op_of(node)
        weight = query.argument(node, op.weight)
        if op.bias is None or weight is None or weight.op != "get_attr" or query.argument(node, op.bias) is not None:
            continue
        made = query.value(node)
        assert isinstance(made, Tensor)
        tensor = torch.zeros(int(made.shape[-1 if op.name == "linear" else 1]))
        tensor = tensor.to(query.parameter(module, str(weight.target)).dtype)
        path = _free_path(module, f"{str(weight.target).rpartition('.')[0]}.bias".lstrip("."))
        edit.set_parameter(module, path, tensor)
        _set_argument(node, op.bias, edit.parameter_node(module.graph, path, tensor, node))
        count += 1
    edit.finish(module)
    return count


def untie_biases(module: fx.GraphModule) -> int:
    """Give every layer a bias of its own, since an integer bias depends on its layer's input. Returns the number of copies."""
    count = 0
    seen: set[str] = set()
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        position = query.op_of(node).bias
        bias = query.argument(node, position)
        if position is None or bias is None or bias.op != "get_attr":
            continue
        if str(bias.target) in seen:
            shared = query.parameter(module, str(bias.target))
            tensor = shared.detach().clone().requires_grad_(shared.requires_grad)
            path = _free_path(module, str(bias.target))
            edit.set_parameter(module, path, tensor)
            node.update_arg(position, edit.parameter_node(module.graph, path, tensor, node))
            count += 1
            seen.add(path)
        seen.add(str(bias.target))
    edit.finish(module)
    return count


def _fold(module: fx.GraphModule, norm: fx.Node) -> int:
    layer = norm.args[0]
    assert isinstance(layer, fx.Node)
    if layer.op != "call_function" or len(layer.users) != 1:
        return 0
    op = query.op_of(layer)
    weight = query.argument(layer, op.weight)
    bias = query.argument(layer, op.bias)
    constants = [n for n in (weight, bias, *norm.args[1:5]) if isinstance(n, fx.Node)]
    if op.weight is None or op.bias is None or any(n.op != "get_attr" for n in constants):
        return 0
    assert weight is not None
    old_weight = query.parameter(module, str(weight.target))
    gain, shift = _affine(module, norm)
    grouped_transpose = op.channel_axis == 1 and old_weight.shape[1] != gain.numel()
    if grouped_transpose or (op.name == "linear" and _rank(layer) != 2):
        return 0
    old_bias = query.parameter(module, str(bias.target)).detach().double() if bias is not None else torch.zeros_like(shift)
    shape = [-1 if axis == op.channel_axis else 1 for axis in range(old_weight.dim())]
    new_weight = (old_weight.detach().double() * gain.reshape(shape)).to(old_weight.dtype)
    new_bias = (old_bias * gain + shift).to(old_weight.dtype)
    path = str(weight.target)
    if len(weight.users) > 1:
        path = _free_path(module, path)
    bias_path = f"{path.rpartition('.')[0]}.bias".lstrip(".")
    if bias is None or len(bias.users) > 1 or str(bias.target) != bias_path:
        bias_path = _free_path(module, bias_path)
    for position, place, tensor in ((op.weight, path, new_weight), (op.bias, bias_path, new_bias)):
        edit.set_parameter(module, place, tensor.requires_grad_(old_weight.requires_grad))
        _set_argument(layer, position, edit.parameter_node(module.graph, place, tensor, layer))
    layer.meta["statistics"] = _statistics(module, norm, gain.numel())
    _bypass(norm, layer)
    return 1


def _rank(layer: fx.Node) -> int:
    made = query.value(layer)
    assert isinstance(made, Tensor)
    return made.dim()


def _affine(module: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """`(gain, shift)` of a batch norm in inference, float64 `[C]`."""
    gamma, beta, mean, variance = (
        query.parameter(module, str(n.target)).detach().double() if isinstance(n, fx.Node) else None for n in norm.args[1:5]
    )
    assert mean is not None and variance is not None
    # aten.batch_norm ends in (momentum, eps, cudnn); the functional form ends in (momentum, eps)
    eps = norm.args[7] if str(norm.target) == "aten.batch_norm.default" else norm.args[-1]
    assert isinstance(eps, float)
    gain = (variance + eps).rsqrt()
    gain = gain if gamma is None else gain * gamma
    shift = -mean * gain
    return gain, shift if beta is None else shift + beta


def _statistics(module: fx.GraphModule, norm: fx.Node, channels: int) -> tuple[Tensor, Tensor]:
    """`(mean, std)` of the output of a batch norm, float64 `[C]`."""
    gamma, beta = (query.parameter(module, str(n.target)).detach().double() if isinstance(n, fx.Node) else None for n in norm.args[1:3])
    mean = torch.zeros(channels, dtype=torch.float64) if beta is None else beta.clone()
    return mean, torch.ones_like(mean) if gamma is None else gamma.abs()


def _set_argument(layer: fx.Node, position: int, node: fx.Node) -> None:
    arguments = list(layer.args) + [None] * (position + 1 - len(layer.args))
    arguments[position] = node
    layer.args = tuple(arguments)
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k not in ("weight", "bias")}


def _bypass(norm: fx.Node, layer: fx.Node) -> None:
    for user in list(norm.users):
        if str(user.target) == "<built-in function getitem>":
            user.replace_all_uses_with(layer)
            norm.graph.erase_node(user)
    norm.replace_all_uses_with(layer)
    norm.graph.erase_node(norm)


def _free_path(module: fx.GraphModule, path: str) -> str:
    """`path`, or with a number behind it where something has that name."""
    owner, _, name = path.rpartition(".")
    try:
        holder = module.get_submodule(owner)
    except AttributeError:
        return path
    free, count = name, 0
    while hasattr(holder, free):
        count += 1
        free = f"{name}_{count}"
    return f"{owner}.{free}".lstrip(".")
