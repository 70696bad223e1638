"""Verdicts: good artifacts pass, whichever samples they are tried on, and real faults fail on 64 of them."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import qdeploy
from qdeploy.export.artifact import Artifact
from qdeploy.files.data import array_specs, open_data
from qdeploy.files.model import load_model
from qdeploy.runtimes.runtime import Session, find_runtime, runtimes
from qdeploy.verification.session import LITERAL, REFERENCE, BatchedSession
from qdeploy.verification.verdict import FAILED, PASSED, UNDECIDED, Asked, Comparison, Output
from qdeploy.verification.verify import _asked, _known, _saved, verify_artifact

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
ZOO = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "zoo.py"


def output(name: str = "y", step: float = 1.0, quantization: float = 30.0, spread: float = 10.0, peak: float = 4.0) -> Output:
    return Output(name=name, step=step, quantization=quantization, spread=spread, peak=peak)


def compared(simulated: np.ndarray, made: np.ndarray, known: Output | None = None) -> Comparison:
    comparison = Comparison([known or output()])
    comparison.add([simulated], [made], None)
    return comparison


HEXAGON = Asked(min_agreement=0.97, room=3.0)
LEVEL = 0.01 / 6
"""Of one test in a report of three runtimes with classes."""


def scores(random: np.random.Generator, samples: int, near: float) -> np.ndarray:
    """Simulated outputs of 10 classes on a grid of 0.1, of which a share has two classes at the top within a step."""
    values = random.normal(0, 4, (samples, 10))
    top = values.argmax(1)
    values[np.arange(samples), top] += 3
    tied = random.random(samples) < near
    values[tied, (top[tied] + 1) % 10] = values[tied, top[tied]] - random.uniform(0, 0.1, tied.sum())
    return np.round(values / 0.1) * 0.1


def rounded_otherwise(random: np.random.Generator, simulated: np.ndarray) -> np.ndarray:
    """What the Hexagon makes of them: four of ten codes are a step or two away."""
    return simulated + 0.1 * random.choice([-2, -1, 0, 1, 2], simulated.shape, p=[0.05, 0.15, 0.6, 0.15, 0.05])


def test_three_near_ties_among_64_samples_are_no_failure() -> None:
    random = np.random.default_rng(0)
    simulated = scores(random, 64, 0.0)
    made = rounded_otherwise(random, simulated)
    for row in range(3):
        first, second = np.argsort(simulated[row])[:-3:-1]
        simulated[row, second] = simulated[row, first] - 0.1
        made[row, [first, second]] = simulated[row, [second, first]]
    comparison = compared(simulated, made, output(step=0.1, spread=0.6))
    verdict = comparison.judged(HEXAGON, LEVEL)
    assert comparison.agreement == 61 / 64 and comparison.disagreements(3.0) == 0
    assert (verdict.word, verdict.faults, verdict.remarks) == (PASSED, (), ("3 near-ties",))


def test_real_disagreements_fail_with_many_samples_and_ask_for_more_with_few() -> None:
    known = output(step=0.1, spread=0.6, quantization=0.0)
    random = np.random.default_rng(1)
    simulated = scores(random, 6400, 0.0)
    made = rounded_otherwise(random, simulated)
    for row in range(0, 6400, 20):  # one in twenty, far apart
        made[row] = simulated[row] + 0.0
        first, second = np.argsort(simulated[row])[:-3:-1]
        simulated[row, second] = simulated[row, first] - 3
        made[row, second] = simulated[row, first] + 1
    few, many = (compared(simulated[:n], made[:n], known) for n in (64, 6400))
    verdict = few.judged(HEXAGON, LEVEL)
    assert few.disagreements(3.0) == 4 and verdict.word == UNDECIDED and not verdict.faults
    (remark,) = verdict.remarks
    assert remark.startswith("not enough samples to tell: top-1 agreement 93.75% lies between 79.6% and 99.2%, 97.0% are asked; about ")
    needed = int(remark.split("about ")[-1].split()[0])
    told = compared(np.tile(simulated[:64], (needed // 64 + 1, 1)), np.tile(made[:64], (needed // 64 + 1, 1)), known)
    assert told.judged(HEXAGON, LEVEL).word == FAILED
    assert many.judged(HEXAGON, LEVEL).faults[0].startswith("top-1 agreement 95.00% (at most 9")


def test_a_fault_does_not_excuse_its_disagreements_by_its_own_size() -> None:
    random = np.random.default_rng(2)
    simulated = scores(random, 64, 0.0)
    made = simulated + random.normal(0, 6, simulated.shape)
    comparison = compared(simulated, made, output(step=0.1, spread=0.6))
    assert comparison.spread > 10 and comparison.disagreements(3.0) > 20
    assert comparison.judged(HEXAGON, LEVEL).word == FAILED


def test_false_alarms_of_good_runtimes_are_rarer_than_one_in_a_hundred() -> None:
    random = np.random.default_rng(3)
    words: Counter[str] = Counter()
    flips = old = 0
    for draw in range(2000):
        simulated = scores(random, 64, near=0.1 * (draw % 5))
        comparison = compared(simulated, rounded_otherwise(random, simulated), output(step=0.1, spread=0.6))
        words[comparison.judged(HEXAGON, LEVEL).word] += 1
        flips += len(comparison.margins)
        old += len(comparison.margins) > 0.03 * 64
    assert flips > 2 * 2000 and old > 1000, "these draws are hard: by their flips alone most would fail"
    assert words[FAILED] / 2000 < 0.01 and words[UNDECIDED] / 2000 < 0.05, words


def test_disagreement_at_what_is_asked_fails_less_than_once_in_a_hundred_reports() -> None:
    random = np.random.default_rng(4)
    simulated = scores(random, 64, 0.0)
    other = np.roll(simulated, 1, 1)
    failed = 0
    for _ in range(2000):
        wrong = random.random(64) < 0.03
        comparison = compared(simulated, np.where(wrong[:, None], other, simulated), output(step=0.1, spread=0.6, quantization=0.0))
        failed += any("agreement" in fault for fault in comparison.judged(HEXAGON, LEVEL).faults)
    assert failed / 2000 < 0.01


def test_one_sample_that_is_far_off_asks_for_more_samples_and_all_of_them_fail() -> None:
    simulated = np.random.default_rng(5).normal(0, 1, (64, 3, 4))
    made = simulated.copy()
    made[7] *= 3
    verdict = compared(simulated, made).judged(HEXAGON, LEVEL)
    assert verdict.word == UNDECIDED and "comes from few samples" in verdict.remarks[0]
    assert compared(simulated, 1.2 * simulated).judged(HEXAGON, LEVEL).faults == ("SQNR 14.0 dB is below 27 dB",)
    assert compared(simulated[:1], 1.2 * simulated[:1]).judged(HEXAGON, LEVEL).word == FAILED


def test_a_small_output_is_not_hidden_by_a_large_one() -> None:
    random = np.random.default_rng(6)
    boxes, classes = 1000 * random.normal(size=(64, 50, 4)), random.normal(size=(64, 50, 6))
    comparison = Comparison([output("boxes", peak=4000.0), output("classes", peak=4.0)])
    comparison.add([boxes, classes], [boxes, random.permutation(classes)], None)
    assert comparison.judged(HEXAGON, LEVEL).faults[0].startswith("output 'classes': SQNR ")
    assert comparison.sqnr(0) == 999 and comparison.sqnr(1) < 0


def test_an_almost_silent_output_is_compared_in_steps() -> None:
    random = np.random.default_rng(7)
    silent = 0.1 * random.choice([0, 0, 0, 1], (64, 20, 2))
    known = output(step=0.1, peak=25.5)
    close = compared(silent, silent + 0.1 * random.choice([0, 0, 1], silent.shape), known)
    verdict = close.judged(HEXAGON, LEVEL)
    assert close.sqnr(0) < 5 and verdict.word == PASSED and "is almost silent" in verdict.remarks[0]
    assert compared(silent, silent + 1.0, known).judged(HEXAGON, LEVEL).word == FAILED
    nothing = np.zeros((64, 20, 2), np.float32)
    float_zero = Output.seen("y", nothing, nothing, None, loudest=1.0)
    assert compared(nothing, nothing + 1e-9, float_zero).judged(HEXAGON, LEVEL).word == PASSED
    assert compared(nothing, nothing + 1e-3, float_zero).judged(HEXAGON, LEVEL).word == FAILED


def test_infinities_in_the_same_places_are_no_fault() -> None:
    masked = np.where(np.eye(8) > 0, -np.inf, np.random.default_rng(8).normal(size=(8, 8)))
    assert compared(masked, masked + 1e-7).judged(HEXAGON, LEVEL).word == PASSED
    assert compared(masked, np.maximum(masked, -1e4)).judged(HEXAGON, LEVEL).word == FAILED


def misread(path: Path, fault: str) -> onnx.ModelProto:
    """The file with one number wrong, as a runtime would read it that has this fault."""
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    what, *names = fault.split()

    def put(name: str, value: np.ndarray) -> None:
        tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(value, numpy_helper.to_array(tensors[name]).dtype), name))

    def number(name: str) -> np.ndarray:
        return numpy_helper.to_array(tensors[name]).copy()

    if what == "swap":
        first, second = (nodes[f"{name}_DequantizeLinear"].input[1] for name in names)
        one, other = number(first), number(second)
        put(first, other)
        put(second, one)
    elif what == "double":
        scale = nodes[f"{names[0]}_DequantizeLinear"].input[1]
        put(scale, 2 * number(scale))
    else:  # the nodes that read it take another zero point than those that write it
        node = nodes[f"{names[0]}_DequantizeLinear"]
        zero = number(node.input[2]).astype(int)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(zero + (8 if zero < 128 else -8), np.uint8), "other_zero"))
        node.input[2] = "other_zero"
    return model


@cache
def _digits() -> dict[str, Path]:
    specs = array_specs(str(SAMPLES / "digits_calibration.npz"))
    assert specs is not None
    data = list(open_data(str(SAMPLES / "digits_calibration.npz"), specs).pick(256, 0).batches(32))
    several = networks.several(load_model(str(SAMPLES / "digits.pt2")), data, ("snpe", "openvino"))
    return {name: qdeploy.convert(prepared, networks.FOLDER / f"verdict-{name}").path for name, prepared in several.items()}


def spoilt(monkeypatch: pytest.MonkeyPatch, name: str, fault: str) -> None:
    """Make the runtime `name` read one number of its file wrongly."""
    runtime = runtimes[name]

    def opened(path: Path, batch: int, variant: str) -> Session:
        if variant == LITERAL:  # which stands for the simulation
            return runtime.open(path, batch, variant)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            onnx.save(misread(path, fault), copy)
            return runtime.open(copy, batch, variant)

    monkeypatch.setitem(runtimes._values, name, replace(runtime, open=opened, isolated=False))


FAULTS = (
    "swap blocks.0.pointwise.weight blocks.1.depthwise.weight",
    "swap images relu",
    "double blocks.1.depthwise.weight",
    "double classifier.weight",
    "zero blocks.0.depthwise.weight",
    "zero relu6_1",
    "zero images",
)
IGNORED = {("qnn_htp", "zero relu6_1")}
"""The Hexagon takes the zero point of a tensor from the node that writes it."""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("runtime", ["onnxruntime:all", "openvino:int8", "qnn_htp"])
def test_a_real_fault_fails_on_64_samples(runtime: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, _ = find_runtime(runtime)
    if not way.installed():
        pytest.skip(f"runtime '{way.name}' is not installed")
    if (way.name, fault) in IGNORED:
        pytest.skip("this runtime does not read that number")
    images = torch.from_numpy(np.load(SAMPLES / "digits_test.npz")["images"][:64])
    artifact = Artifact.open(_digits()["snpe"])
    good = verify_artifact(artifact, [images], runtime).results[-1]
    spoilt(monkeypatch, way.name, fault)
    bad = verify_artifact(artifact, [images], runtime).results[-1]
    assert (good.verdict, bad.verdict) == (PASSED, FAILED), (good, bad)


def draws(artifact: Artifact, name: str, images: np.ndarray, count: int) -> Counter[str]:
    """The verdicts on `count` draws of 64 of the `images`."""
    way, (variant, *_) = find_runtime(name)
    simulated, made = (
        BatchedSession(artifact, artifact.simulation, *which)([images])[0] for which in ((REFERENCE, LITERAL), (way.name, variant))
    )
    random, known, asked = np.random.default_rng(0), _known(artifact, _saved(artifact)), _asked(artifact, way)
    words: Counter[str] = Counter()
    for _ in range(count):
        chosen = random.integers(0, len(images), 64)
        comparison = Comparison(known)
        comparison.add([simulated[chosen]], [made[chosen]], None)
        words[comparison.judged(asked, LEVEL).word] += 1
    return words


@pytest.mark.parametrize(
    ("backend", "runtime"), [("snpe", "qnn_htp"), ("snpe", "openvino"), ("openvino", "openvino"), ("snpe", "onnxruntime")]
)
def test_a_good_artifact_passes_on_any_64_samples(backend: str, runtime: str) -> None:
    if not runtimes[runtime].installed():
        pytest.skip(f"runtime '{runtime}' is not installed")
    words = draws(Artifact.open(_digits()[backend]), runtime, np.load(SAMPLES / "digits_test.npz")["images"], 500)
    assert words[FAILED] == 0 and words[PASSED] > 0.99 * 500, words


@pytest.fixture(scope="module")
def residual() -> tuple[Artifact, np.ndarray]:
    """A ResNet-20 for the Hexagon, and images."""
    if not ZOO.is_file():
        pytest.skip("the pretrained networks are not beside the checkout")
    if not runtimes["qnn_htp"].installed():
        pytest.skip("runtime 'qnn_htp' is not installed")
    sys.path.insert(0, str(ZOO.parent))
    import zoo

    data = [(batch,) for batch in torch.split(zoo.data("train")[0][::16][:256], 32)]
    prepared = networks.several(zoo.load("resnet20"), data, ("snpe",))["snpe"]
    return qdeploy.convert(prepared, networks.FOLDER / "verdict-resnet20"), zoo.data("val")[0][:256].numpy()


@pytest.mark.slow
def test_a_good_residual_network_passes_on_the_hexagon_on_any_64_samples(residual: tuple[Artifact, np.ndarray]) -> None:
    words = draws(*residual[:1], "qnn_htp", residual[1], 500)
    assert words[FAILED] == 0 and words[PASSED] > 0.99 * 500, words


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["swap layer1.0.conv1.weight layer2.1.conv2.weight", "double layer3.1.conv1.weight", "zero layer2.0.conv1.weight"]
)
def test_a_real_fault_of_a_residual_network_fails_on_the_hexagon_on_64_samples(
    residual: tuple[Artifact, np.ndarray], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, images = residual
    spoilt(monkeypatch, "qnn_htp", fault)
    bad = verify_artifact(artifact, [torch.from_numpy(images[:64])], "qnn_htp").results[-1]
    assert bad.verdict == FAILED, bad
