"""Measure the main job on real networks: accuracy, agreement, calibration time and memory, speed and size of what is emitted.

    python tools/bench_pipeline.py --zoo ../shared/models/zoo.py --write docs/benchmarks.md

`--zoo` names a Python file with `load(name) -> nn.Module` and `data(split) -> (images, labels)` for the splits `train` and `val`. All
ratios are of medians, measured in turn within one run. `--part` runs one part only; `--write` replaces the generated blocks of a
file, one a part.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from qdeploy import api
from qdeploy.capture import fold
from qdeploy.capture.capture import capture
from qdeploy.core.backend import backends
from qdeploy.export import emit
from qdeploy.export.artifact import Artifact
from qdeploy.graph import edit
from qdeploy.runtimes.runtime import find_runtime
from qdeploy.simulation.insert import insert_quantizers
from qdeploy.simulation.plan import Widths, make_plan

NETWORKS = ("resnet20", "mobilenetv2")
OBSERVERS = ("minmax", "ema", "percentile", "mse", "kl")
BATCH = 32
RECIPE = "plain"
CALIBRATION_BATCH = 64
WAYS = ("onnxruntime:all", "onnxruntime:none", "tvm", "openvino:int8", "openvino:literal", "qnn_htp")
HTP_SAMPLES = 500


def main() -> None:
    """Run the chosen parts and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--part", choices=("accuracy", "time", "memory", "speed", "depth"), action="append")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--backends", default=",".join(backends.names()))
    parser.add_argument("--ways", default=",".join(WAYS), help="runtimes, as NAME or NAME:VARIANT")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4000, help="validation images")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.zoo.is_file():
        print(f"skipped: the networks of '{args.zoo}' are not here")
        return
    zoo = load_zoo(args.zoo)
    if args.child:
        network, work, images = args.child.split(",")
        memory_child(zoo, network, work, int(images))
        return
    networks = args.networks.split(",")
    chosen: dict[str, Callable[[], str]] = {
        "accuracy": lambda: accuracy(zoo, networks, args.backends.split(","), args.calibration, args.samples, args.ways.split(",")),
        "time": lambda: calibration_time(zoo, networks, args.calibration),
        "memory": lambda: memory(args.zoo, networks),
        "speed": lambda: speed(zoo, networks, args.calibration),
        "depth": lambda: depth(zoo),
    }
    for part, run in chosen.items():
        if not args.part or part in args.part:
            text = f"{run()}\n\n{machine()}"
            print(text, end="\n\n", flush=True)
            if args.write:
                replace_block(args.write, f"bench_pipeline {part}", text)


def replace_block(path: Path, name: str, text: str) -> None:
    """Put `text` between the comments that mark the block `name` of a Markdown file."""
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    before, found, rest = path.read_text().partition(begin)
    if not found or end not in rest:
        sys.exit(f"error: '{path}' has no block '{begin}' ... '{end}'")
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def load_zoo(path: Path) -> ModuleType:
    """The module with the networks."""
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def machine() -> str:
    """What this ran on."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    names = ("torch", "onnx", "onnxruntime", "openvino", "apache-tvm", "onnxruntime-qnn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Machine: {model}, {os.cpu_count()} cores; Python {platform.python_version()}; {versions}."


def batches(images: Tensor, size: int = CALIBRATION_BATCH) -> Iterator[Tensor]:
    """`images` in pieces."""
    yield from torch.split(images, size)


def quantized(zoo: ModuleType, network: str, backend: str, count: int, out: Path) -> tuple[object, Artifact]:
    """The calibrated simulation and its artifact."""
    images = calibration_images(zoo, count)
    prepared = api.prepare(zoo.load(network), images[:2], backend, RECIPE)
    api.calibrate(prepared, batches(images))
    return prepared, api.convert(prepared, out)


def calibration_images(zoo: ModuleType, count: int) -> Tensor:
    """`count` training images, drawn with seed 0."""
    images, _ = zoo.data("train")
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].sort().values]


def accuracy(zoo: ModuleType, networks: list[str], names: list[str], count: int, samples: int, ways: list[str]) -> str:
    """Accuracy of float and simulation, and the share of images on which each runtime's top-1 is the simulation's."""
    images, labels = zoo.data("val")
    images, labels = images[:samples], labels[:samples]
    rows = [["network", "backend", "float", "simulated", "drop", *ways]]
    for network in networks:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                prepared, artifact = quantized(zoo, network, name, count, Path(folder) / "out")
                own = {
                    f"{r.name}:{v}" if len(r.variants) > 1 else r.name
                    for r, vs in map(find_runtime, backends[name].runtimes)
                    for v in vs
                }
                found = {}
                for way in ways:
                    few = HTP_SAMPLES if way == "qnn_htp" else samples
                    if way == "qnn_htp" and way not in own:
                        continue
                    report = api.verify(artifact, batches(images[:few], 50), way, labels[:few], simulation=prepared)
                    *references, result = report.results
                    if few == samples:
                        found["float"], found["simulated"] = (r.accuracy for r in references)
                    exact = " (exact)" if result.sqnr is not None and result.sqnr >= 120 else ""
                    found[way] = f"{result.agreement:.2%}{exact}" if way in own else f"({result.agreement:.2%})"
                    print(network, name, way, found[way], file=sys.stderr, flush=True)
            drop = (found["float"] - found["simulated"]) * 100
            numbers = [f"{found['float']:.2%}", f"{found['simulated']:.2%}", f"{drop:+.2f}"]
            rows.append([network, name, *numbers, *(str(found.get(way, "-")) for way in ways)])
    return (
        f"### Accuracy and agreement\n\n{count} calibration images of `train`, recipe `{RECIPE}`; accuracy on {samples} of `val`; "
        f"agreement of top-1 between the simulation and each runtime on the same images ({HTP_SAMPLES} for qnn_htp). `exact`: all "
        "outputs equal up to float rounding (over 120 dB). In brackets: not a runtime that the backend is checked with.\n\n"
        + table(rows)
    )


def calibration_time(zoo: ModuleType, networks: list[str], count: int) -> str:
    """Calibration over the bare float forward passes on the same batches, for every observer."""
    images = calibration_images(zoo, count)
    rows = [["network", "float forward", *OBSERVERS]]
    for network in networks:
        model = zoo.load(network)
        forward: list[float] = []
        taken: dict[str, list[float]] = {name: [] for name in OBSERVERS}
        for repeat in range(9):
            for name in OBSERVERS:
                prepared = api.prepare(model, images[:2], "onnxruntime", recipe=name)
                plain = timed(lambda model=model: run_float(model, images))
                whole = timed(lambda prepared=prepared: api.calibrate(prepared, batches(images)))
                if repeat:  # the first round warms up
                    forward.append(plain)
                    taken[name].append(whole / plain)
        rows.append([network, f"{statistics.median(forward):.2f} s", *(f"{statistics.median(taken[n]):.2f}" for n in OBSERVERS)])
    text = (
        f"### Calibration time\n\nOver the time of the bare float forward passes, {count} images in batches of {CALIBRATION_BATCH}; "
        "median of eight rounds in turn.\n\n"
    )
    return text + table(rows)


def run_float(model: nn.Module, images: Tensor) -> None:
    """The bare forward passes."""
    with torch.no_grad():
        for batch in batches(images):
            model(batch)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(zoo: Path, networks: list[str]) -> str:
    """Peak memory of calibration above that of the forward passes, for few and for many images."""
    rows = [["network", "images", "forward", "calibration (mse)", "above"]]
    for network in networks:
        for count in (512, 8192):
            peaks = []
            for work in ("forward", "calibrate"):
                command = [sys.executable, __file__, "--zoo", str(zoo), "--child", f"{network},{work},{count}"]
                peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024)
            rows.append([network, str(count), *(f"{peak:.0f} MiB" for peak in peaks), f"{peaks[1] - peaks[0]:.0f} MiB"])
    return "### Memory\n\nPeak resident memory of a process of its own.\n\n" + table(rows)


def memory_child(zoo: ModuleType, network: str, work: str, count: int) -> None:
    """Pass `count` images through and print the peak memory in KiB; the images are repeated, since there are fewer."""
    images, _ = zoo.data("train")
    step = CALIBRATION_BATCH
    stream = (images[torch.arange(start, start + step) % len(images)] for start in range(0, count, step))
    prepared = api.prepare(zoo.load(network), images[:2], "onnxruntime", recipe="mse")
    if work == "calibrate":
        api.calibrate(prepared, stream)
    else:
        with torch.no_grad():
            for batch in stream:
                prepared(batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def speed(zoo: ModuleType, networks: list[str], count: int) -> str:
    """The emitted artifact over the float ONNX in the same runtime, one thread, batch 32."""
    rows = [["network", "backend", "runtime", "float", "quantized", "speed-up", "size over float"]]
    for network in networks:
        for name, opener in (("onnxruntime", open_onnxruntime), ("openvino", open_openvino)):
            with tempfile.TemporaryDirectory() as folder:
                prepared, artifact = quantized(zoo, network, name, count, Path(folder) / "out")
                plain = Path(folder) / "float.onnx"
                plain.write_bytes(emit.to_bytes(emit.float_view(emit.export(prepared))))
                images = zoo.data("val")[0][:BATCH].numpy()
                runs = [opener(path, images) for path in (plain, artifact.simulation)]
                taken: list[list[float]] = [[], []]
                for repeat in range(45):
                    for run, times in zip(runs, taken, strict=True):
                        seconds = timed(run)
                        if repeat >= 5:
                            times.append(seconds)
                size = artifact.simulation.stat().st_size / plain.stat().st_size
            slow, fast = (statistics.median(times) for times in taken)
            rows.append([network, name, name, f"{slow * 1e3:.1f} ms", f"{fast * 1e3:.1f} ms", f"{slow / fast:.2f}x", f"{size:.3f}"])
    return (
        f"### Speed and size of the emitted file\n\nOne thread, batch {BATCH}, in turn with the float ONNX of the same network.\n\n"
        + table(rows)
    )


def depth(zoo: ModuleType) -> str:
    """Seconds of capture, of folding and planning, and of insertion against the number of layers, on one core."""
    rows = [["layers", "nodes", "capture", "folding and planning", "insertion", "capture a layer", "the others a layer"]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for blocks in (3, 9, 18, 25, 33):
        layers, laps = 6 * blocks + 2, []
        model = zoo.ResNetCifar(blocks).eval()
        for _ in range(3):
            start = time.perf_counter()
            module = capture(model, torch.zeros(2, 3, 32, 32)).module
            captured = time.perf_counter()
            fold.fold_batch_norms(module)
            fold.plain_batch_norms(module)
            plan = make_plan(module, api.find_backend("snpe"), Widths())
            planned = time.perf_counter()
            copy = edit.copy(module, own_parameters=True)
            insert_quantizers(copy, plan)
            laps.append((captured - start, planned - captured, time.perf_counter() - planned))
        one, two, three = (statistics.median(lap[part] for lap in laps) for part in range(3))
        each = [f"{1e3 * one / layers:.1f} ms", f"{1e3 * (two + three) / layers:.2f} ms"]
        rows.append([str(layers), str(len(copy.graph.nodes)), f"{one:.2f} s", f"{two:.2f} s", f"{three:.2f} s", *each])
    torch.set_num_threads(threads)
    title = "### Capture and planning against depth\n\nResidual networks with random weights, target snpe, one core, medians of 3 runs."
    return f"{title} (`--part depth`)\n\n{table(rows)}"


def open_onnxruntime(path: Path, images: object) -> Callable[[], object]:
    """A run in ONNX Runtime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})


def open_openvino(path: Path, images: object) -> Callable[[], object]:
    """A run in OpenVINO with one thread and a static batch."""
    find_runtime("openvino")[0].open(path, BATCH, "int8")  # imports it without its telemetry
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({port: [BATCH, *[int(d.get_length()) for d in list(port.partial_shape)[1:]]] for port in model.inputs})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    request = compiled.create_infer_request()
    return lambda: request.infer([images])


def table(rows: list[list[str]]) -> str:
    """A Markdown table."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


if __name__ == "__main__":
    main()
