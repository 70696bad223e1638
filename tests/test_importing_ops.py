"""Every ONNX operator that can be imported computes what ONNX Runtime computes, on a graph of one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qdeploy.importing.program import load
from qdeploy.importing.read import supported

RANDOM = np.random.default_rng(5)


@dataclass(frozen=True)
class C:
    """An input that is a constant of the file."""

    array: np.ndarray


@dataclass
class Case:
    """One node: inputs (arrays of the data, or constants, or None for one left out), attributes, opset, and its outputs."""

    op: str
    inputs: Sequence[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    reference: bool = False  # ONNX's own evaluator, for what ONNX Runtime does not have


def case(op: str, *inputs: Any, opset: int = 18, outputs: int = 1, reference: bool = False, **attributes: Any) -> Case:
    return Case(op, inputs, attributes, opset, outputs, reference)


def f(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (np.abs(RANDOM.standard_normal(shape)) + 0.1).astype(np.float32)


def i(*numbers: Any) -> C:
    return C(np.array(numbers, dtype=np.int64))


def n(number: float, dtype: Any = np.float32) -> C:
    return C(np.array(number, dtype=dtype))


def whole(*shape: int, high: int = 5, low: int = 0) -> np.ndarray:
    return RANDOM.integers(low, high, shape).astype(np.int64)


def truth(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 2, shape).astype(bool)


X = f(2, 6, 9, 8)
R3 = f(2, 4, 10)
BN = [C(positive(6)), C(f(6)), C(f(6)), C(positive(6))]
SELF = ("Abs", "Neg", "Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish", "Mish", "Erf", "Exp", "Floor", "Ceil", "Round",
        "Sign", "Sin", "Cos", "Tan", "Atan", "IsNaN", "Identity")  # fmt: skip
PAIR = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Sum", "Mean")
REDUCE = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp")


def _elementwise() -> dict[str, Case]:
    cases = {name: case(name, 2 * X) for name in SELF}
    cases |= {name: case(name, positive(3, 4)) for name in ("Log", "Sqrt", "Reciprocal")}
    cases |= {name: case(name, f(3, 4), f(4)) for name in PAIR}
    cases |= {f"{name} of a number": case(name, f(3, 4), n(0.75)) for name in PAIR}
    cases |= {f"{name} of integers": case(name, whole(3, 4, low=-4), whole(4, low=1)) for name in ("Add", "Sub", "Mul", "Div", "Equal")}
    cases |= {name: case(name, truth(3, 4), truth(4)) for name in ("And", "Or", "Xor")}
    return cases | {
        "Not": case("Not", truth(3, 4)),
        "a number minus": case("Sub", n(1.0), f(3, 4)),
        "a number over": case("Div", n(1.0), positive(3, 4)),
        "Max of three": case("Max", f(3, 4), f(3, 4), n(0.1)),
        "Pow": case("Pow", positive(3, 4), f(3, 4)),
        "Pow of 2": case("Pow", f(3, 4), n(2.0)),
        "Pow of 3": case("Pow", f(3, 4), n(3, np.int64)),
        "Mod": case("Mod", whole(3, 4, low=-5), C(np.array([3, -2, 4, 5]))),
        "Mod like C": case("Mod", f(3, 4), C(positive(4)), fmod=1),
        "Clip": case("Clip", X, n(0.0), n(6.0)),
        "Clip without a top": case("Clip", X, n(0.0)),
        "Clip without a bottom": case("Clip", X, None, n(0.5)),
        "Clip 6": case("Clip", X, min=-0.5, max=0.25, opset=9),
        "Clip by data": case("Clip", X, np.float32(-0.3), np.float32(0.3)),
        "LeakyRelu": case("LeakyRelu", X, alpha=0.2),
        "PRelu": case("PRelu", X, C(positive(6, 1, 1))),
        "PRelu of one": case("PRelu", X, C(positive(1))),
        "PRelu of columns": case("PRelu", X, C(positive(8))),
        "PRelu of rows": case("PRelu", X, C(positive(9, 1))),
        "Elu": case("Elu", X, alpha=0.7),
        "Celu": case("Celu", X, alpha=0.7),
        "Selu": case("Selu", X),
        "Selu of other numbers": case("Selu", X, alpha=1.5, gamma=1.2),
        "ThresholdedRelu": case("ThresholdedRelu", X, alpha=0.4),
        "HardSigmoid": case("HardSigmoid", 3 * X),
        "HardSigmoid of torch": case("HardSigmoid", 3 * X, alpha=1 / 6, beta=0.5),
        "Gelu": case("Gelu", X, opset=20),
        "Gelu with tanh": case("Gelu", X, opset=20, approximate="tanh"),
        "Swish": case("Swish", X, opset=24, alpha=1.3, reference=True),
        "Softmax": case("Softmax", X, axis=1),
        "Softmax 11": case("Softmax", X, axis=2, opset=11),
        "LogSoftmax": case("LogSoftmax", X),
        "LogSoftmax 11": case("LogSoftmax", X, opset=11),
        "Cast": case("Cast", 3 * X, to=TensorProto.INT64),
        "Cast to bool": case("Cast", whole(3, 4), to=TensorProto.BOOL),
        "CastLike": case("CastLike", 3 * X, whole(1), opset=19),
        "Where": case("Where", truth(3, 4), f(3, 4), n(-1.0)),
        "Dropout": case("Dropout", X),
    }


def _layers() -> dict[str, Case]:
    w = C(f(4, 6, 3, 3))
    cases = {f"Conv {pad}": case("Conv", X, w, auto_pad=pad, strides=[2, 2]) for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")}
    cases |= {
        f"MaxPool {pad}": case("MaxPool", X, kernel_shape=[3, 2], auto_pad=pad, strides=[2, 2]) for pad in ("SAME_UPPER", "VALID")
    }
    cases |= {
        f"ConvTranspose {pad}": case("ConvTranspose", X, C(f(6, 4, 3, 3)), auto_pad=pad, strides=[2, 2])
        for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")
    }
    return cases | {
        "Conv": case("Conv", X, w, C(f(4)), pads=[1, 1, 1, 1], strides=[2, 1]),
        "Conv with uneven pads": case("Conv", X, w, pads=[0, 1, 2, 1]),
        "Conv of groups": case("Conv", X, C(f(6, 2, 3, 3)), group=3, dilations=[2, 1]),
        "Conv of one side": case("Conv", f(2, 4, 10), C(f(3, 4, 3)), C(f(3)), pads=[1, 1]),
        "Conv of three sides": case("Conv", f(1, 2, 5, 5, 5), C(f(3, 2, 3, 3, 3)), pads=[1] * 6),
        "Conv by data": case("Conv", X, f(4, 6, 3, 3)),
        "ConvTranspose": case("ConvTranspose", X, C(f(6, 4, 3, 3)), C(f(4)), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        "ConvTranspose of groups": case("ConvTranspose", X, C(f(6, 2, 3, 3)), group=2, dilations=[2, 1]),
        "ConvTranspose with uneven pads": case("ConvTranspose", X, C(f(6, 4, 3, 3)), strides=[2, 2], pads=[0, 1, 1, 0]),
        "ConvTranspose to a size": case("ConvTranspose", X, C(f(6, 4, 3, 3)), strides=[2, 2], output_shape=[18, 16]),
        "BatchNormalization": case("BatchNormalization", X, *BN, epsilon=1e-3),
        "BatchNormalization 9": case("BatchNormalization", X, *BN, opset=9),
        "LayerNormalization": case("LayerNormalization", X, C(f(8)), C(f(8))),
        "LayerNormalization of two": case("LayerNormalization", X, C(f(9, 8)), C(f(9, 8)), axis=2, epsilon=1e-3),
        "RMSNormalization": case("RMSNormalization", X, C(f(8)), opset=23, reference=True),
        "InstanceNormalization": case("InstanceNormalization", X, C(f(6)), C(f(6)), epsilon=1e-3),
        "GroupNormalization": case("GroupNormalization", X, C(f(6)), C(f(6)), num_groups=3, opset=21),
        "GroupNormalization 18": case("GroupNormalization", X, C(f(3)), C(f(3)), num_groups=3, opset=18),
        "LpNormalization": case("LpNormalization", X, axis=1),
        "LpNormalization of 1": case("LpNormalization", X, p=1),
        "GlobalAveragePool": case("GlobalAveragePool", X),
        "GlobalMaxPool": case("GlobalMaxPool", R3),
        "MaxPool": case("MaxPool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        "MaxPool rounding up": case("MaxPool", X, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, dilations=[2, 1]),
        "MaxPool with uneven pads": case("MaxPool", X, kernel_shape=[3, 3], pads=[0, 0, 1, 2], strides=[2, 2]),
        "MaxPool with wide pads": case("MaxPool", X, kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
        "MaxPool of one side": case("MaxPool", R3, kernel_shape=[2], strides=[2]),
        "AveragePool": case("AveragePool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        "AveragePool with pads": case("AveragePool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1, strides=[2, 2]),
        "AveragePool rounding up": case("AveragePool", X, kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1),
        "AveragePool rounding up with pads": case(
            "AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1] * 4, count_include_pad=1, opset=19
        ),
        "AveragePool with uneven pads": case("AveragePool", X, kernel_shape=[3, 3], pads=[0, 1, 1, 0]),
        "AveragePool SAME_UPPER": case("AveragePool", X, kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
    }


def _resizing() -> dict[str, Case]:
    s, cases = C(np.array([1, 1, 2, 3], np.float32)), {}
    for how in ("asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"):
        for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
            options = {"coordinate_transformation_mode": how, "nearest_mode": rounding}
            cases[f"Resize nearest {how} {rounding}"] = case("Resize", X, None, s, **options)
    for how in ("half_pixel", "align_corners", "pytorch_half_pixel"):
        for mode in ("linear", "cubic"):
            options = {"coordinate_transformation_mode": how, "mode": mode}
            cases[f"Resize {mode} {how}"] = case("Resize", X, None, s, **options)
            cases[f"Resize {mode} {how} to a size"] = case("Resize", X, None, None, i(2, 6, 5, 13), **options)
    return cases | {
        "Resize nearest to a size": case(
            "Resize", X, None, None, i(2, 6, 5, 13), coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        ),
        "Resize with axes": case("Resize", X, None, C(np.array([2, 2], np.float32)), axes=[2, 3], mode="linear"),
        "Resize linear down": case("Resize", X, None, None, i(2, 6, 3, 4), mode="linear"),
        "Resize 10": case("Resize", X, s, opset=10),
        "Upsample": case("Upsample", X, s, opset=9),
        "Upsample 7": case("Upsample", X, opset=7, scales=[1.0, 1.0, 2.0, 2.0], mode="nearest"),
    }


def _reducing() -> dict[str, Case]:
    cases = {}
    for name in REDUCE:
        cases[f"Reduce{name}"] = case(f"Reduce{name}", R3, i(1, -1))
        cases[f"Reduce{name} of all"] = case(f"Reduce{name}", R3, keepdims=0)
        cases[f"Reduce{name} of nothing"] = case(f"Reduce{name}", R3, noop_with_empty_axes=1)
        cases[f"Reduce{name} 11"] = case(f"Reduce{name}", R3, axes=[2], keepdims=0, opset=11)
    q, mask = f(2, 3, 5, 4), truth(2, 1, 5, 5) | np.eye(5, dtype=bool)
    return cases | {
        "MatMul": case("MatMul", R3, f(2, 10, 3)),
        "MatMul by a constant": case("MatMul", R3, C(f(10, 3))),
        "Gemm": case("Gemm", f(3, 4), C(f(4, 5)), C(f(5))),
        "Gemm transposed": case("Gemm", f(3, 4), C(f(5, 4)), C(f(1, 5)), transB=1, alpha=0.5, beta=2.0),
        "Gemm of data": case("Gemm", f(4, 3), f(5, 4), f(3, 5), transA=1, transB=1, beta=0.5),
        "Gemm without bias": case("Gemm", f(3, 4), C(f(5, 4)), transB=1),
        "Gemm with a bias of one": case("Gemm", f(3, 4), C(f(4, 5)), C(f(1))),
        "Gemm with a bias for rows": case("Gemm", f(3, 4), C(f(4, 5)), C(f(3, 1))),
        "Einsum": case("Einsum", f(2, 3, 4), f(2, 5, 4), equation="bik,bjk->bij"),
        "CumSum": case("CumSum", R3, n(1, np.int64)),
        "CumSum reversed": case("CumSum", R3, n(-1, np.int64), reverse=1, exclusive=1),
        "ArgMax": case("ArgMax", R3, axis=2),
        "ArgMax of the last": case("ArgMax", whole(3, 9, high=3).astype(np.float32), axis=1, keepdims=0, select_last_index=1),
        "ArgMin": case("ArgMin", R3, axis=-1, keepdims=0),
        "TopK": case("TopK", R3, i(3), outputs=2),
        "TopK of the smallest": case("TopK", R3, i(3), outputs=2, axis=1, largest=0),
        "Attention": case("Attention", q, f(2, 3, 5, 4), f(2, 3, 5, 4), opset=23, reference=True),
        "Attention with a mask": case("Attention", q, q, q, mask, opset=23, reference=True, scale=0.3),
        "Attention with added mask": case("Attention", q, q, q, f(5, 5), opset=23, reference=True, softcap=2.0),
        "Attention that is causal": case("Attention", q, q, q, opset=23, reference=True, is_causal=1),
        "Attention that is causal with a mask": case("Attention", q, q, q, mask, opset=23, reference=True, is_causal=1),
        "Attention that is causal with added mask": case("Attention", q, q, q, f(5, 5), opset=23, reference=True, is_causal=1),
        "Attention of groups": case("Attention", f(2, 6, 5, 4), q, q, opset=23, reference=True),
        "Attention in three dimensions": case(
            "Attention", f(2, 5, 12), f(2, 5, 6), f(2, 5, 6), opset=23, reference=True, q_num_heads=4, kv_num_heads=2
        ),
    }


def _shaping() -> dict[str, Case]:
    return {
        "Shape": case("Shape", X),
        "Shape in part": case("Shape", X, start=1, end=-1),
        "Size": case("Size", X),
        "Reshape": case("Reshape", X, i(0, -1, 8)),
        "Reshape with zero": case("Reshape", f(0, 3), i(3, 0), allowzero=1),
        "Flatten": case("Flatten", X),
        "Flatten from 2": case("Flatten", X, axis=2),
        "Flatten from -1": case("Flatten", X, axis=-1),
        "Flatten from 0": case("Flatten", X, axis=0),
        "Transpose": case("Transpose", X, perm=[0, 2, 3, 1]),
        "Transpose of all": case("Transpose", R3),
        "Squeeze": case("Squeeze", f(2, 1, 3, 1), i(1)),
        "Squeeze of all": case("Squeeze", f(2, 1, 3, 1)),
        "Squeeze 11": case("Squeeze", f(2, 1, 3, 1), axes=[1, 3], opset=11),
        "Unsqueeze": case("Unsqueeze", R3, i(0, -1)),
        "Unsqueeze 11": case("Unsqueeze", R3, axes=[2], opset=11),
        "Concat": case("Concat", f(2, 3), f(2, 4), C(f(2, 1)), axis=-1),
        "Split": case("Split", R3, i(3, 7), axis=2, outputs=2),
        "Split in parts": case("Split", R3, axis=2, num_outputs=4, outputs=4),
        "Split 13": case("Split", R3, axis=1, outputs=2, opset=13),
        "Split 11": case("Split", R3, axis=2, split=[2, 8], outputs=2, opset=11),
        "Slice": case("Slice", R3, i(1, 0), i(3, 9), i(1, 2), i(1, 3)),
        "Slice from the end": case("Slice", R3, i(-4), i(2**63 - 1), i(-1)),
        "Slice without axes": case("Slice", R3, i(0, 1), i(2, -1)),
        "Slice backwards": case("Slice", R3, i(-1), i(-(2**63)), i(2), i(-1)),
        "Slice backwards by two": case("Slice", R3, i(8), i(1), i(2), i(-2)),
        "Slice 9": case("Slice", R3, starts=[1], ends=[100], axes=[2], opset=9),
    }


def _picking() -> dict[str, Case]:
    picks, cells = whole(2, 4, 10, high=4, low=-4), C(np.array([[0, 1], [1, 3]]))
    return {
        "Gather": case("Gather", R3, i(2, 0), axis=1),
        "Gather of one": case("Gather", R3, n(-1, np.int64), axis=2),
        "Gather of a matrix": case("Gather", R3, C(np.array([[0, 2], [1, -1]])), axis=1),
        "Gather of rows": case("Gather", C(f(7, 3)), whole(2, 5)),
        "GatherElements": case("GatherElements", R3, picks, axis=1),
        "GatherND": case("GatherND", R3, cells),
        "ScatterND": case("ScatterND", R3, cells, f(2, 10)),
        "ScatterND that adds": case("ScatterND", R3, cells, f(2, 10), reduction="add"),
        "ScatterElements": case("ScatterElements", R3, C(np.arange(4).reshape(1, 4, 1)), f(1, 4, 1), axis=1),
        "Scatter": case("Scatter", R3, C(np.arange(4).reshape(1, 4, 1)), f(1, 4, 1), axis=1, opset=10),
        "ScatterElements that adds": case("ScatterElements", R3, whole(2, 4, 3), f(2, 4, 3), axis=2, reduction="add"),
        "Expand": case("Expand", f(3, 1), i(2, 1, 4)),
        "Expand to less": case("Expand", f(2, 3, 1), i(4)),
        "Tile": case("Tile", f(2, 3), i(2, 1)),
        "ConstantOfShape": case("ConstantOfShape", i(2, 3), value=numpy_helper.from_array(np.array([2.5], np.float32))),
        "ConstantOfShape of integers": case("ConstantOfShape", i(4), value=numpy_helper.from_array(np.array([2], np.int64))),
        "Range": case("Range", n(1, np.int64), n(9, np.int64), n(3, np.int64)),
        "Range of floats": case("Range", n(0.0), n(2.0), n(0.5)),
        "Pad": case("Pad", X, i(0, 1, 2, 0, 0, 1, 0, 3), n(0.5)),
        "Pad of axes": case("Pad", X, i(1, 2, 0, 1), None, i(-1, 2)),
        "Pad that cuts": case("Pad", X, i(0, 0, -1, 0, 0, 0, 0, -2)),
        "Pad by reflection": case("Pad", X, i(0, 0, 2, 1, 0, 0, 1, 3), mode="reflect"),
        "Pad by the edge": case("Pad", X, i(0, 0, 2, 1, 0, 0, 1, 3), mode="edge"),
        "Pad around": case("Pad", X, i(0, 0, 2, 1, 0, 0, 1, 3), mode="wrap", opset=19),
        "Pad of one side": case("Pad", R3, i(0, 0, 2, 0, 0, 1), mode="reflect"),
        "Pad 9": case("Pad", X, pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.25, opset=9),
        "DepthToSpace": case("DepthToSpace", f(2, 12, 3, 5), blocksize=2),
        "DepthToSpace by rows": case("DepthToSpace", f(2, 12, 3, 5), blocksize=2, mode="CRD"),
        "SpaceToDepth": case("SpaceToDepth", f(2, 3, 4, 6), blocksize=2),
        "Trilu": case("Trilu", R3, n(1, np.int64)),
        "Trilu below": case("Trilu", R3, upper=0),
        "OneHot": case("OneHot", whole(2, 3, low=-5), n(5, np.int64), C(np.array([-1, 2], np.float32))),
        "OneHot first": case("OneHot", whole(2, 3), n(5, np.int64), C(np.array([0, 1], np.float32)), axis=0),
        "EyeLike": case("EyeLike", f(3, 4)),
    }  # fmt: skip


CASES = _elementwise() | _layers() | _resizing() | _reducing() | _shaping() | _picking()


def write(path: Path, made: Case) -> dict[str, np.ndarray]:
    """The ONNX file of a case; returns the data for its inputs."""
    names, data, constants = [], {}, []
    for at, given in enumerate(made.inputs):
        name = "" if given is None else f"x{at}"
        names.append(name)
        if isinstance(given, C):
            constants.append(numpy_helper.from_array(given.array, name))
        elif given is not None:
            data[name] = np.asarray(given)
    nodes = [helper.make_node(made.op, names, outs := [f"y{at}" for at in range(made.outputs)], name="one", **made.attributes)]
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for name, a in data.items()]
    if not any(a.dtype == np.float32 and a.ndim for a in data.values()):  # a model must have an input
        data["unused"] = f(1)
        inputs.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1]))
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name=o) for o in outs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", made.opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    onnx.save(model, path)
    return data


def run(path: Path, made: Case, data: dict[str, np.ndarray]) -> list[np.ndarray]:
    if made.reference:
        if made.op == "Attention" and networks.OLD_EVALUATOR:
            pytest.skip("the evaluator of this onnx is wrong in Attention")
        return list(ReferenceEvaluator(onnx.load(path)).run(None, data))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, data))


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_onnx_runtime_computes(tmp_path: Path, name: str) -> None:
    made, path = CASES[name], tmp_path / "model.onnx"
    data = write(path, made)
    wanted = run(path, made, data)
    got = networks.flat(load(path).module()(*(torch.from_numpy(array) for array in data.values())))
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert str(ours.dtype).removeprefix("torch.") == str(np.asarray(theirs).dtype)
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    assert set(supported()) - {made.op for made in CASES.values()} <= {"Constant"}


def test_the_list_in_the_docs_is_the_list_in_the_table() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "onnx.md").read_text(encoding="utf-8")
    listed = text.partition("## Operators")[2].partition("##")[0]
    assert listed.replace(",", " ").split() == supported()
