"""Time grows with the number of nodes, and no faster. Steps are counted in place of seconds, so that no load of the machine matters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import pytest
import torch
from onnx import helper, numpy_helper
from torch import fx, nn

from qdeploy.capture import simplify
from qdeploy.capture.capture import _name_tensors
from qdeploy.capture.fold import fold
from qdeploy.core.backend import backends
from qdeploy.core.names import Names, free_attribute
from qdeploy.export import emit
from qdeploy.graph import edit
from qdeploy.graph.observe import insert_observers
from qdeploy.importing import fuse, read
from qdeploy.importing.graph import Builder
from qdeploy.numerics.observer import make_observer
from qdeploy.simulation.insert import insert_quantizers, observed_tensors
from qdeploy.simulation.plan import make_plan

SMALL, FACTOR = 15, 4
SLACK = 1.3
"""Sixteen times the steps would be quadratic; a part of an algorithm that is shows up long before."""

aten: Any = torch.ops.aten


def steps(work: Callable[[], object]) -> int:
    """Lines of Python that `work` runs, torch's own too: each turn of a loop is one at least."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def assert_linear(work_of: Callable[[int], Callable[[], object]], small: int = SMALL) -> None:
    """`work_of` makes the work for a number of blocks."""
    work_of(small)()  # what is imported or cached the first time
    few, many = (steps(work_of(count)) for count in (small, FACTOR * small))
    assert many < SLACK * FACTOR * few, (few, many)


class Drawn:
    """A captured graph, drawn by hand: torch.export would take most of the time."""

    def __init__(self) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self.x = self._made(self.graph.placeholder("x"))

    def _made(self, node: fx.Node) -> fx.Node:
        node.meta["val"] = torch.zeros(2, 4, 3, 3)
        return node

    def call(self, target: Any, *arguments: Any) -> fx.Node:
        return self._made(self.graph.call_function(target, arguments))

    def conv(self, x: fx.Node, path: str) -> fx.Node:
        found = []
        for name, shape in ((f"{path}.weight", (4, 4, 1, 1)), (f"{path}.bias", (4,))):
            edit.set_parameter(self.root, name, torch.ones(shape))
            found.append(self.graph.get_attr(name))
            found[-1].meta["val"] = torch.ones(shape)
        return self.call(aten.conv2d.default, x, *found)

    def module(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(self.root, self.graph)


def chain(count: int) -> fx.GraphModule:
    drawn = Drawn()
    x = drawn.x
    for index in range(count):
        y = drawn.call(aten.relu.default, drawn.conv(x, f"convs.{index}"))
        x = drawn.call(aten.mul.Tensor, drawn.call(aten.add.Tensor, y, x), 0.5)
    return drawn.module(x)


def wide(count: int) -> fx.GraphModule:
    drawn = Drawn()
    first = drawn.conv(drawn.x, "first")
    branches = [drawn.call(aten.relu.default, drawn.conv(first, f"branches.{index}")) for index in range(count)]
    joined = drawn.call(aten.cat.default, branches, 1)
    return drawn.module(joined, *branches)


def all_own_passes(module: fx.GraphModule) -> None:
    """From a captured graph to a simulation, to observers and to what is exported."""
    simplify.simplify(module)
    _name_tensors(module, ["x"], of_file=False)
    fold(module, with_biases=True)
    plan = make_plan(module, backends["snpe"])
    insert_quantizers(edit.copy(module, own_parameters=True), plan)
    specs = {planned.group: planned.spec for planned in plan.quantized}
    watched = {tensor: [make_observer("minmax", specs[g], {})] for g, found in observed_tensors(plan).items() for tensor in found}  # type: ignore[arg-type]
    insert_observers(module, watched)
    emit._marked(module)


@pytest.mark.parametrize("draw", [chain, wide], ids=["chain", "wide"])
def test_planning_and_insertion_are_linear_in_the_nodes(draw: Callable[[int], fx.GraphModule]) -> None:
    def work_of(count: int) -> Callable[[], object]:
        module = draw(count)
        return lambda: all_own_passes(module)

    assert_linear(work_of)


def linear_layers(count: int) -> ir.Model:
    """MatMul, Add, Relu and a product, over and over; the products form gates nowhere."""
    nodes, constants, x = [], [], "x"
    for index in range(count):
        for name, shape in (("w", (4, 4)), ("b", (4,))):
            constants.append(numpy_helper.from_array(np.ones(shape, np.float32), f"onnx::{name}_{index}"))
        for op, others in (
            ("MatMul", [f"onnx::w_{index}"]),
            ("Add", [f"onnx::b_{index}"]),
            ("Relu", []),
            ("Mul", ["half"]),
            ("Mul", ["half"]),
        ):
            nodes.append(helper.make_node(op, [x, *others], [f"t{len(nodes)}"]))
            x = f"t{len(nodes) - 1}"
    constants.append(numpy_helper.from_array(np.float32(0.5).reshape(()), "half"))
    ends = [helper.make_tensor_value_info(name, 1, [2, 4]) for name in ("x", x)]
    made = helper.make_graph(nodes, "main", ends[:1], ends[1:], constants)
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def products(count: int) -> ir.Model:
    """One product of many factors."""
    nodes = [helper.make_node("Mul", [f"t{index}" if index else "x", "half"], [f"t{index + 1}"]) for index in range(count)]
    half = numpy_helper.from_array(np.float32(0.5).reshape(()), "half")
    ends = [helper.make_tensor_value_info(name, 1, [2, 4]) for name in ("x", f"t{count}")]
    made = helper.make_graph(nodes, "main", ends[:1], ends[1:], [half])
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10))


def imported(model: ir.Model) -> fx.GraphModule:
    module = Builder(model, loose=True).module()
    fuse.fuse(module)
    return module


@pytest.mark.parametrize("draw", [linear_layers, products])
def test_importing_is_linear_in_the_nodes(draw: Callable[[int], ir.Model]) -> None:
    assert read.OPERATORS  # the modules that fill the table

    def work_of(count: int) -> Callable[[], object]:
        model = draw(count)
        return lambda: imported(model)

    assert_linear(work_of, small=50)


def test_a_product_deeper_than_the_stack_of_python_is_imported() -> None:
    count = 2 * sys.getrecursionlimit()
    assert sum(fuse.kind(node) == "Mul" for node in imported(products(count)).graph.nodes) == count


def test_rules_of_the_exporter_look_at_every_node_a_fixed_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    real = ir.Node.op_identifier

    def counted(node: ir.Node) -> Any:
        nonlocal looks
        looks += 1
        return real(node)

    monkeypatch.setattr(ir.Node, "op_identifier", counted)
    found = []
    for count in (SMALL, FACTOR * SMALL):
        looks = 0
        with emit._few_matches():
            onnxscript.optimizer.optimize(products(count))
        found.append(looks)
    assert 0 < found[1] < SLACK * FACTOR * found[0], found


def test_free_names_are_the_first_with_a_free_number() -> None:
    names = Names(["relu", "relu_2", "add"])
    assert [names.free(name) for name in ("relu", "relu", "conv", "relu_2", "add")] == ["relu_1", "relu_3", "conv", "relu_2_1", "add_1"]
    owner = nn.Module()
    owner.weight, owner.weight_1 = 1, 2  # type: ignore[assignment]
    assert free_attribute(owner, "weight") == free_attribute(owner, "weight") == "weight_2"
    owner.weight_2 = 3  # type: ignore[assignment]
    assert [free_attribute(owner, name) for name in ("weight", "bias")] == ["weight_3", "bias"]
