"""Measure what the steps of recipes bring on real networks: accuracy, time, growth with depth, and resumed runs.

    python tools/bench_accuracy.py --zoo ../shared/models/zoo.py --write docs/benchmarks.md
    python tools/bench_accuracy.py --zoo ../shared/models/zoo.py --row resnet20-w4a4

`--zoo` names a Python file with `load(name) -> nn.Module`, `ill_condition(model) -> model` and `data(split) -> (images, labels)` for
the splits `train` and `val`. Calibration uses images of `train` (seed 0) without labels, accuracy is that of all of `val`. `--row` runs
one row, `--part` one part; `--write` replaces the generated blocks of a file, one a part.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_pipeline import load_zoo, machine, replace_block, table
from torch import Tensor, nn

from qdeploy import api
from qdeploy.graph.flow import run
from qdeploy.simulation.prepared import Prepared

BATCH = 64
KILLS = 20


@dataclass(frozen=True)
class Row:
    """One measured case; `bar` is the largest drop in points that is asked for, None where none is."""

    network: str
    backend: str
    recipe: str
    bar: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ill: bool = False
    data: bool = True
    iterations: int = 0
    """Of the last step, where it is not the recipe's own number."""
    seeds: int = 1
    """Runs with seeds from 0 on, of which the mean counts: with few bits one run has a standard deviation of 0.3 points."""


def widths(weight: int, activation: int) -> dict[str, Any]:
    """Options of low bits; the first and the last layer have 8 by the backend."""
    return {"weight_bits": weight, "activation_bits": activation}


ROWS = {
    "resnet20-w4a4": Row("resnet20", "academic", "qdrop", 0.9, widths(4, 4), seeds=3),
    "resnet20-w2a4": Row("resnet20", "academic", "qdrop", 3.0, widths(2, 4), seeds=3),
    "resnet20-w4a8": Row("resnet20", "academic", "qdrop", 0.1, widths(4, 8), seeds=3),
    "resnet20-w2a4-long": Row("resnet20", "academic", "qdrop", 3.0, widths(2, 4), iterations=4000),
    "resnet20-w4a8-long": Row("resnet20", "academic", "qdrop", 0.1, widths(4, 8), iterations=4000),
    "resnet20-w4a4-long": Row("resnet20", "academic", "qdrop", 0.9, widths(4, 4), iterations=4000),
    "resnet20-w4a4-plain": Row("resnet20", "academic", "plain", None, widths(4, 4)),
    "resnet20-w2a4-plain": Row("resnet20", "academic", "plain", None, widths(2, 4)),
    "resnet20-w4a8-plain": Row("resnet20", "academic", "plain", None, widths(4, 8)),
    "resnet20-w4a4-brecq": Row("resnet20", "academic", "brecq", None, widths(4, 4)),
    "resnet20-w4a8-adaround": Row("resnet20", "academic", "adaround", None, widths(4, 8)),
    "resnet20-w4a8-gptq": Row("resnet20", "academic", "gptq", None, widths(4, 8)),
    "ill-snpe-fast": Row("resnet20", "snpe", "fast", None, ill=True),
    "ill-snpe": Row("resnet20", "snpe", "default", 0.3, ill=True),
    "ill-vitis": Row("resnet20", "vitis", "default", 0.7, ill=True),
    "resnet20-snpe": Row("resnet20", "snpe", "default"),
    "resnet20-vitis": Row("resnet20", "vitis", "default"),
    "mobilenetv2-snpe": Row("mobilenetv2", "snpe", "default", 0.2),
    "mobilenetv2-vitis": Row("mobilenetv2", "vitis", "default", 0.5),
    "mobilenetv2-w4a8-plain": Row("mobilenetv2", "academic", "plain", None, widths(4, 8)),
    "mobilenetv2-w4a8-gptq": Row("mobilenetv2", "academic", "gptq", 1.5, widths(4, 8)),
    "mobilenetv2-w4a8-qdrop": Row("mobilenetv2", "academic", "qdrop", 1.0, widths(4, 8)),
    "resnet20-no-data": Row("resnet20", "snpe", "data_free", 0.5, data=False),
}


def main() -> None:
    """Run the chosen parts and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--part", choices=("accuracy", "time", "depth", "kills"), action="append")
    parser.add_argument("--row", choices=tuple(ROWS), action="append")
    parser.add_argument("--calibration", type=int, default=1024)
    parser.add_argument("--seed", type=int, help="of the steps, for rows, in place of each row's own; the images stay the same")
    parser.add_argument("--iterations", type=int, default=2000, help="of the parts time and depth")
    parser.add_argument("--results", type=Path, help="a JSON file of rows already measured, to which new ones are added")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if not args.zoo.is_file():
        print(f"skipped: the networks of '{args.zoo}' are not here")
        return
    zoo = load_zoo(args.zoo)
    chosen: dict[str, Callable[[], str]] = {
        "accuracy": lambda: accuracy(zoo, args.row or list(ROWS), args.calibration, args.results, args.seed),
        "time": lambda: step_time(zoo, args.calibration, args.iterations),
        "depth": lambda: depth(zoo, args.iterations),
        "kills": lambda: kills(),
    }
    for part, work in chosen.items():
        if part in (args.part or (["accuracy"] if args.row else chosen)):
            text = f"{work()}\n\n{machine()}"
            print(text, end="\n\n", flush=True)
            if args.write:
                replace_block(args.write, f"bench_accuracy {part}", text)


def model_of(zoo: ModuleType, row: Row) -> nn.Module:
    """The network of a row."""
    model: nn.Module = zoo.load(row.network)
    return zoo.ill_condition(model) if row.ill else model


def calibration_images(zoo: ModuleType, count: int) -> Tensor:
    """Images of `train`, drawn with seed 0."""
    images, _ = zoo.data("train")
    chosen: Tensor = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]
    return chosen


def quantized(zoo: ModuleType, row: Row, count: int, seed: int) -> tuple[Prepared, float]:
    """The calibrated simulation of a row, and the seconds that calibration took."""
    model = model_of(zoo, row)
    images = calibration_images(zoo, count)
    recipe = api_recipe(row.recipe, row.iterations) if row.iterations else row.recipe
    prepared = api.prepare(model, images[:8], row.backend, recipe, seed=seed, **row.options)
    start = time.perf_counter()
    batches: Any = torch.split(images, BATCH) if row.data else api.distill_data(model, torch.zeros_like(images[:8]))
    api.calibrate(prepared, batches)
    return prepared, time.perf_counter() - start


def top1(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right classes, in percent."""
    (scores,) = run(module, [images], 200)  # type: ignore[arg-type]
    return 100 * float((scores.argmax(1) == labels).double().mean())


def accuracy(zoo: ModuleType, names: list[str], count: int, results: Path | None, seed: int | None) -> str:
    """The table of accuracies; runs that `results` has already are taken from there."""
    known: dict[str, Any] = json.loads(results.read_text()) if results is not None and results.is_file() else {}
    images, labels = zoo.data("val")
    floats: dict[str, float] = {}
    rows = [["row", "network", "target", "bits", "recipe", "float", "quantized", "drop", "by seed", "bar", "seconds", "steps"]]
    for name in names:
        row = ROWS[name]
        if row.network not in floats:
            floats[row.network] = top1(zoo.load(row.network), images, labels)
        seeds = range(row.seeds) if seed is None else (seed,)
        for one in seeds:
            if f"{name} {one}" not in known:
                known[f"{name} {one}"] = measured(zoo, row, count, one, images, labels)
                print(name, one, known[f"{name} {one}"], file=sys.stderr, flush=True)
                if results is not None:
                    results.write_text(json.dumps(known, indent=1))
        rows.append(accuracy_row(name, floats[row.network], [known[f"{name} {one}"] for one in seeds]))
    seeded = "seed 0, or the mean of seeds from 0 on" if seed is None else f"seed {seed}"
    title = f"### Accuracy by recipe\n\n{count} calibration images, {len(images)} validation images, {seeded}. (`--part accuracy`)"
    return f"{title}\n\n{table(rows)}"


def measured(zoo: ModuleType, row: Row, count: int, seed: int, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """One run of a row."""
    prepared, seconds = quantized(zoo, row, count, seed)
    log = [f"{e['step']} {e['gain']:+.2f} dB" + ("" if e["decision"] == "kept" else f" ({e['decision']})") for e in prepared.log]
    return {"top1": top1(prepared, images, labels), "seconds": seconds, "steps": ", ".join(log)}


def accuracy_row(name: str, floating: float, runs: list[dict[str, Any]]) -> list[str]:
    """The line of the table for the runs of a row; seconds are the mean of one run, steps those of the first."""
    row = ROWS[name]
    bits = f"W{row.options.get('weight_bits', 8)}A{row.options.get('activation_bits', 8)}"
    network = row.network + (", ill-conditioned" if row.ill else "") + ("" if row.data else ", no data")
    recipe = row.recipe + (f", {row.iterations} iterations" if row.iterations else "")
    made = statistics.mean(run["top1"] for run in runs)
    each = ", ".join(f"{floating - run['top1']:+.2f}" for run in runs) if len(runs) > 1 else ""
    bar = "" if row.bar is None else f"<= {row.bar:.1f}"
    figures = [f"{floating:.2f}%", f"{made:.2f}%", f"{floating - made:+.2f}", each, bar]
    return [name, network, row.backend, bits, recipe, *figures, f"{statistics.mean(r['seconds'] for r in runs):.0f}", runs[0]["steps"]]


def float_pass(model: nn.Module, images: Tensor) -> float:
    """Seconds of a bare float forward pass."""
    start = time.perf_counter()
    run(model, [images], BATCH)  # type: ignore[arg-type]
    return time.perf_counter() - start


def step_time(zoo: ModuleType, count: int, iterations: int) -> str:
    """What recipes cost over bare float passes, and reconstruction over bare passes forward and backward, measured in turn."""
    images = calibration_images(zoo, count)
    rows = [["network", "target", "recipe", "float pass", "calibration", "ratio", "bar"]]
    for network, backend, recipe, bar in (
        ("resnet20", "snpe", "plain", ""),
        ("resnet20", "snpe", "default", "<= 6"),
        ("resnet20", "vitis", "default", "<= 6"),
        ("mobilenetv2", "snpe", "default", "<= 6"),
        ("mobilenetv2", "vitis", "default", "<= 6"),
        ("resnet20", "academic", "gptq", "<= 10 plain"),
    ):
        model = zoo.load(network)
        floats, works = [], []
        options = widths(4, 8) if recipe == "gptq" else {}
        for _ in range(3):
            floats.append(float_pass(model, images))
            prepared = api.prepare(model, images[:8], backend, recipe, **options)
            start = time.perf_counter()
            api.calibrate(prepared, torch.split(images, BATCH))
            works.append(time.perf_counter() - start)
        one, other = statistics.median(floats), statistics.median(works)
        rows.append([network, backend, recipe, f"{one:.2f} s", f"{other:.2f} s", f"{other / one:.2f}", bar])
    calibrating = f"### Time of recipes\n\n{count} images, medians of 3 runs in turn. (`--part time`)\n\n{table(rows)}"
    spent, bare, blocks = reconstruction(zoo.load("resnet20"), images, iterations)
    text = (
        f"Reconstruction of ResNet-20 (W4A4, qdrop, {iterations} iterations of batch 32 in each of {blocks} blocks): {spent:.0f} s; "
        f"bare float forward and backward passes of the same blocks: {bare:.0f} s; ratio {spent / bare:.2f} (bar: <= 1.5)."
    )
    return f"{calibrating}\n\n{text}"


def reconstruction(model: nn.Module, images: Tensor, iterations: int) -> tuple[float, float, int]:
    """Seconds of a reconstruction, of bare passes through its blocks (20 each before, between and after), and the number of blocks."""
    from qdeploy.recipes import blockwise, reconstruct

    spent, bare, count = 0.0, 0.0, 0
    learn = reconstruct.reconstruct

    def measured(unit: Any, inputs: Any, float_inputs: Any, targets: Any, settings: Any, *rest: Any) -> Any:
        nonlocal spent, bare, count
        before = bare_pass(unit, float_inputs, targets, settings.batch)
        start = time.perf_counter()
        changed = learn(unit, inputs, float_inputs, targets, settings, *rest)
        spent += time.perf_counter() - start
        after = bare_pass(unit, float_inputs, targets, settings.batch)
        bare += settings.iterations * (before + after) / 2
        count += 1
        return changed

    blockwise.reconstruct = measured  # type: ignore[assignment]
    try:
        prepared = api.prepare(model, images[:8], "academic", api_recipe("qdrop", iterations), **widths(4, 4))
        api.calibrate(prepared, torch.split(images, BATCH))
    finally:
        blockwise.reconstruct = learn
    return spent, bare, count


def bare_pass(unit: Any, inputs: Any, targets: Any, batch: int) -> float:
    """Seconds of one forward and backward pass of a block in float, with gradients of its weights; the median of 20."""
    from qdeploy.numerics.quantizer import Quantizer

    net = copy.deepcopy(unit)
    for module in net.modules():
        if isinstance(module, Quantizer):
            module.mode = "float"
    for parameter in net.parameters():
        parameter.requires_grad_()
    given, wanted = ([t[:batch].clone() for t in several] for several in (inputs, targets))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        losses = [nn.functional.mse_loss(made, want) for made, want in zip(net(*given), wanted, strict=True)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def api_recipe(name: str, iterations: int) -> Any:
    """A named recipe with another number of iterations in its last step."""
    from dataclasses import replace

    from qdeploy.recipes.presets import RECIPES

    recipe = RECIPES[name]
    last = recipe.steps[-1]
    return replace(recipe, steps=(*recipe.steps[:-1], replace(last, options=dict(last.options) | {"iterations": iterations})))


def depth(zoo: ModuleType, iterations: int) -> str:
    """Time and memory of a reconstruction against the depth of the network, with random weights."""
    rows = [["layers", "blocks", "reconstruction", "seconds a block", "memory before", "peak in reconstruction", "more by"]]
    for blocks in (3, 9, 18):
        script = [sys.executable, __file__, "--zoo", str(zoo.__file__), "--part", "depth"]
        environment = os.environ | {"BENCH_DEPTH": str(blocks), "BENCH_ITERATIONS": str(iterations)}
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
        seconds, count, before, peak = json.loads(done.stdout.splitlines()[-1])
        memory = [f"{before} MiB", f"{peak} MiB", f"{peak - before} MiB"]
        rows.append([str(6 * blocks + 2), str(count), f"{seconds:.1f} s", f"{seconds / count:.2f}", *memory])
    what = f"qdrop, W4A4, {iterations} iterations, 256 images, random weights. (`--part depth`)"
    means = "Memory is that of the process, when the first block begins and at its highest until the last has ended."
    return f"### Reconstruction against depth\n\n{what} {means}\n\n{table(rows)}"


def depth_child(zoo: ModuleType, blocks: int, iterations: int) -> None:
    """Print seconds, blocks, and memory in MiB before reconstruction and at its peak, of one depth; needs Linux."""
    from qdeploy.recipes import blockwise

    torch.manual_seed(0)
    model = zoo.ResNetCifar(blocks).eval()
    images = calibration_images(zoo, 256)
    prepared = api.prepare(model, images[:8], "academic", api_recipe("qdrop", iterations), **widths(4, 4))
    before: list[int] = []
    step = blockwise._Walk.step

    def watched(walk: Any, number: int, region: Any) -> None:
        if not before:
            before.append(resident("VmRSS"))
            Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
        step(walk, number, region)

    blockwise._Walk.step = watched  # type: ignore[method-assign]
    api.calibrate(prepared, torch.split(images, BATCH))
    (entry,) = [e for e in prepared.log if e["step"] == "qdrop"]
    print(json.dumps([entry["seconds"], int(entry["reason"].split()[0]), before[0], resident("VmHWM")]))


def resident(kind: str) -> int:
    """Resident memory of this process in MiB, now (`VmRSS`) or at its highest (`VmHWM`)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) // 1024


def kills() -> str:
    """Kill a short run at random moments, resume it, and compare the bytes of what it writes with those of an uninterrupted one."""
    place = Path(tempfile.mkdtemp(prefix="qdeploy-kills-"))
    root = Path(__file__).resolve().parent.parent
    recipe = place / "short.toml"
    recipe.write_text('[[step]]\nname = "ranges"\n[[step]]\nname = "qdrop"\niterations = 200\nsamples = 256\n')
    command = [
        sys.executable,
        "-c",
        "from qdeploy.cli.main import main; main()",
        "quantize",
        str(root / "samples/digits.pt2"),
        "--backend",
        "academic",
    ]
    command += ["--data", str(root / "samples/digits_calibration.npz"), "--recipe", str(recipe), "--weight-bits", "4", "--quiet"]
    command += ["--runtime", "onnxruntime", "--out"]
    start = time.monotonic()
    subprocess.run([*command, str(place / "whole")], check=True, cwd=root)
    whole = time.monotonic() - start
    wanted = contents(place / "whole")
    draw = random.Random(0)
    same = kept = 0
    for number in range(KILLS):
        out = place / f"out{number}"
        # where the shell ignores interrupts, so would the process
        heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen([*command, str(out)], cwd=root, preexec_fn=heed)
        time.sleep(draw.uniform(0.2, 0.95) * whole)
        process.send_signal(draw.choice((signal.SIGKILL, signal.SIGINT)))
        process.wait()
        kept += len(list((place / f".out{number}.work").rglob("*.safetensors")))
        subprocess.run([*command, str(out), "--resume"], check=True, cwd=root)
        same += contents(out) == wanted
    shutil.rmtree(place)
    what = f"A short qdrop run ({whole:.0f} s), killed {KILLS} times at random moments and resumed. (`--part kills`)"
    title = f"### Interrupted runs\n\n{what}"
    return f"{title}\n\n{same} of {KILLS} resumed runs end in the same bytes; {kept} finished blocks were taken up again."


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of an artifact."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    if "BENCH_DEPTH" in os.environ:
        path = Path(sys.argv[sys.argv.index("--zoo") + 1])
        depth_child(load_zoo(path), int(os.environ["BENCH_DEPTH"]), int(os.environ["BENCH_ITERATIONS"]))
    else:
        main()
