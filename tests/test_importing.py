"""ONNX files as models: networks come back from a file as they were, and what cannot be read is refused by name."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnx_networks
import onnxruntime
import pytest
import torch
from onnx_networks import written
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules.conv import _ConvNd

import qdeploy
from qdeploy.capture.capture import Captured, capture
from qdeploy.cli.main import main
from qdeploy.core.errors import CaptureError, InputError, QDeployError
from qdeploy.core.ops import ACTIVATION, COMPUTE, MAX_POOL
from qdeploy.files.model import load_model
from qdeploy.graph import query

ALL = {*networks.NETWORKS, *onnx_networks.NETWORKS}
LIKE_OTHERS = ("concat", "mobile", "plain", "residual", "several", "mlp", "shuffle")
"""Networks whose ops others have too, or that other tests read from files of the older exporter."""

NEWER = (18, True)
"""Opset and exporter of files where it is not about them."""


def network(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if name in networks.NETWORKS:
        return networks.network(name), networks.batches(name, count=1, batch=3)[0]
    net, example = onnx_networks.network(name)
    return net, (example,)


def exported(name: str, opset: int = 18, dynamo: bool = True, fixed: bool = False) -> Path:
    """The ONNX file of a network, written once a process: by the newer exporter of torch, or by the older one."""
    path = networks.FOLDER / f"{name}-{opset}-{dynamo}-{fixed}-{os.getpid()}.onnx"
    if path.exists():
        return path
    net, data = network(name)
    data = tuple(t[:1] for t in data) if fixed else data
    names = [f"in{at}" for at in range(len(data))]
    if dynamo:
        shapes = None if fixed else tuple({0: Dim("batch")} for _ in data)
        options = {"dynamo": True, "verbose": False, "dynamic_shapes": shapes, "external_data": False}
    else:
        options = {"dynamo": False, "input_names": names, "dynamic_axes": None if fixed else {n: {0: "batch"} for n in names}}
    torch.onnx.export(net, data, str(path), opset_version=opset, **options)
    return path


def program(path: Path) -> ExportedProgram:
    loaded = load_model(path)
    assert isinstance(loaded, ExportedProgram)
    return loaded


@cache
def imported(name: str, opset: int, dynamo: bool) -> ExportedProgram:
    """The program in the file of a network, read once a process: not to be changed."""
    return program(exported(name, opset, dynamo))


@cache
def recaptured(name: str, opset: int, dynamo: bool) -> Captured:
    """Its graph: not to be changed."""
    return capture(imported(name, opset, dynamo), network(name)[1])


def kinds(captured: Captured) -> list[str]:
    """The layers, activations and norms of a graph, in order; what is only moved may be spelled in many ways."""
    found = [query.op_of(node) for node in captured.module.graph.nodes if node.op == "call_function"]
    return [op.name for op in found if op.name in COMPUTE | ACTIVATION | MAX_POOL or op.name.endswith(("group_norm", "instance_norm"))]


def weights(captured: Captured) -> set[str]:
    """The names of the weights of layers."""
    found = {query.argument(node, query.op_of(node).weight) for node in captured.module.graph.nodes if node.op == "call_function"}
    return {query.tensor_name(node) for node in found if node is not None and node.op == "get_attr"}


def layers(net: nn.Module) -> set[str]:
    """The names that they have in torch."""
    return {f"{path}.weight" for path, module in net.named_modules() if isinstance(module, _ConvNd | nn.Linear)}


def agree(net: nn.Module, loaded: ExportedProgram, data: tuple[Tensor, ...]) -> None:
    module = loaded.module()
    for batch in (data, tuple(torch.cat([t, t.flip(0)])[:5] for t in data)):
        got, wanted = networks.flat(module(*batch)), networks.flat(net(*batch))
        assert len(got) == len(wanted)
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in sorted(ALL)])
def test_a_network_comes_back_with_its_values_an_open_batch_and_its_layers(name: str):
    net, data = network(name)
    agree(net, imported(name, *NEWER), data)
    back = recaptured(name, *NEWER)
    assert back.dynamic_batch
    if name not in ("attention", "vision"):  # attention is one op in torch, and spelled out in ONNX
        assert kinds(back) == kinds(capture(net, data))
        assert weights(back) == layers(net)


@pytest.mark.parametrize(
    ("name", "opset", "wanted"),
    [
        ("decoder", 18, {"down", "group", "silu", "up", "instance", "act"}),
        ("squeeze", 18, {"stem", "hardswish", "reduce", "relu", "expand", "hardsigmoid", "mish", "fc.weight"}),
        ("vision", 18, {"patch", "norm", "norm_1", "attention", "mlp.0", "mlp.1", "mlp.2", "fc.weight"}),
        ("shuffle", 13, {"stem", "branch.0", "branch.2", "branch.3", "fc.weight"}),
    ],
)
def test_tensors_are_named_after_the_modules_that_the_exporter_noted(name: str, opset: int, wanted: set[str]):
    captured = recaptured(name, opset, opset > 17)
    assert wanted <= {query.tensor_name(node) for node in captured.module.graph.nodes}


OLDER = [
    ("attention", 17),
    ("vision", 17),
    ("mlp", 11),
    ("decoder", 11),
    ("shuffle", 13),
    ("squeeze", 11),
    ("residual", 12),
    ("several", 9),
]


@pytest.mark.parametrize(("name", "opset"), OLDER)
def test_a_file_of_the_older_exporter_comes_back_too(name: str, opset: int):
    net, data = network(name)
    agree(net, imported(name, opset, False), data)
    back = recaptured(name, opset, False)
    assert back.dynamic_batch
    assert [spec.name for spec in back.inputs] == [f"in{at}" for at in range(len(data))]
    if name != "vision":
        assert weights(back) == layers(net)


@pytest.mark.parametrize(
    ("name", "dynamo"), [("plain", False), ("mixed", False), ("shuffle", True), pytest.param("mlp", True, marks=pytest.mark.slow)]
)
def test_a_fixed_batch_is_opened_where_samples_do_not_mix(name: str, dynamo: bool):
    net, data = network(name)
    captured = capture(program(exported(name, 18 if dynamo else 13, dynamo, fixed=True)), tuple(t[:1] for t in data))
    assert captured.dynamic_batch
    torch.testing.assert_close(networks.flat(captured.module(*data))[0], net(*data), rtol=1e-4, atol=1e-4)


def test_a_batch_that_cannot_be_opened_stays_fixed_with_a_note():
    net, data = network("vision")  # its class token is written for one sample
    one = tuple(t[:1] for t in data)
    captured = capture(program(exported("vision", fixed=True)), None)
    assert not captured.dynamic_batch and "the batch stays fixed at 1" in captured.notes[0]
    torch.testing.assert_close(networks.flat(captured.module(*one))[0], net(*one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0, 1.5], ids=["whole scale", "half scale"])
def test_other_open_sizes_stay_open_or_are_those_of_the_example_with_a_note(scale: float, tmp_path: Path):
    resize = 'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, "", s)'
    scales = np.array([1, 1, scale, scale], np.float32)
    path = written(tmp_path / "m.onnx", "float[N, 2, H, W] x", "float[N, 2, H2, W2] y", resize, s=scales)
    loaded, x = load_model(path), torch.rand(2, 2, 6, 8)
    assert isinstance(loaded, nn.Module) and not isinstance(loaded, ExportedProgram)
    captured, fixed = capture(loaded, x), capture(loaded, x, {})
    assert fixed.inputs[0].shape == (None, 2, 6, 8) and not fixed.notes
    if scale == 2:
        assert captured.inputs[0].names == {0: "batch", 2: "H", 3: "W"} and not captured.notes
        x = torch.rand(3, 2, 5, 11)
    else:
        assert captured.inputs == fixed.inputs and "does not leave 'H' open" in captured.notes[0]
    torch.testing.assert_close(networks.flat(captured.module(x))[0], nn.functional.interpolate(x, scale_factor=scale))


FLOATS = "float[N, 4] x"
BAD = {
    "an unknown operator": (
        "y = Det(x)",
        18,
        InputError,
        [
            "node 'Det0' (Det, domain ai.onnx, opset 18)",
            "which reads inputs only",
            "allowed: Abs, Add, ",
            "m.onnx:TENSOR,TENSOR'",
            "export it again",
        ],
    ),
    "another domain": ("y = com.acme.Relu(x)", 18, InputError, ["node 'Relu0' (Relu, domain com.acme, opset 1)", "not supported"]),
    "recurrent layers": ("y = GRU<hidden_size=3>(x, x, x)", 18, InputError, ["node 'GRU0' (GRU, domain ai.onnx", "recurrent layers"]),
    "a quantized file": (
        "q = QuantizeLinear(x, s, z)\n y = DequantizeLinear(q, s, z)",
        18,
        InputError,
        ["node 'QuantizeLinear0'", "quantized already", "give the float model"],
    ),
    "an old opset": ("y = Relu(x)", 6, InputError, ["an opset that is not supported", "found: 6", "allowed: 7 to "]),
    "an opset of the future": ("y = Relu(x)", 99, InputError, ["found: 99"]),
    "an unknown attribute": ("y = Relu<speed=3>(x)", 18, InputError, ["node 'Relu0' (Relu, ", "found: speed", "allowed: none"]),
    "an input from nowhere": ("y = Add(x, nothing)", 18, InputError, ["node 'Add0'", "nothing makes", "'nothing'"]),
    "a shape from data": (
        "i = Cast<to=7>(x)\n n = ReduceSum<keepdims=0>(i)\n u = Unsqueeze(n, a)\n y = Reshape(x, u)",
        18,
        CaptureError,
        ["node 'Reshape3' (Reshape, domain ai.onnx, opset 18)", "computed from the values of tensors"],
    ),
    "a setting that is not supported": (
        'y = Resize<mode="linear", antialias=1>(x, "", t)',
        18,
        CaptureError,
        ["node 'Resize0'", "this kind of resizing", "antialias 1"],
    ),
    "a second output": ("y, m = Dropout(x)\n n = Not(m)", 18, InputError, ["node 'Dropout0'", "output 1", "allowed: output 0"]),
    "an input too many": ("y = Relu(x, x)", 18, InputError, ["node 'Relu0'", "wrong number of inputs; found: 2", "allowed: 1 to 1"]),
    "shapes that do not fit": (
        "y = MatMul(x, w)",
        18,
        CaptureError,
        ["node 'MatMul0' (MatMul, ", "cannot be computed", "check the ONNX"],
    ),
    "constants that do not fit": ("c = Add(w, v)\n y = Mul(x, c)", 18, InputError, ["node 'Add0'", "cannot be computed"]),
    "half precision": ("h = Cast<to=10>(x)\n m = Mul(h, k)\n y = Cast<to=1>(m)", 18, InputError, ["not in float32", "FLOAT16 in 'k'"]),
    "an open batch that the graph closes": (
        "y = Reshape(x, r)",
        18,
        CaptureError,
        ["with an open batch", "export the ONNX file with a fixed"],
    ),
    "no outputs": ("", 18, InputError, ["returns nothing"]),
}
CONSTANTS = {
    "r": np.array([2, 4]),
    "k": np.float16(2),
    "s": np.float32(0.5),
    "z": np.uint8(0),
    "a": np.array([0]),
    "t": np.ones(2, np.float32),
    "w": np.ones((3, 5), np.float32),
    "v": np.ones((4, 2), np.float32),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_refused_with_the_node_and_what_is_supported(tmp_path: Path, name: str):
    body, opset, kind, words = BAD[name]
    constants = {k: v for k, v in CONSTANTS.items() if k in body.replace(")", " ").replace(",", " ").replace("(", " ").split()}
    path = written(tmp_path / "m.onnx", FLOATS, "float[N, M] y" if body else "", body, opset, **constants)
    with pytest.raises(QDeployError) as caught:
        load_model(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message and str(path) in message
    assert not [word for word in words if word not in message], message


DETECTOR = """
    y = Conv (x, w)
    flat = Reshape (y, shape)
    boxes = Transpose <perm = [0, 2, 1]> (flat)
    best = ReduceMax <keepdims = 0> (y, axis)
    scores = Reshape (best, row)
    chosen = NonMaxSuppression (boxes, scores, most, overlap, overlap)
    small = Less (size, most)
"""


def detector(path: Path) -> Path:
    constants = {"shape": np.array([0, 5, -1]), "axis": np.array([1]), "row": np.array([0, 1, -1]), "most": np.array([9])}
    w, overlap = np.random.default_rng(0).normal(size=(5, 3, 1, 1)).astype(np.float32), np.array([0.5], np.float32)
    inputs = "float[N, 3, 8, 8] x, int64[1] size"
    return written(path, inputs, "int64[M, 3] chosen, bool[1] small", DETECTOR, 18, **constants, w=w, overlap=overlap)


def test_a_detector_ends_before_its_boxes_are_sorted_out_and_keeps_the_names_of_its_outputs(tmp_path: Path) -> None:
    path = detector(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"\(NonMaxSuppression.*\), which reads 'boxes', 'scores'; .* end the model before them"):
        load_model(path)
    part = load_model(f"{path}:scores, boxes")
    x = torch.randn(2, 3, 8, 8)
    made = part.module()(x)  # type: ignore[union-attr]
    assert {name: tuple(t.shape) for name, t in made.items()} == {"scores": (2, 1, 64), "boxes": (2, 64, 5)}
    artifact = qdeploy.quantize(part, [x], "snpe", tmp_path / "out", recipe="plain")
    session = onnxruntime.InferenceSession(str(artifact.path / "model.onnx"))
    assert [value.name for value in session.get_inputs()] == ["x"]
    assert [value.name for value in session.get_outputs()] == ["scores", "boxes"]


@pytest.mark.parametrize(("end", "words"), [("scorse", "did you mean 'scores'?"), ("x", "cannot end at 'x'"), ("", "cannot end at ''")])
def test_a_part_must_end_at_what_a_node_makes(tmp_path: Path, end: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        load_model(f"{detector(tmp_path / 'm.onnx')}:{end}")


def test_recurrent_modules_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "m.onnx"
    torch.onnx.export(onnx_networks.Recurrent().eval(), (torch.rand(2, 5, 4),), str(path), opset_version=17, dynamo=False)
    with pytest.raises(InputError, match=r"\(LSTM, domain ai.onnx, opset 17\): recurrent layers are not supported"):
        load_model(path)


@pytest.mark.parametrize("damage", ["cut", "noise", "short tensor"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str):
    path = written(tmp_path / "m.onnx", FLOATS, "float[N, 4] y", "y = MatMul(x, w)", w=np.ones((4, 4), np.float32))
    whole = path.read_bytes()
    if damage == "short tensor":
        model = onnx.load(path)
        model.graph.initializer[0].raw_data = b"\0" * 7
        onnx.save(model, path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole[:40] + bytes(range(200, 256)) + whole[40:])
    with pytest.raises(InputError, match="again"):
        load_model(path)


def test_data_beside_the_file_is_read_and_no_other(tmp_path: Path):
    model = onnx.load(written(tmp_path / "m.onnx", FLOATS, "float[N, 3] y", "y = MatMul(x, w)", w=np.eye(4, 3, dtype=np.float32)))
    path = tmp_path / "outer" / "m.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    x = torch.rand(2, 4)
    torch.testing.assert_close(networks.flat(program(path).module()(x))[0], x[:, :3])
    (path.parent / "m.data").rename(tmp_path / "m.data")
    with pytest.raises(InputError, match=r"a file that is missing; found: no 'm.data', which holds the tensor 'w'"):
        load_model(path)
    bad = onnx.load(path, load_external_data=False)
    entry = next(entry for entry in bad.graph.initializer[0].external_data if entry.key == "location")
    for location in ("../m.data", str(tmp_path / "m.data")):
        entry.value = location
        path.write_bytes(bad.SerializeToString())
        with pytest.raises(InputError, match="a file outside of its folder"):
            load_model(path)
    entry.value = "m.data"
    path.write_bytes(bad.SerializeToString())
    (path.parent / "m.data").symlink_to(tmp_path / "m.data")
    with pytest.raises(InputError, match=r"a file outside of its folder; found: 'm\.data', a link to"):
        load_model(path)


def test_functions_of_the_file_are_inlined(tmp_path: Path):
    function = '<domain: "own", opset_import: ["" : 18]> twice (a) => (b) { two = Constant<value_float=2.0>()\n b = Mul(a, two) }'
    path = written(tmp_path / "m.onnx", FLOATS, "float[N, 4] y", "z = own.twice(x)\n y = own.twice(z)", functions=function)
    x = torch.rand(2, 4)
    torch.testing.assert_close(networks.flat(program(path).module()(x))[0], 4 * x)


def test_inputs_keep_their_names_whatever_python_allows(tmp_path: Path):
    path = written(tmp_path / "m.onnx", "float[N, 4] a, float[N, 4] b, float[N, 4] c", "float[N, 4] y", "z = Add(a, b)\n y = Mul(z, c)")
    model = onnx.load(path)
    names = dict(zip("abc", ("input.1", "class", "graph"), strict=True))
    for value in model.graph.input:
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, path)
    a, b, c = torch.rand(3, 2, 4)
    captured = capture(program(path), (a, b, c))
    assert [spec.name for spec in captured.inputs] == ["input.1", "class", "graph"]
    torch.testing.assert_close(networks.flat(captured.module(a, b, c))[0], (a + b) * c)


def test_the_command_line_quantizes_and_verifies_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = exported("mixed")
    images = torch.cat([batch[0] for batch in networks.batches("mixed")])
    np.savez(tmp_path / "x.npz", images=images.numpy())
    with pytest.MonkeyPatch.context() as patch:
        options = ["--recipe", "plain", "--runtime", "onnxruntime", "--out", str(tmp_path / "out")]
        patch.setattr("sys.argv", ["qdeploy", "quantize", "--backend", "snpe", str(path), "--data", str(tmp_path / "x.npz"), *options])
        with pytest.raises(SystemExit) as end:
            main()
    shown = capsys.readouterr()
    assert end.value.code in (0, None), shown.err
    assert "passed" in shown.out and "exact" in shown.out
    manifest = (tmp_path / "out" / "qdeploy.json").read_text()
    assert '"depthwise"' in manifest and '"stem.weight"' in manifest


def test_a_quantized_import_is_the_quantized_original():
    data, made = networks.batches("mixed"), []
    for model in (networks.network("mixed"), imported("mixed", *NEWER)):
        example = None if isinstance(model, ExportedProgram) else data[0]
        made.append(qdeploy.calibrate(qdeploy.prepare(model, example, "onnxruntime", recipe="plain"), data))
    for batch in data:
        ours, theirs = (networks.flat(prepared(*batch))[0] for prepared in made)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def _tiny(name: str = "w", size: int | str = "n", output: str = "y", **attributes: Any) -> onnx.ModelProto:
    """A convolution and a ReLU, with a weight called `name` and a batch of `size`."""
    conv = onnx.helper.make_node("Conv", ["x", name], ["c"], name="Conv0", **attributes)
    relu = onnx.helper.make_node("Relu", ["c"], ["y"], name="Relu0")
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [size, 1, 4, 4])
    made = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
    weight = onnx.numpy_helper.from_array(np.ones((2, 1, 3, 3), np.float32), name)
    graph = onnx.helper.make_graph([conv, relu], "g", [given], [made], [weight])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])


@pytest.mark.parametrize("name", ["None", "self", "torch", "class", "__class__", "a.None.b", "1", "é", "forward", "x=1", "inf"])
def test_names_that_generated_source_has_for_itself_are_names_like_others(name: str, tmp_path: Path) -> None:
    onnx.save(_tiny(name), tmp_path / "m.onnx")
    captured = capture(load_model(tmp_path / "m.onnx"), torch.ones(2, 1, 4, 4))
    torch.testing.assert_close(captured.module(torch.ones(2, 1, 4, 4))["y"], torch.full((2, 2, 2, 2), 9.0))


ODD = {
    "a size of -1": ({"size": -1}, "input 'x' has a size that no sample has; found: [-1, 1, 4, 4]"),
    "a batch of -5": ({"size": -5}, "a size that no sample has"),
    "a huge size": ({"size": 2**40}, "input 'x' is too large"),
    "a huge batch": ({"size": 10**9}, "input 'x' is too large"),
    "a missing output": ({"output": "z"}, "returns 'z'; found: a tensor that nothing makes"),
    "a name with a line break": ({"name": "w\n"}, r"has a name that cannot be used; found: 'w\n'"),
    "a very long name": ({"name": "w" * 5000}, "has a name that cannot be used"),
    "a dimension of code": ({"size": "n\nimport os"}, "has a name that cannot be used"),
    "an attribute of another type": ({"group": "x"}, "attribute 'group' is of the wrong type; found: STRING; allowed: INT"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_no_exporter_writes_is_refused_in_one_message(kind: str, tmp_path: Path) -> None:
    given, words = ODD[kind]
    onnx.save(_tiny(**given), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=re.escape(words)):
        load_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("text", [b"Conv0", b"Conv", b"Relu0", b"weight", b"samples", b"group", b"main_graph"])
def test_a_text_that_is_no_text_is_a_damaged_file(text: bytes, tmp_path: Path) -> None:
    """Protobuf hands over its bytes."""
    model = _tiny("weight", "samples", group=1)
    model.graph.name = "main_graph"
    whole = model.SerializeToString()
    assert text in whole
    (tmp_path / "m.onnx").write_bytes(whole.replace(text, b"\xff" + text[1:]))
    with pytest.raises(InputError, match=r"a damaged ONNX file .*no text in UTF-8"):
        load_model(tmp_path / "m.onnx")


def test_a_batch_of_no_samples_is_refused_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(_tiny(size=0), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.ones((4, 1, 4, 4), np.float32))
    given = [
        "quantize",
        str(tmp_path / "m.onnx"),
        "--backend",
        "snpe",
        "--data",
        str(tmp_path / "x.npy"),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr("sys.argv", ["qdeploy", *given])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "has a size that no sample has; found: [0, 1, 4, 4]; allowed: 1 or more" in capfd.readouterr().err
