"""Put the planned quantizers into the graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from qdeploy import arith, graph
from qdeploy.observer import Observer
from qdeploy.plan import Plan, TensorPlan
from qdeploy.quantizer import Quantizer
from qdeploy.spec import QuantSpec, Role
from qdeploy.ties import avoid_ties

FOLDER = "quantizers"
MakeObserver = Callable[[Role, QuantSpec], Observer]


def insert_quantizers(module: fx.GraphModule, plan: Plan, make_observer: MakeObserver) -> dict[str, Quantizer]:
    """Insert one quantizer call for every planned tensor, before its planned readers; one `Quantizer` per group.

    The graph is changed. Returns the quantizers by the name of every tensor that they serve, in the order of the plan.
    """
    by_name = {graph.tensor_name(n): n for n in module.graph.nodes if n.op in ("placeholder", "call_function", "get_attr")}
    module.add_module(FOLDER, nn.Module())
    by_group: dict[str, Quantizer] = {}
    paths: dict[str, str] = {}
    serving: dict[str, Quantizer] = {}
    for planned in plan.quantized:
        assert planned.spec is not None
        group = planned.group
        if group not in by_group:
            observer = None if planned.role == "bias" else make_observer(planned.role, planned.spec)
            by_group[group] = Quantizer(planned.spec, planned.role, observer)
            paths[group] = f"{FOLDER}.q{len(paths)}"
            module.add_submodule(paths[group], by_group[group])
        serving[planned.tensor] = by_group[group]
        _call(module.graph, by_name[planned.tensor], planned, paths[group])
    graph.finish(module)
    return serving


def _call(g: fx.Graph, node: fx.Node, planned: TensorPlan, path: str) -> None:
    readers = set(planned.readers)
    users = [u for u in node.users if graph.reader_name(u) in readers]
    assert users, planned.tensor
    # a parameter is fetched where it stands first in the graph, so the call can stand there as well
    with g.inserting_after(node):
        call = g.call_module(path, (node, planned.tensor, planned.observe))
    call.meta["val"] = node.meta.get("val")
    call.meta["tensor_name"] = f"{planned.tensor}_dequantized"
    for user in users:
        user.replace_input_with(node, call)


def freeze(module: fx.GraphModule, plan: Plan, serving: dict[str, Quantizer]) -> None:
    """Fix all numbers: activations from what was observed, weights and constants from themselves, then the biases.

    A weight scale is raised where its bias would not fit in int32, and then to a ratio that no runtime rounds differently. A bias
    that stays float is moved to the nearest multiple of its accumulator's step: kernels that add it as an integer add the same.
    """
    for planned in plan.quantized:
        quantizer = serving[planned.tensor]
        if planned.role in ("weight", "constant"):
            quantizer.mode = "observe"
            quantizer(graph.parameter(module, planned.tensor), planned.tensor)
    for quantizer in serving.values():
        if quantizer.observer is not None:
            quantizer.freeze()
    biases = [planned for planned in plan.tensors if planned.scales_of is not None]
    for planned in biases:
        source, weight = _scales(planned, serving)
        raised = arith.weight_scale_for_bias(graph.parameter(module, planned.tensor), source.scale, weight.scale)
        weight.set(raised if weight.spec.axis is not None else raised.max().reshape(1), weight.zero_point)
    avoid_ties(module, plan, serving)
    for planned in biases:
        source, weight = _scales(planned, serving)
        scale = arith.bias_scale(source.scale, weight.scale)
        zero = torch.zeros(scale.shape, dtype=torch.int64)
        if planned.spec is not None:
            serving[planned.tensor].set(scale, zero)
        else:
            bias = graph.parameter(module, planned.tensor)
            spec = QuantSpec(bits=32, signed=True, symmetric=True, axis=None if weight.spec.axis is None else 0)
            with torch.no_grad():
                bias.copy_(arith.fake_quantize(bias, scale, zero, spec))


def _scales(planned: TensorPlan, serving: dict[str, Quantizer]) -> tuple[Quantizer, Quantizer]:
    assert planned.scales_of is not None
    source, weight = planned.scales_of
    return serving[source], serving[weight]
