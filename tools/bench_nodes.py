"""Measure how the time of every stage grows with the number of nodes, from a .pt2 and from an ONNX file to a verified artifact.

    python tools/bench_nodes.py --write docs/benchmarks.md

`chain` is a row of 1x1 convolutions, relus, residual adds and products, `elementwise` one of ops without weights, `wide` has all
branches side by side into one concat. Seconds are those that the process had on a processor, with one thread, so that other work on
the machine counts little; what counts are the ratios from row to row. A row is a process of its own. `--write` replaces the generated
block of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from bench_pipeline import machine, replace_block, table
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qdeploy import api
from qdeploy.capture import fold
from qdeploy.capture.capture import capture
from qdeploy.core.targets import find_backend
from qdeploy.export import emit
from qdeploy.files.model import load_model
from qdeploy.graph import edit
from qdeploy.simulation.insert import insert_quantizers
from qdeploy.simulation.plan import make_plan

SHAPE = (3, 8, 8)
CHANNELS = 8
KINDS = ("chain", "elementwise", "wide")
SOURCES = ("pt2", "onnx")
RUNTIMES = ("onnxruntime:all", "onnxruntime:none")


def main() -> None:
    """Measure all rows, each in a process of its own, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="chain")
    parser.add_argument("--source", choices=SOURCES, action="append", help="default: both")
    parser.add_argument("--nodes", default="1000,2000,4000,8000")
    parser.add_argument("--backend", default="snpe")
    parser.add_argument("--recipe", default="plain")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--row", action="store_true", help="measure one source and number here, and print JSON")
    args = parser.parse_args()
    counts, sources = [int(count) for count in args.nodes.split(",")], args.source or list(SOURCES)
    if args.row:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        print(json.dumps(measured(args.kind, sources[0], counts[0], args.backend, args.recipe)))
        return
    rows: list[list[str]] = []
    for source in sources:
        for count in counts:
            options = ["--row", "--kind", args.kind, "--source", source, "--nodes", str(count)]
            command = [sys.executable, __file__, *options, "--backend", args.backend, "--recipe", args.recipe]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
            found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            nodes = found.pop("nodes")
            total = sum(seconds for stage, seconds in found.items() if not stage.startswith("of which"))
            rows = rows or [["file", "nodes", *found, "all", "all a node"]]
            rows.append(
                [source, f"{nodes:.0f}", *(f"{s:.2f}" for s in found.values()), f"{total:.1f}", f"{1e3 * total / nodes:.1f} ms"]
            )
            print(rows[-1], file=sys.stderr, flush=True)
    title = (
        f"### Time against the number of nodes: {args.kind}\n\nTarget {args.backend}, recipe {args.recipe}, seconds of one processor"
    )
    text = f"{title}; the machine is shared, and ratios matter.\n\n{table(rows)}\n\n{machine()}"
    print(text)
    if args.write:
        replace_block(args.write, f"bench_nodes {args.kind}", text)


class Clock:
    """Seconds on the processor, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count what every call of a function takes."""
        called: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self.stage(stage):
                return called(*args, **options)

        setattr(owner, name, timed)


def measured(kind: str, source: str, count: int, backend: str, recipe: str) -> dict[str, float]:
    """Seconds of every stage for one file, and the number of its nodes when they are planned."""
    clock = Clock()
    images = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model.{source}"
        (save_pt2 if source == "pt2" else save_onnx)(kind, count, path)
        clock.watch(torch.export, "export", "of which torch.export")
        with clock.stage("read"):
            model = load_model(path)
        clock.watch(ExportedProgram, "run_decompositions", "of which decompositions")
        with clock.stage("capture"):
            captured = capture(model, None)
        with clock.stage("fold, plan"):
            fold.fold(captured.module, with_biases=False)
            plan = make_plan(captured.module, find_backend(backend))
        with clock.stage("insert"):
            insert_quantizers(edit.copy(captured.module, own_parameters=True), plan)
        decompositions = clock.seconds["of which decompositions"]
        prepared = api._prepare(captured, (find_backend(backend),), api.find_recipe(recipe), api.Widths(), 0)[0]
        with clock.stage("calibrate"):
            api.calibrate(prepared, [images])
        exported = clock.seconds.get("of which torch.export", 0.0)
        with clock.stage("torch.onnx.export"):
            emit.export(prepared.captured, prepared.backend.opset)
        clock.seconds |= {"of which decompositions": decompositions, "of which torch.export": exported}
        with clock.stage("write"):
            written = api.convert(prepared, Path(folder) / "out")
        with clock.stage("verify"):
            report = api.verify(written, runtime=RUNTIMES)
    if not report.passed:
        print(f"{source} {count}: not verified: {report.to_json()}", file=sys.stderr)
    order = ("read", "of which torch.export", "capture", "of which decompositions", "fold, plan", "insert", "calibrate")
    stages = {name: clock.seconds[name] for name in (*order, "torch.onnx.export", "write", "verify")}
    nodes = sum(node.op == "call_function" for node in captured.module.graph.nodes)
    return stages | {"nodes": nodes}


class Network(nn.Module):
    """About `count` nodes of one kind, from images to 10 scores."""

    def __init__(self, kind: str, count: int):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Conv2d(SHAPE[0], CHANNELS, 3, padding=1)
        layers = {"chain": count // 4, "elementwise": 0, "wide": count // 2}[kind]
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(layers))
        self.blocks = count // 4
        self.last = nn.Linear(CHANNELS * (layers if kind == "wide" else 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores `[N, 10]`."""
        x = self.first(x)
        if self.kind == "chain":
            for conv in self.convs:
                x = (torch.relu(conv(x)) + x) * 0.5
        elif self.kind == "wide":
            x = torch.cat([torch.relu(conv(x)) for conv in self.convs], 1)
        else:
            for _ in range(self.blocks):
                x = torch.sigmoid((torch.relu(x) + 0.125) * 0.75)
        scores: Tensor = self.last(x.mean((2, 3)))
        return scores


def save_pt2(kind: str, count: int, path: Path) -> None:
    """The network as torch.export writes it, with an open batch."""
    batch = ({0: Dim("batch")},)
    torch.export.save(torch.export.export(Network(kind, count).eval(), (torch.zeros(2, *SHAPE),), dynamic_shapes=batch), path)


def save_onnx(kind: str, count: int, path: Path) -> None:
    """The same network node by node."""
    network = Network(kind, count)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(value: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, np.float32), f"c{len(constants)}"))
        return str(constants[-1].name)

    def call(op: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"t{len(nodes)}"], f"n{len(nodes)}", **attributes))
        return str(nodes[-1].output[0])

    def layer(op: str, x: str, module: nn.Module, **attributes: Any) -> str:
        return call(op, x, *(constant(parameter.detach().numpy()) for parameter in module.parameters()), **attributes)

    x = layer("Conv", "x", network.first, pads=[1, 1, 1, 1])
    if kind == "chain":
        for conv in network.convs:
            x = call("Mul", call("Add", call("Relu", layer("Conv", x, conv)), x), constant(0.5))
    elif kind == "wide":
        x = call("Concat", *(call("Relu", layer("Conv", x, conv)) for conv in network.convs), axis=1)
    else:
        for _ in range(network.blocks):
            x = call("Sigmoid", call("Mul", call("Add", call("Relu", x), constant(0.125)), constant(0.75)))
    x = layer("Gemm", call("Flatten", call("GlobalAveragePool", x)), network.last, transB=1)
    shapes = {"x": ["batch", *SHAPE], x: ["batch", 10]}
    given, made = ([helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shapes[name])] for name in shapes)
    graph = helper.make_graph(nodes, kind, given, made, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


if __name__ == "__main__":
    main()
