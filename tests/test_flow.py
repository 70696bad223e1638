"""Flows: a graph computed piece by piece gives what the whole graph gives, and holds no more than crosses the border."""

from __future__ import annotations

from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, fx, nn

import qdeploy
from qdeploy.graph.flow import BACKWARD, Flow, TensorStore, backward_batch, run

SAMPLES = 20


def inputs(name: str) -> list[Tensor]:
    data = networks.batches(name, count=3)
    return [torch.cat(column)[:SAMPLES] for column in zip(*data, strict=True)]


def end(module: fx.GraphModule) -> fx.Node:
    (node,) = module.graph.find_nodes(op="output")
    return node


def outputs_of(flow: Flow, module: fx.GraphModule) -> list[Tensor]:
    flow.advance(end(module))
    return [flow[node] for node in end(module).all_input_nodes]


@pytest.mark.parametrize("mode", ["float", "quantize"])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_node_by_node_it_computes_what_the_whole_graph_computes(name: str, mode: str):
    prepared = networks.settled(name, "snpe")
    module = prepared.module if mode == "quantize" else prepared.floating
    flow = Flow(module, inputs(name), TensorStore(), batch=7)
    for node in module.graph.nodes:
        if node.op == "call_function":
            flow.advance(node)
    whole = run(module, inputs(name), batch=7)
    made = outputs_of(flow, module)
    assert len(made) == len(whole)
    # matrices of other shapes may be summed in another order
    assert all(torch.allclose(got, want, atol=1e-5) for got, want in zip(made, whole, strict=True))


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_piece_computes_what_its_part_of_the_graph_does(name: str):
    module = networks.settled(name, "snpe").module
    flow = Flow(module, inputs(name), TensorStore(), batch=SAMPLES)
    calls = [n for n in module.graph.nodes if n.op == "call_function" and qdeploy.graph.query.is_float(n)]
    for node in calls[2::3]:
        piece = flow.piece(node)
        with torch.no_grad():
            made = piece.module(*(flow[n] for n in piece.enters))
        flow.through(node)
        assert all(torch.equal(value, flow[n]) for n, value in zip(piece.leaves, made, strict=True))


def test_what_nobody_reads_any_more_is_dropped():
    module = networks.settled("residual", "snpe").floating
    flow = Flow(module, inputs("residual"), TensorStore(), batch=8)
    most = 0
    for node in module.graph.nodes:
        if node.op == "call_function":
            flow.through(node)
            most = max(most, len(flow._values))
    assert most <= 2  # the branch and the shortcut


def test_an_arena_counts_what_is_alive():
    store = TensorStore(limit=4000)
    first = store.empty((100,), torch.float32)
    image = store.empty((2, 3, 4, 5), torch.float32)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert store.used == 400 + 480
    del first
    assert store.used == 480


def test_beyond_the_limit_values_lie_in_files_and_are_the_same(tmp_path: Path):
    module = networks.settled("residual", "snpe").module
    made = [outputs_of(Flow(module, inputs("residual"), TensorStore(limit, tmp_path), batch=8), module) for limit in (1 << 30, 0)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    assert not list(tmp_path.iterdir()), "the files have no names"


class Parts(nn.Module):
    """What a flow cannot hold: a tuple of parts, a size, and rows that are not samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.conv(x), 2, dim=1)
        rows = torch.cat([left, right], 1).permute(0, 2, 3, 1).reshape(-1, 4)  # samples times places
        back = rows.reshape(x.shape[0], -1, 4).mean(1)
        return self.fc(torch.cat([back, back * self.conv.weight.mean()], 1))


def test_values_that_are_no_rows_of_samples_are_computed_anew():
    net = Parts().eval()
    x = torch.randn(SAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    module = qdeploy.capture.capture.capture(net, x[:3]).module
    flow = Flow(module, [x], TensorStore(), batch=6)
    for node in module.graph.nodes:
        if node.op == "call_function":
            flow.advance(node)
    (made,) = outputs_of(flow, module)
    with torch.no_grad():
        assert torch.allclose(made, net(x), atol=1e-6)


def test_a_backward_pass_takes_fewer_samples_the_deeper_the_network_is():
    def module(depth: int) -> torch.fx.GraphModule:
        net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))).eval()
        return qdeploy.capture.capture.capture(net, torch.zeros(2, 8, 64, 64)).module

    sample = 4 * 8 * 64 * 64
    for depth in (2, 12):
        size = backward_batch(module(depth), 1000)
        assert size == BACKWARD // (sample * (depth + 1))
    assert backward_batch(module(2), 16) == 16
