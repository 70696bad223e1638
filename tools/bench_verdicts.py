"""Measure how often `verify` fails good artifacts and misses real faults, on 64 samples.

    python tools/bench_verdicts.py --zoo ../shared/models/zoo.py --write docs/verdicts.md

Good artifacts: the sample and real networks for several targets, on every runtime that is installed and differs from the simulation at
all. Their outputs are computed once; 64 of the samples are drawn again and again. Faults: one number of the file is changed in what the
runtime reads, layer by layer, and the first 64 samples are judged.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from bench_pipeline import load_zoo, machine, replace_block, table
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

from qdeploy import api
from qdeploy.export.artifact import Artifact
from qdeploy.files.model import load_model
from qdeploy.runtimes.runtime import find_runtime
from qdeploy.verification.session import LITERAL, REFERENCE, BatchedSession
from qdeploy.verification.verdict import ALARM, FAILED, MIN_SQNR, PASSED, UNDECIDED, Asked, Comparison, Output
from qdeploy.verification.verify import _asked, _known, _saved

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
TARGETS = ("snpe", "qnn", "openvino", "tensorrt", "ncnn", "mnn", "nnie", "academic", "adreno_fp16")
SUSPECTS = (("snpe", "onnxruntime:all"), ("openvino", "openvino:int8"), ("qnn", "qnn_htp"), ("snpe", "qnn_htp"))
DRAW = 64
ROWS = 3
"""Rows of a report, among whose tests its chance of a false alarm is divided."""
Array = NDArray[np.float32]
Edit = Callable[[onnx.ModelProto], None]


@dataclass
class Network:
    """A model with images to calibrate on, and others."""

    name: str
    model: nn.Module | ExportedProgram
    calibration: Tensor
    images: Array


def main() -> None:
    """Run the chosen parts and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="zoo.py of the real networks; without it, the sample alone")
    parser.add_argument("--part", choices=("good", "faults"), action="append")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = [
            (network, name, artifact) for network in networks(args.zoo, args.samples) for name, artifact in written(network, folder)
        ]
        parts = {"good": partial(good, made, args.draws), "faults": partial(faults, made)}
        for part, run in parts.items():
            if not args.part or part in args.part:
                text = f"{run()}\n\n{machine()}"
                print(text, end="\n\n", flush=True)
                if args.write:
                    replace_block(args.write, f"bench_verdicts {part}", text)


def networks(zoo: Path | None, samples: int) -> Iterator[Network]:
    """The sample and, where they are at hand, real networks."""
    with np.load(SAMPLES / "digits_calibration.npz") as file:
        calibration = torch.from_numpy(file["images"][:512])
    with np.load(SAMPLES / "digits_test.npz") as file:
        yield Network("digits", load_model(str(SAMPLES / "digits.pt2")), calibration, file["images"][:samples])
    if zoo is not None and zoo.is_file():
        there = load_zoo(zoo)
        images = there.data("train")[0]
        for name in ("resnet20", "mobilenetv2"):
            yield Network(name, there.load(name), images[:: len(images) // 512][:512], there.data("val")[0][:samples].numpy())


def written(network: Network, folder: str) -> Iterator[tuple[str, Artifact]]:
    """The artifacts of all targets."""
    example = None if isinstance(network.model, ExportedProgram) else network.calibration[:2]
    several = api.prepare_all(network.model, example, TARGETS, recipe="plain")
    for prepared in api.calibrate_all(several, torch.split(network.calibration, 32)):
        yield prepared.backend.name, api.convert(prepared, Path(folder) / f"{network.name}-{prepared.backend.name}")


def outputs(artifact: Artifact, runtime: str, variant: str, images: Array) -> Array:
    """The first output for all images."""
    session = BatchedSession(artifact, artifact.simulation, runtime, variant)
    return np.concatenate([session([part])[0] for part in np.split(images, range(50, len(images), 50))])


def judged(known: list[Output], simulated: Array, made: Array, asked: Asked) -> tuple[Comparison, str, bool]:
    """How these outputs compare, the verdict, and whether shares alone, and 20 dB, failed them, as before there were intervals."""
    compared = Comparison(known)
    compared.add([simulated], [made], None)
    word = compared.judged(asked, ALARM / (2 * ROWS)).word
    others = len(compared.margins)
    before = others > max(1, (1 - asked.min_agreement) * compared.samples) or compared.sqnr(0) < MIN_SQNR
    return compared, word, before


def good(made: list[tuple[Network, str, Artifact]], draws: int) -> str:
    """One row for each artifact and runtime with outputs of its own."""
    rows = [["network", "target", "runtime", "quantization", "runtime SQNR", "asked", "other top-1", "no near-tie"]]
    rows[0] += ["failed", "open", "before"]
    random, every = np.random.default_rng(0), Counter[str]()
    for network, target, artifact in made:
        known = _known(artifact, _saved(artifact))
        simulated = outputs(artifact, REFERENCE, LITERAL, network.images)
        for reference in artifact.manifest["runtimes"]:
            runtime, variants = find_runtime(reference)
            for variant in variants if runtime.installed() else ():
                try:
                    found = outputs(artifact, runtime.name, variant, network.images)
                except Exception as error:  # a vendor's library may raise anything
                    print(f"{network.name} for {target}: {runtime.name} cannot run: {error}", flush=True)
                    continue
                asked = _asked(artifact, runtime)
                whole, _, _ = judged(known, simulated, found, asked)
                if whole.sqnr(0) > 120:
                    continue
                words, before = Counter[str](), 0
                for _ in range(draws):
                    chosen = random.integers(0, len(simulated), DRAW)
                    _, word, old = judged(known, simulated[chosen], found[chosen], asked)
                    words[word] += 1
                    before += old
                every += words
                every["before"] += before
                rows.append(
                    [
                        network.name,
                        target,
                        runtime.name if len(runtime.variants) == 1 else f"{runtime.name}:{variant}",
                        f"{known[0].quantization:.1f} dB",
                        f"{whole.sqnr(0):.1f} dB",
                        f"{asked.sqnr(known[0]):.1f} dB",
                        f"{len(whole.margins)} of {len(simulated)}",
                        str(whole.disagreements(asked.room)),
                        f"{words[FAILED] / draws:.2%}",
                        f"{words[UNDECIDED] / draws:.2%}",
                        f"{before / draws:.2%}",
                    ]
                )
                print(*rows[-1], sep=" | ", flush=True)
    total = sum(every[word] for word in (PASSED, FAILED, UNDECIDED))
    text = (
        f"{draws} draws of {DRAW} samples each. `quantization`: the SQNR of the simulation to the float model. `open`: not enough "
        f"samples to tell. `before`: failed by shares of top-1 alone, and 20 dB, as they were judged once. In all, {every[FAILED]} of "
        f"{total} draws failed ({every[FAILED] / total:.2%}), {every[UNDECIDED]} stayed open ({every[UNDECIDED] / total:.2%}); before, "
        f"{every['before']} failed ({every['before'] / total:.2%}). Rows with over 120 dB are left out."
    )
    return f"### Good artifacts\n\n{text}\n\n{table(rows)}"


def faults(made: list[tuple[Network, str, Artifact]]) -> str:
    """One row for each artifact and runtime: what became of the faults that change its outputs by more than 1 dB."""
    rows = [
        ["network", "target", "runtime", "asked", "faults", "without effect", "louder than quantization", "of these failed", "open"]
    ]
    rows[0] += ["quieter than quantization", "of these failed"]
    missed = []
    for network, target, artifact in made:
        for wanted, reference in SUSPECTS:
            runtime, (variant, *_) = find_runtime(reference)
            if wanted != target or not runtime.installed():
                continue
            known, asked, images = _known(artifact, _saved(artifact)), _asked(artifact, runtime), network.images[:DRAW]
            simulated = outputs(artifact, REFERENCE, LITERAL, images)
            plain, _, _ = judged(known, simulated, outputs(artifact, runtime.name, variant, images), asked)
            counts: Counter[tuple[str, str]] = Counter()
            for name, edit in faults_of(artifact):
                model = onnx.load(artifact.simulation)
                edit(model)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.onnx"
                    onnx.save(model, path)
                    session = BatchedSession(artifact, path, runtime.name, variant)
                    compared, word, _ = judged(known, simulated, session([images])[0], asked)
                sqnr = compared.sqnr(0)
                same = math.isclose(sqnr, plain.sqnr(0), abs_tol=1)
                kind = "same" if same else "loud" if sqnr < known[0].quantization else "quiet"
                counts[kind, word] += 1
                if kind == "loud" and word != FAILED:
                    missed.append(f"{network.name} for {target} on {reference}: {name}, {sqnr:.1f} dB, {word}")
            loud, quiet, same = (sum(n for (kind, _), n in counts.items() if kind == which) for which in ("loud", "quiet", "same"))
            numbers = [
                sum(counts.values()),
                same,
                loud,
                counts["loud", FAILED],
                counts["loud", UNDECIDED],
                quiet,
                counts["quiet", FAILED],
            ]
            rows.append([network.name, target, reference, f"{asked.sqnr(known[0]):.1f} dB", *map(str, numbers)])
            print(*rows[-1], sep=" | ", flush=True)
    text = (
        f"{DRAW} samples. In five layers and tensors each: a zero point that is read 1 or 8 away, a scale of weights doubled or a "
        "tenth too large, that of one channel doubled, a zero point of weights 1 or 8 away; and scales of two layers, or of two "
        "tensors, swapped. "
        "`without effect`: within 1 dB of the runtime without the fault."
    )
    list_of = "".join(f"\n- {line}" for line in missed)
    return f"### Real faults\n\n{text}\n\n{table(rows)}\n\nLouder than quantization, and not failed:\n{list_of}"


def faults_of(artifact: Artifact) -> Iterator[tuple[str, Edit]]:
    """Faults by name, with what each does to the file."""
    model = onnx.load(artifact.simulation)
    nodes = {node.name: node for node in model.graph.node}
    number = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

    def readers(role: str) -> list[onnx.NodeProto]:
        named = [f"{e.tensor}_DequantizeLinear" for e in artifact.encodings if e.role == role]
        return [nodes[name] for name in named if name in nodes and len(nodes[name].input) > 2]

    def put(name: str, value: Array) -> Edit:
        def edit(changed: onnx.ModelProto) -> None:
            (tensor,) = [one for one in changed.graph.initializer if one.name == name]
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, number[name].dtype), name))

        return edit

    def shifted(node: onnx.NodeProto, by: int) -> Array:
        zero = number[node.input[2]].astype(int)
        limits = np.iinfo(number[node.input[2]].dtype)
        return np.where(zero + by <= limits.max, zero + by, zero - by)

    def read(node: onnx.NodeProto, by: int) -> Edit:
        def edit(changed: onnx.ModelProto) -> None:
            value = shifted(node, by).astype(number[node.input[2]].dtype)
            changed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), "misread"))
            (reader,) = [one for one in changed.graph.node if one.name == node.name]
            reader.input[2] = "misread"

        return edit

    def both(first: Edit, second: Edit) -> Edit:
        return lambda changed: (first(changed), second(changed))[0]

    def five(of: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        return [of[0], of[len(of) // 3], of[len(of) // 2], of[-2], of[-1]]

    activations, weights = readers("activation"), readers("weight")
    for node in five(activations):
        for by in (1, 8):
            yield f"zero point of '{node.output[0]}' read {by} away", read(node, by)
    for node in five(weights):
        scale = number[node.input[1]]
        for factor in (2.0, 1.1):
            yield f"scale of '{node.output[0]}' times {factor}", put(node.input[1], scale * np.float32(factor))
        if scale.ndim:
            one = scale.copy()
            one[len(one) // 2] *= 2
            yield f"scale of a channel of '{node.output[0]}' doubled", put(node.input[1], one)
        elif number[node.input[2]].any():
            for by in (1, 8):
                yield f"zero point of '{node.output[0]}' {by} away", put(node.input[2], shifted(node, by))
    for of in (weights, activations):
        for place in (0, len(of) // 3, len(of) // 2):
            first = of[place].input[1]
            others = (node.input[1] for node in of[place + 1 :])
            second = next(
                (n for n in others if number[n].shape == number[first].shape and not np.array_equal(number[n], number[first])), None
            )
            if second is not None:
                yield f"scales '{first}' and '{second}' swapped", both(put(first, number[second]), put(second, number[first]))


if __name__ == "__main__":
    main()
