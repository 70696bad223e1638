"""Put the planned quantizers into the graph, and fix their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from qdeploy.core.errors import InputError
from qdeploy.core.spec import FLOAT16_MAX, QuantSpec, Role
from qdeploy.graph import edit, query
from qdeploy.numerics import arith
from qdeploy.numerics.observer import Observer, as_rows, finite_minmax, unmasked
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.simulation.plan import Plan, TensorPlan
from qdeploy.simulation.rounding_ties import avoid_ties

FOLDER = "quantizers"
LATTICE_BITS = 8
"""Widest codes whose accumulator step float biases are moved to: beyond, float32 sums are coarser than the step."""
MakeObserver = Callable[[Role, QuantSpec], Observer]


def insert_quantizers(module: fx.GraphModule, plan: Plan) -> dict[str, Quantizer]:
    """Insert one quantizer call for every planned tensor, before its planned readers; one `Quantizer` per group.

    The graph is changed. Returns the quantizers by the name of every tensor that they serve, in the order of the plan.
    """
    by_name = {query.tensor_name(n): n for n in module.graph.nodes if n.op in ("placeholder", "call_function", "get_attr")}
    module.add_module(FOLDER, nn.Module())
    by_group: dict[str, Quantizer] = {}
    paths: dict[str, str] = {}
    serving: dict[str, Quantizer] = {}
    for planned in plan.quantized:
        assert planned.spec is not None
        group = planned.group
        if group not in by_group:
            by_group[group] = Quantizer(planned.spec, planned.role)
            paths[group] = f"{FOLDER}.q{len(paths)}"
            module.add_submodule(paths[group], by_group[group])
        serving[planned.tensor] = by_group[group]
        _call(module.graph, by_name[planned.tensor], planned, paths[group])
    edit.finish(module)
    return serving


def _call(g: fx.Graph, node: fx.Node, planned: TensorPlan, path: str) -> None:
    readers = set(planned.readers)
    users = [u for u in node.users if query.reader_name(u) in readers]
    assert users, planned.tensor
    # a parameter is fetched where it stands first in the graph, so the call can stand there as well
    with g.inserting_after(node):
        call = g.call_module(path, (node, planned.tensor))
    call.meta["val"] = node.meta.get("val")
    call.meta["tensor_name"] = f"{planned.tensor}_dequantized"
    for user in users:
        user.replace_input_with(node, call)


Numbers = tuple[Tensor, Tensor]
"""A quantizer's scale and zero_point."""


def freeze(
    module: fx.GraphModule,
    plan: Plan,
    serving: Mapping[str, Quantizer],
    seen: Mapping[str, Observer],
    make_observer: MakeObserver,
) -> tuple[dict[Quantizer, Numbers], dict[str, Tensor]]:
    """Fix the scales: of activations from what was `seen` of their group, of weights and constants from themselves.

    Returns what `make_consistent` starts from: these scales, and the biases that follow from scales by their paths, as
    they are in float.
    """
    chosen: dict[Quantizer, Numbers] = {}
    masks = {str(n.target): n.meta["masked"] for n in module.graph.find_nodes(op="get_attr") if "masked" in n.meta}
    for planned in plan.quantized:
        assert planned.spec is not None
        quantizer = serving[planned.tensor]
        if planned.role == "activation":
            if planned.observe and quantizer not in chosen:
                _set_range(quantizer, planned.tensor, seen[planned.group].seen_as(planned.spec))
                chosen[quantizer] = quantizer.scale, quantizer.zero_point
        elif planned.scales_of is None:
            observer = make_observer(planned.role, planned.spec)
            rows = as_rows(query.parameter(module, planned.tensor), planned.spec.axis)
            if planned.role == "constant" and planned.tensor in masks:
                rows = unmasked(rows, masks[planned.tensor])
            observer.update(rows, *finite_minmax(rows, planned.tensor))
            _set_range(quantizer, planned.tensor, observer)
            chosen[quantizer] = quantizer.scale, quantizer.zero_point
    return chosen, {path: query.parameter(module, path).detach().clone() for path in plan.following}


def make_consistent(
    module: fx.GraphModule,
    plan: Plan,
    serving: Mapping[str, Quantizer],
    chosen: Mapping[Quantizer, Numbers],
    biases: Mapping[str, Tensor],
) -> None:
    """Make all numbers fit each other, from the scales that were `chosen` and the float `biases`; the same again when called again.

    A weight scale is raised where its bias would not fit in int32, and then to a ratio that no runtime rounds differently. A bias
    that stays float is moved to the nearest multiple of its accumulator's step: kernels that add it as an integer add the same.
    """
    for quantizer, numbers in chosen.items():
        quantizer.set(*numbers)
    following = plan.following
    for planned in following.values():
        source, weight = _scales(planned, serving)
        bias = biases[planned.tensor]
        with torch.no_grad():
            query.parameter(module, planned.tensor).copy_(bias)
        raised = arith.weight_scale_for_bias(bias, source.scale, weight.scale, weight.spec.grid)
        weight.set(raised if weight.spec.axis is not None else raised.max().reshape(1), weight.zero_point)
    avoid_ties(module, plan, dict(serving))
    for planned in following.values():
        _set_bias(module, planned, serving)
    for planned in plan.quantized:
        if planned.average is not None:
            source_name, kernel = planned.average
            serving[planned.tensor].averages[planned.tensor] = _average(float(serving[source_name].scale), kernel)


def _set_range(quantizer: Quantizer, tensor: str, observer: Observer) -> None:
    low, high = observer.range()
    if quantizer.spec.grid.startswith("float16") and float(torch.maximum(-low, high).max()) > FLOAT16_MAX:
        found = f"{float(low.min()):.6g} to {float(high.max()):.6g}"
        action = "scale the model's inputs or weights down, or choose a target with integers"
        raise InputError(f"tensor '{tensor}' does not fit in float16", found=found, allowed=f"up to {FLOAT16_MAX:.0f}", action=action)
    quantizer.set(*arith.choose_scale(low, high, quantizer.spec))


def _set_bias(module: fx.GraphModule, planned: TensorPlan, serving: Mapping[str, Quantizer]) -> None:
    """The numbers of an int32 bias, or the values of a float one, from the scales of its layer."""
    bias = query.parameter(module, planned.tensor)
    if planned.spec is not None:
        source, weight = _scales(planned, serving)
        scale = arith.bias_scale(source.scale, weight.scale, len(bias))
        serving[planned.tensor].set(scale, torch.zeros(scale.shape, dtype=torch.int64))
    else:
        with torch.no_grad():
            bias.copy_(on_lattice(bias, planned, serving))


def on_lattice(bias: Tensor, planned: TensorPlan, serving: Mapping[str, Quantizer]) -> Tensor:
    """A float `bias` at the nearest multiples of its accumulator's step, where that is coarse enough to count."""
    source, weight = _scales(planned, serving)
    if not source.spec.linear or max(source.spec.bits, weight.spec.bits) > LATTICE_BITS:
        return bias.clone()
    scale = arith.bias_scale(source.scale, weight.scale, len(bias))
    spec = QuantSpec(bits=32, signed=True, symmetric=True, axis=None if weight.spec.axis is None else 0)
    return arith.fake_quantize(bias, scale, torch.zeros(scale.shape, dtype=torch.int64), spec)


def _average(scale: float, kernel: tuple[int, int]) -> tuple[float, float]:
    """See `quantizer`; the scale is a power of two, so both numbers are exact."""
    multiplier, shift = arith.shift_average(*kernel)
    return kernel[0] * kernel[1] / scale, scale * multiplier / 2.0**shift


def _scales(planned: TensorPlan, serving: Mapping[str, Quantizer]) -> tuple[Quantizer, Quantizer]:
    assert planned.scales_of is not None
    source, weight = planned.scales_of
    return serving[source], serving[weight]


def observed_tensors(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The tensors to observe, for every group of activations: those where its values arise."""
    groups: dict[str, list[str]] = {}
    for planned in plan.quantized:
        if planned.role == "activation" and planned.observe:
            groups.setdefault(planned.group, []).append(planned.seen or planned.tensor)
    return {group: tuple(tensors) for group, tensors in groups.items()}
