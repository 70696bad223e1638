"""Measure every target on real networks: simulated accuracy, and agreement with the emitted file in ONNX Runtime.

    python tools/bench_targets.py --zoo ../shared/models/zoo.py --write docs/benchmarks.md

All targets are quantized in one go: one capture, one pass over the calibration images. A target that has 16 bits for weights and for
activations is measured with them as well. `--part cost` measures what a second target adds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

from bench_pipeline import BATCH, NETWORKS, RECIPE, batches, calibration_images, load_zoo, machine, replace_block, table, timed

from qdeploy import api
from qdeploy.core.backend import Backend, backends
from qdeploy.simulation.prepared import Prepared

RUNTIME = "onnxruntime:all"
WIDE = 16
PAIR = ("snpe", "tensorrt")


def main() -> None:
    """Run the chosen parts and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--part", choices=("matrix", "cost"), action="append")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--backends", default=",".join(backends.names()))
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4000, help="validation images")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if not args.zoo.is_file():
        print(f"skipped: the networks of '{args.zoo}' are not here")
        return
    zoo = load_zoo(args.zoo)
    networks, names = args.networks.split(","), args.backends.split(",")
    parts = {
        "matrix": lambda: matrix(zoo, networks, names, args.calibration, args.samples),
        "cost": lambda: cost(zoo, networks, args.calibration),
    }
    for part, run in parts.items():
        if not args.part or part in args.part:
            text = f"{run()}\n\n{machine()}"
            print(text, end="\n\n", flush=True)
            if args.write:
                replace_block(args.write, f"bench_targets {part}", text)


def matrix(zoo: ModuleType, networks: Sequence[str], names: Sequence[str], count: int, samples: int) -> str:
    """One row a target and network."""
    rows = [["network", "target", "weights", "activations", "float", "simulated", "drop", "agreement", "SQNR"]]
    for network in networks:
        for bits in (None, WIDE):
            chosen = [backends[name] for name in names if bits is None or has(backends[name], bits)]
            if chosen:
                images = calibration_images(zoo, count)
                several = api.prepare_all(zoo.load(network), images[:2], chosen, recipe=RECIPE, weight_bits=bits, activation_bits=bits)
                api.calibrate_all(several, batches(images))
                rows += [row(zoo, network, prepared, bits, samples) for prepared in several]
    text = (
        f"{count} calibration images of `train`, recipe `{RECIPE}`; {samples} images of `val`. Agreement: top-1 of the simulation with "
        "that of the emitted file (model.sim.onnx, where there is one) in ONNX Runtime; `exact`: all outputs equal up to float "
        "rounding (over 120 dB).\n\n"
    )
    return f"### Every target\n\n{text}{table(rows)}"


def has(backend: Backend, bits: int) -> bool:
    """Whether a target can do `bits` throughout, besides its default."""
    default = backend.weight.bits == backend.activation.bits == bits
    return not default and bits in backend.weight_bits and bits in backend.activation_bits


def row(zoo: ModuleType, network: str, prepared: Prepared, bits: int | None, samples: int) -> list[str]:
    """One target's row; `bits` where they are not the target's default."""
    images, labels = (part[:samples] for part in zoo.data("val"))
    with tempfile.TemporaryDirectory() as folder:
        artifact = api.convert(prepared, Path(folder) / "out")
        report = api.verify(artifact, batches(images, BATCH * 4), RUNTIME, labels, prepared)
    plain, simulated, made = report.results
    assert plain.accuracy is not None and simulated.accuracy is not None and made.agreement is not None and made.sqnr is not None
    target = prepared.backend
    cells = [
        network,
        target.name,
        replace(target.weight, bits=bits or target.weight.bits).describe(),
        replace(target.activation, bits=bits or target.activation.bits).describe(),
        f"{plain.accuracy:.2%}",
        f"{simulated.accuracy:.2%}",
        f"{100 * (plain.accuracy - simulated.accuracy):+.2f}",
        f"{made.agreement:.2%}",
        "exact" if made.sqnr > 120 else f"{made.sqnr:.0f} dB",
    ]
    print(*cells, *report.faults, sep=" | ", flush=True)
    return cells


def cost(zoo: ModuleType, networks: Sequence[str], count: int) -> str:
    """Prepare, calibrate and convert for two targets, over the same for one."""
    rows = [["network", *(f"{name} alone" for name in PAIR), "both", "both over the mean of one"]]
    for network in networks:
        model, images = zoo.load(network), calibration_images(zoo, count)
        ways: list[tuple[str, ...]] = [(PAIR[0],), (PAIR[1],), PAIR]
        taken: list[list[float]] = [[] for _ in ways]
        for repeat in range(6):
            for names, times in zip(ways, taken, strict=True):
                seconds = timed(partial(whole, model, images, names))
                if repeat:  # the first round warms up
                    times.append(seconds)
        first, second, both = (statistics.median(times) for times in taken)
        rows.append([network, f"{first:.2f} s", f"{second:.2f} s", f"{both:.2f} s", f"{2 * both / (first + second):.2f}"])
    return f"### A second target\n\nCapture, calibration with {count} images, and writing; without verification.\n\n{table(rows)}"


def whole(model: object, images: object, names: Sequence[str]) -> None:
    """The main job for some targets."""
    several = api.prepare_all(model, images[:2], names, recipe=RECIPE)  # type: ignore[arg-type, index]
    api.calibrate_all(several, batches(images))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        for prepared in several:
            api.convert(prepared, Path(folder) / prepared.backend.name)


if __name__ == "__main__":
    main()
