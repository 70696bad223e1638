"""The five verbs, as the README promises them."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from functools import cache
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy import api
from qdeploy.core.backend import backends
from qdeploy.core.errors import InputError, OptionError, QDeployError
from qdeploy.core.recipe import Recipe, StepChoice
from qdeploy.export.artifact import Artifact
from qdeploy.simulation.prepared import Prepared

CONTRACT = {
    "prepare": ["model", "example_inputs", "backend", "recipe", "weight_bits", "activation_bits", "first_last_bits", "seed"],
    "calibrate": ["prepared", "batches"],
    "convert": ["prepared", "out"],
    "verify": ["out", "batches", "runtime"],
    "quantize": ["model", "batches", "backend", "out"],
}
DEFAULTS = {"recipe": "default", "weight_bits": None, "activation_bits": None, "first_last_bits": None, "seed": 0, "runtime": None}


def run_onnx(path: Path, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)})


@pytest.mark.parametrize("verb", CONTRACT)
def test_a_verb_takes_the_promised_arguments_first_and_the_rest_has_defaults(verb: str) -> None:
    parameters = inspect.signature(getattr(qdeploy, verb)).parameters
    assert list(parameters)[: len(CONTRACT[verb])] == CONTRACT[verb]
    options = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    assert all(p.default is not p.empty for name, p in parameters.items() if name not in CONTRACT[verb] and p not in options)
    assert {name: p.default for name, p in parameters.items() if name in DEFAULTS} == {
        n: DEFAULTS[n] for n in DEFAULTS if n in parameters
    }


def test_quantize_takes_the_options_of_prepare_by_keyword() -> None:
    prepare = list(inspect.signature(qdeploy.prepare).parameters)
    assert [*CONTRACT["prepare"][:3], *typing.get_type_hints(api.Options)] == prepare
    for verb in (qdeploy.quantize, api.prepare_all):
        (options,) = [p for p in inspect.signature(verb).parameters.values() if p.kind is p.VAR_KEYWORD]
        assert "Options" in str(options.annotation)


def test_the_package_offers_the_verbs_and_its_version_and_nothing_else() -> None:
    assert set(qdeploy.__all__) == {*CONTRACT, "__version__"}
    with pytest.raises(AttributeError, match="module 'qdeploy' has no attribute 'quantise'"):
        _ = qdeploy.quantise


@pytest.mark.parametrize("first", ["import qdeploy.api", "from qdeploy.verification.verify import Report"])
def test_the_verb_verify_is_not_hidden_by_its_module(first: str) -> None:
    code = f"import qdeploy; {first}; print(callable(qdeploy.verify), all(callable(getattr(qdeploy, v)) for v in {list(CONTRACT)}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.split() == ["True", "True"]


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, qdeploy; print('torch' in sys.modules, 'onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.split() == ["False", "False"]


def test_a_prepared_model_computes_in_float_until_it_is_calibrated() -> None:
    net, data = networks.network("several"), networks.batches("several")
    prepared = qdeploy.prepare(net, data[0], "snpe")
    assert isinstance(prepared, nn.Module)
    before, expected = prepared(*data[1]), net(*data[1])
    assert set(before) == {"scores", "map"}, "outputs keep their structure"
    for name, value in expected.items():
        torch.testing.assert_close(before[name], value, rtol=1e-5, atol=1e-5)
    assert qdeploy.calibrate(prepared, data) is prepared
    assert not torch.equal(prepared(*data[1])["scores"], expected["scores"])


def test_the_users_model_is_not_changed() -> None:
    net, data = networks.network("plain").train(), networks.batches("plain")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    qdeploy.calibrate(qdeploy.prepare(net, data[0], "openvino"), data)
    assert net.training and all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_the_plan_is_printed_with_a_reason_for_every_tensor() -> None:
    prepared = networks.prepared("plain", "tensorrt")
    lines = str(prepared.plan).splitlines()
    count = f"{len(prepared.plan.quantized)} of {len(prepared.plan.tensors)} tensors quantized"
    assert lines[0] == f"plan for tensorrt: {count}, 100.0 % of multiply-accumulates"
    assert lines[1].split() == ["tensor", "role", "op", "scheme", "why"]
    assert len(lines) == 2 + len(prepared.plan.tensors) and all(tensor.reason for tensor in prepared.plan.tensors)


def test_converting_before_calibration_is_an_error(tmp_path: Path) -> None:
    prepared = qdeploy.prepare(networks.network("plain"), networks.batches("plain")[0], "snpe")
    with pytest.raises(OptionError, match=r"the model is not calibrated; to do: call qdeploy\.calibrate first"):
        qdeploy.convert(prepared, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_calibrating_twice_is_an_error() -> None:
    with pytest.raises(OptionError, match="calibrated already; to do: prepare it again"):
        qdeploy.calibrate(networks.prepared("plain", "snpe"), networks.batches("plain"))


def test_no_data_is_an_error(tmp_path: Path) -> None:
    prepared = qdeploy.prepare(networks.network("plain"), networks.batches("plain")[0], "snpe")
    with pytest.raises(InputError, match="there is no calibration data"):
        qdeploy.calibrate(prepared, [])
    with pytest.raises(InputError, match="there is no calibration data"):
        qdeploy.quantize(networks.network("plain"), [], "snpe", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(2, 3, 9, 8), r"input 'x' has the wrong shape; found: \[2, 3, 9, 8\]; allowed: \[N, 3, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"input 'x' has the wrong shape; found: \[3, 8, 8\]"),
        (torch.zeros(0, 3, 8, 8), "input 'x' has the wrong shape"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.float64), "input 'x' has the wrong dtype; found: float64; allowed: float32"),
        ((torch.zeros(2, 3, 8, 8),) * 2, "wrong number of inputs; found: 2; allowed: 1"),
        ([np.zeros((2, 3, 8, 8), np.float32)], "input 'x' is no tensor; found: ndarray"),
        (torch.full((2, 3, 8, 8), torch.nan), "NaN"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error(batch: object, words: str) -> None:
    prepared = qdeploy.prepare(networks.network("plain"), networks.batches("plain")[0], "snpe")
    with pytest.raises(InputError, match=words):
        qdeploy.calibrate(prepared, [batch])


@pytest.mark.parametrize("net", [nn.ReLU(), nn.Sequential(nn.Sigmoid(), nn.Flatten())])
def test_a_network_without_a_layer_is_an_error(net: nn.Module) -> None:
    with pytest.raises(InputError, match="backend 'openvino' finds no layer to quantize; found: ops: "):
        qdeploy.prepare(net.eval(), torch.zeros(2, 3), "openvino")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "snpee"}, "did you mean 'snpe'"),
        ({"backend": "snpe", "recipe": "fats"}, "did you mean 'fast'"),
        ({"backend": "snpe", "weight_bits": 3}, "has no 3-bit weights"),
        ({"backend": "snpe", "activation_bits": 5}, "has no 5-bit activations"),
    ],
)
def test_an_option_that_there_is_not_is_an_error(options: dict[str, object], words: str) -> None:
    with pytest.raises(QDeployError, match=words):
        qdeploy.prepare(networks.network("plain"), networks.batches("plain")[0], **options)


@cache
def trainable() -> dict[str, Prepared]:
    """The plain network for every backend: each is changed by one test only."""
    return networks.several(networks.network("plain"), networks.batches("plain"), recipe="fast")


@pytest.mark.parametrize("backend", backends.names())
def test_training_goes_on_after_calibration_and_the_result_still_agrees(backend: str, tmp_path: Path) -> None:
    prepared = trainable()[backend]
    x = torch.cat([batch for (batch,) in networks.batches("plain")])
    target = torch.arange(len(x)) % 5
    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.005)
    before = nn.functional.cross_entropy(prepared(x), target)
    optimizer.zero_grad()
    before.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in prepared.parameters())
    optimizer.step()
    assert nn.functional.cross_entropy(prepared(x), target).item() < before.item()
    artifact = qdeploy.convert(prepared.eval(), tmp_path / "out")
    (made,) = run_onnx(artifact.simulation, (x,))
    (simulated,) = prepared.flat((x,))
    np.testing.assert_allclose(made, simulated, rtol=1e-5, atol=1e-5 * float(simulated.abs().max()))
    assert qdeploy.verify(artifact, runtime="onnxruntime").passed


@pytest.mark.parametrize("batch_type", [tuple, list])
def test_quantize_is_the_four_verbs_in_one(batch_type: type, tmp_path: Path) -> None:
    data = (batch_type(batch) for batch in networks.batches("several"))  # a stream, passed once
    artifact = qdeploy.quantize(networks.network("several"), data, backend="tensorrt", out=tmp_path / "out", recipe="fast", seed=4)
    assert isinstance(artifact, Artifact) and artifact.manifest["verify"]["passed"], artifact.manifest["verify"]
    assert (artifact.manifest["seed"], artifact.manifest["calibration_samples"], artifact.manifest["recipe"]["name"]) == (4, 32, "fast")
    assert [entry["name"] for entry in artifact.inputs] == ["stem", "side"] and len(artifact.outputs) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    prepared = networks.calibrated("several", "tensorrt", recipe="fast")
    assert [e.to_json() for e in artifact.encodings] == [e.to_json() for e in prepared.encodings()]


def test_quantize_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    data = [networks.batches("plain")[0], (torch.zeros(2, 3),)]
    with pytest.raises(InputError, match="wrong shape"):
        qdeploy.quantize(networks.network("plain"), data, backend="snpe", out=tmp_path / "out")
    with pytest.raises(OptionError, match="does not write format"):
        qdeploy.quantize(networks.network("plain"), data[:1], backend="snpe", out=tmp_path / "out", file_format="7")
    assert not list(tmp_path.iterdir())


def test_quantize_without_data_distills_images_of_the_example_and_keeps_finished_parts(tmp_path: Path) -> None:
    net, (x,) = networks.network("plain"), networks.batches("plain")[0]
    with pytest.raises(InputError, match="neither batches nor an example"):
        qdeploy.quantize(net, None, "snpe", tmp_path / "none")
    made = qdeploy.quantize(net, None, "snpe", tmp_path / "out", example_inputs=x[:2], recipe="fast")
    assert made.manifest["verify"]["passed"]
    steps = (StepChoice(step="qdrop", options={"iterations": 10, "samples": 16}),)
    short = Recipe(name="short", by_grid=True, steps=steps)
    for name, resume in (("first", False), ("again", True)):
        options: dict[str, Any] = {"recipe": short, "weight_bits": 4, "folder": tmp_path / "work", "resume": resume}
        made = qdeploy.quantize(net, networks.batches("plain"), "academic", tmp_path / name, **options)
        assert [entry["step"] for entry in made.manifest["steps"]] == ["qdrop"]
    assert list((tmp_path / "work").rglob("*.safetensors"))
