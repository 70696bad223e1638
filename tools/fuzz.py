"""Feed the command line with damaged files, and report whatever is not one clear message.

    python tools/fuzz.py --cases 5000 --seed 0 --jobs 2
    python tools/fuzz.py --seed 0 --only 12 34 --keep FOLDER   # some cases again, with their files

Case N of a seed is always the same: a sample file (an exported program, an ONNX file, arrays, labels, a state dict, an artifact or
a recipe) is changed in its bytes, its archive, its JSON or its graph, once or more, and a command reads it in a process that is
forked from a warm one. A case is a fault where the command ends with another status than 0 or 2 (or 1 with a table, where runtimes
rightly fail a network), where 2 has not exactly one message, where 0 has no whole artifact, where it takes longer than 60 seconds
or more than 4 GiB, or where any file is left that should not be.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads of its own cannot be forked safely

import numpy as np
import onnx
from onnx import TensorProto, helper

from qdeploy.cli.main import main as qdeploy_main
from qdeploy.export.manifest import MANIFEST, render, sealed, sha256

ROOT = Path(__file__).resolve().parent.parent
SECONDS, BYTES = 60, 4 << 30
QUICK = ["--samples", "8", "--recipe", "fast", "--runtime", "onnxruntime:none"]
Random = random.Random
Change = Callable[[Random, Path], str]
"""Changes the file or folder at a path, and says how."""

NUMBERS = (-1, 0, 1, 2, 7, -5, 255, 2**31 - 1, 2**31, 2**40, -(2**63), 2**63 - 1, 2**64, 10**9, 10**400, 1.5, 1e308, -0.0)
TEXTS = (
    "",
    "x",
    "é\n\t\0",
    "class",
    "__import__('os').system('touch RAN')",
    "../../RAN",
    "a" * 5000,
    "x=open('RAN','w')",
    "{}",
    "%s",
    "[bold",
    "\ud800",
)
OTHERS: tuple[Any, ...] = (None, True, [], {}, [[]], {"a": 1}, *NUMBERS, *TEXTS)


# ---------------------------------------------------------------------------------------------------------------- changes of bytes


def change_bytes(rng: Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "set", "cut", "insert", "drop", "zero", "repeat", "swap", "tail", "head"))
    at, length = rng.randrange(max(len(data), 1)), rng.choice((1, 2, 4, 8, 16, 64, 512))
    if kind == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "set" and data:
        data[at] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = rng.randbytes(length)
    elif kind == "drop":
        del data[at : at + length]
    elif kind == "zero":
        data[at : at + length] = bytes(min(length, len(data) - at))
    elif kind == "repeat":
        data[at:at] = data[at : at + length] * rng.choice((1, 2, 100))
    elif kind == "swap":
        other = rng.randrange(max(len(data), 1))
        one, two = data[at : at + length], data[other : other + length]
        data[at : at + len(two)], data[other : other + len(one)] = two, one
    elif kind == "tail":
        data += rng.randbytes(length)
    else:
        data[:0] = rng.randbytes(length)
    path.write_bytes(data)
    return f"bytes: {kind} at {at}, {length}"


# ------------------------------------------------------------------------------------------------------------ changes of plain data


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every part of plain data."""
    yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*place, key))


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def change_plain(rng: Random, document: Any) -> tuple[Any, str]:
    """`document` with one of its parts changed, dropped, doubled or put elsewhere."""
    place = rng.choice(list(_places(document)))
    if not place:
        value = rng.choice(OTHERS)
        return value, f"all is {value!r}"[:80]
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    key, kind = place[-1], rng.choice(("set", "set", "drop", "near", "double", "swap", "nest", "grow"))
    old = holder[key]
    if kind == "drop":
        del holder[key]
    elif kind == "near" and isinstance(old, int | float):
        holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, 0, 10**9, str(old)))
    elif kind == "near" and isinstance(old, str):
        holder[key] = rng.choice((old + "x", old[:-1], old.upper(), old + "\n", old + "." + old, "'" + old))
    elif kind == "double" and isinstance(holder, list):
        holder.insert(key, old)
    elif kind == "double":
        holder[rng.choice(("x", f"{key}2", ""))] = old
    elif kind == "swap":
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "nest":
        holder[key] = rng.choice((_deep(50), [old], {"x": old}, [old] * 3))
    elif kind == "grow" and isinstance(old, list):
        holder[key] = old * rng.choice((2, 50))
    else:
        holder[key] = rng.choice(OTHERS)
    return document, f"{kind} {'/'.join(map(str, place))}"


def change_json(rng: Random, text: bytes) -> tuple[bytes, str]:
    if rng.random() < 0.03:
        depth = rng.choice((2000, 200_000))
        return b"[" * depth + b"]" * depth, f"JSON: {depth} levels"
    document, how = change_plain(rng, json.loads(text))
    return json.dumps(document).encode("utf-8", "surrogatepass"), f"JSON: {how}"


# ---------------------------------------------------------------------------------------------------------------- changes of archives


def _members(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def _write(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    warnings.simplefilter("ignore")  # of names that stand twice
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)


def change_archive(rng: Random, path: Path) -> str:
    members = _members(path)
    at = rng.randrange(len(members))
    name, data = members[at]
    kind = rng.choice(("drop", "name", "double", "case", "empty", "pack", "add", "content", "swap", "outside"))
    method = zipfile.ZIP_STORED
    if kind == "drop":
        del members[at]
    elif kind == "name":
        members[at] = (rng.choice((name + "x", name.upper(), name.rpartition("/")[2], "x/" + name, name.replace("/", "//"))), data)
    elif kind == "double":
        members.append((name, rng.choice((data, b"", data[::-1]))))
    elif kind == "case":
        members.append((name.swapcase(), data[::-1]))
    elif kind == "empty":
        members[at] = (name, b"")
    elif kind == "pack":
        method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == "add":
        members.insert(at, (rng.choice(("digits/extra/x.py", "digits/data/weights/weight_99", "x", "digits/.data/x")), b"import os"))
    elif kind == "content":
        members[at] = (name, rng.choice((data[: len(data) // 2], data + data, rng.randbytes(len(data)), bytes(len(data)))))
    elif kind == "swap":
        other = rng.randrange(len(members))
        members[at], members[other] = (name, members[other][1]), (members[other][0], data)
    else:
        members[at] = (rng.choice(("../RAN", "/tmp/RAN", "digits/../../RAN", "C:\\RAN", "digits\\x")), data)
    _write(path, members, method)
    return f"archive: {kind} {name}"


def change_member_json(rng: Random, path: Path) -> str:
    members = _members(path)
    wanted = [i for i, (name, _) in enumerate(members) if name.endswith(".json")]
    at = rng.choices(wanted, [3 if "models/" in members[i][0] else 1 for i in wanted])[0]
    name, data = members[at]
    data, how = change_json(rng, data)
    members[at] = (name, data)
    _write(path, members)
    return f"{name}, {how}"


FLOATS = (np.nan, np.inf, -np.inf, 0.0, 1e38, -1e38, 1e-20, 1e-44, 3.4e38, 1e5)


def _spoil(rng: Random, values: np.ndarray) -> str:
    """Put an odd number into one, some or all of `values`, in place."""
    number = rng.choice(FLOATS)
    flat = values.reshape(-1)
    if values.dtype.kind == "f" and len(flat):
        where = rng.choice((slice(None), slice(0, 1), slice(0, None, 3), slice(len(flat) // 2, None)))
        flat[where] = number
        return f"{number} in {where}"
    return "nothing"


def change_weight(rng: Random, path: Path) -> str:
    members = _members(path)
    at = rng.choice([i for i, (name, _) in enumerate(members) if "weights/weight_" in name])
    name, data = members[at]
    values = np.frombuffer(data, np.float32).copy() if len(data) > 8 else np.frombuffer(data, np.uint8).copy()
    how = _spoil(rng, values)
    members[at] = (name, values.tobytes())
    _write(path, members)
    return f"weight {name}: {how}"


def change_program(rng: Random, path: Path) -> str:
    """The graph of an exported program: nodes that go, move, or compute something else."""
    members = _members(path)
    at = next(i for i, (name, _) in enumerate(members) if "models/" in name)
    document = json.loads(members[at][1])
    graph = document["graph_module"]["graph"]
    signature = document["graph_module"]["signature"]
    nodes = graph["nodes"]
    one, two = rng.randrange(len(nodes)), rng.randrange(len(nodes))
    kind = rng.choice(("drop", "move", "double", "target", "output", "input", "chain", "sizes", "range", "constant"))
    if kind == "drop":
        del nodes[one : one + rng.choice((1, 3, len(nodes)))]
    elif kind == "move":
        nodes[one], nodes[two] = nodes[two], nodes[one]
    elif kind == "double":
        nodes.insert(one, nodes[one])
    elif kind == "target":
        ops = ("add.Tensor", "matmul.default", "cat.default", "relu.default", "fft_fft.default", "nonzero.default", "item.default")
        spare = ("bernoulli.p", "empty.memory_format", "resize_.default", "sort.default", "no_such.default", "zeros.default")
        nodes[one]["target"] = rng.choice((f"torch.ops.aten.{rng.choice(ops + spare)}", "math.exit", nodes[two]["target"]))
    elif kind == "output":
        signature["output_specs"] = rng.choice((signature["output_specs"] * 2, []))
        graph["outputs"] = rng.choice((graph["outputs"] * 2, [], graph["inputs"][-1:]))
    elif kind == "input":
        spare = rng.randrange(len(graph["inputs"]))
        del graph["inputs"][spare], signature["input_specs"][spare]
    elif kind == "sizes":
        meta = rng.choice(list(graph["tensor_values"].values()))
        meta["sizes"] = rng.choice(([], [{"as_int": rng.choice((0, -1, 2**40))}], meta["sizes"] * 2))
    elif kind == "range":
        document["range_constraints"] = {"s0": {"min_val": rng.choice((0, -1, 2**70)), "max_val": rng.choice((None, 0, 1))}}
    elif kind == "constant":
        arguments = rng.choice([node["inputs"] for node in nodes])
        argument = rng.choice(arguments)["arg"] if arguments else {}
        for key in argument:
            if key in ("as_ints", "as_int", "as_float"):
                argument[key] = [rng.choice(NUMBERS[:13])] * rng.choice((0, 1, 2, 9)) if key == "as_ints" else rng.choice(NUMBERS[:13])
    else:
        nodes[one]["inputs"] = nodes[two]["inputs"]
    members[at] = (members[at][0], json.dumps(document).encode())
    _write(path, members)
    return f"program: {kind} {one} {two}"


# -------------------------------------------------------------------------------------------------------------------- changes of ONNX


def change_onnx(rng: Random, path: Path) -> str:
    model = onnx.load(path)
    graph = model.graph
    node, other = rng.choice(graph.node), rng.choice(graph.node)
    weight = rng.choice(graph.initializer)
    kind = rng.choice(list(ONNX))
    ONNX[kind](rng, model, node, other, weight)
    path.write_bytes(model.SerializeToString())
    return f"ONNX: {kind} '{node.name}', '{other.name}', '{weight.name}'"


def _one_of(*words: str) -> Callable[[Random], str]:
    return lambda rng: rng.choice(words)


def _onnx_nodes(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    kept = rng.choice(([], list(model.graph.node)[::2], list(model.graph.node)[1:], list(model.graph.node)[:-1]))
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _onnx_outputs(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    name = rng.choice((node.output[0], "nothing", "", model.graph.input[0].name, weight.name, "class", "a b"))
    if rng.random() < 0.5:
        model.graph.output[0].name = name
    else:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _onnx_input_sizes(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    at = rng.randrange(len(dimensions))
    kind = rng.choice(("value", "value", "name", "none", "more", "type"))
    if kind == "value":
        dimensions[at].dim_value = rng.choice((-1, -5, 0, 1, 2, 9, 10**9, 2**31, 2**40, 2**62))
    elif kind == "name":
        dimensions[at].dim_param = rng.choice(TEXTS[:-1])
    elif kind == "none":
        dimensions[at].Clear()
    elif kind == "more":
        del dimensions[at]
    else:
        model.graph.input[0].type.tensor_type.elem_type = rng.choice((0, 2, 6, 7, 8, 9, 10, 11, 16, 99))


def _onnx_input(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    if rng.random() < 0.4:
        del model.graph.input[:]
    else:
        name = rng.choice((model.graph.input[0].name, weight.name, node.output[0], "", "class", "x y", "a-b"))
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, rng.choice(([1], [], None, ["n", 3]))))


def _onnx_rename(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    new = rng.choice((other.output[0], weight.name, "", "class", "__x", *TEXTS[2:-1]))
    rng.choice((node.input, node.output))[0:1] = [new]


def _onnx_everywhere(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    """An input, weight or value gets another name wherever it stands."""
    old = rng.choice((model.graph.input[0].name, weight.name, node.output[0], model.graph.output[0].name))
    new = rng.choice(("class", "self", "x.y", "__class__", "é", "1", "None", "torch", *TEXTS[2:-1]))
    for one in model.graph.node:
        for names in (one.input, one.output):
            names[:] = [new if name == old else name for name in names]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = new if value.name == old else value.name


def _onnx_wires(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    kind = rng.choice(("swap", "none", "more", "circle", "constant"))
    if kind == "swap":
        first, second = list(node.input), list(other.input)
        node.input[:], other.input[:] = second, first
    elif kind == "none":
        node.input[:] = []
    elif kind == "more":
        node.input.extend([weight.name] * rng.choice((1, 5)))
    elif kind == "circle":
        node.input[0] = rng.choice((node.output[0], model.graph.node[-1].output[0]))
    else:
        node.input[0] = weight.name


def _onnx_operator(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    names = ("Add", "MatMul", "Concat", "Softmax", "Reshape", "Conv", "Gather", "Loop", "NonZero", "LSTM", "NoSuch", "Div", "Resize")
    more = ("Transpose", "Slice", "Split", "Pad", "Expand", "Tile", "Range", "TopK", "Einsum", "Pow", "ConstantOfShape", "Clip", "Cast")
    node.op_type = rng.choice((*names, *more, other.op_type, "é", ""))
    if rng.random() < 0.2:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "x", "é\n"))


def _onnx_attribute(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    with_attributes = [one for one in model.graph.node if one.attribute] or [node]
    node = rng.choice(with_attributes)
    names = [
        "kernel_shape",
        "strides",
        "pads",
        "axis",
        "group",
        "perm",
        "axes",
        "alpha",
        "auto_pad",
        "to",
        *(a.name for a in node.attribute),
    ]
    name = rng.choice(names)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    value = rng.choice(
        (0, -1, 2**31, 2**62, -7, 1.5, float("nan"), [0, 0], [-1, -1], [1, 1, 1], [2**40, 1], [1.5], "SAME_UPPER", "é", b"\xff")
    )
    made = [] if rng.random() < 0.2 else [helper.make_attribute(name, value)]
    del node.attribute[:]
    node.attribute.extend([*kept, *made])


def _onnx_weight(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    kind = rng.choice(("drop", "empty", "numbers", "type", "shape", "double", "outside", "cut", "scalar"))
    if kind == "drop":
        model.graph.initializer.remove(weight)
    elif kind == "empty":
        weight.dims[:] = [0] * len(weight.dims)
        weight.raw_data = b""
    elif kind == "numbers" and weight.data_type == TensorProto.FLOAT:
        values = onnx.numpy_helper.to_array(weight).copy()
        _spoil(rng, values)
        weight.raw_data = values.tobytes()
    elif kind == "type":
        weight.data_type = rng.choice((0, 2, 6, 7, 8, 10, 11, 14, 16, 99))
    elif kind == "shape":
        weight.dims[:] = rng.choice(([], [1], [-1], [2**40], [2**31, 2**31], list(weight.dims)[::-1], [*weight.dims, 1]))
    elif kind == "double":
        model.graph.initializer.append(weight)
    elif kind == "outside":
        name = weight.name
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        location = rng.choice(("/etc/passwd", "../secret", "none", "", ".", "model.onnx", "link", "é\n"))
        entries = {"location": location, "offset": str(rng.choice((0, -1, 10**18))), "length": str(rng.choice((0, 4, 10**18, -1)))}
        for key, value in entries.items():
            weight.external_data.add(key=key, value=value)
        weight.name = name
    elif kind == "cut":
        weight.raw_data = weight.raw_data[: len(weight.raw_data) // 2]
    else:
        weight.dims[:] = []
        weight.raw_data = weight.raw_data[:4]


def _onnx_model(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    kind = rng.choice(("opset", "imports", "version", "function", "graph", "props"))
    if kind == "opset":
        model.opset_import[0].version = rng.choice((-1, 0, 1, 6, 7, 9, 11, 13, 99, 2**40))
    elif kind == "imports":
        del model.opset_import[:]
    elif kind == "version":
        model.ir_version = rng.choice((0, 1, 3, 99, 2**40))
    elif kind == "function":
        function = helper.make_function("x", "F", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="x")], model.opset_import)
        model.functions.append(function)
        node.domain, node.op_type = "x", "F"
    elif kind == "graph":
        model.ClearField("graph")
    else:
        model.metadata_props.add(key="é\n", value="x" * 5000)


def _onnx_deep(rng: Random, model: Any, node: Any, other: Any, weight: Any) -> None:
    """A long chain of small nodes before the output."""
    name = model.graph.output[0].name
    model.graph.node[-1].output[0] = "link_0"
    count = rng.choice((50, 300))
    for number in range(count):
        out = name if number == count - 1 else f"link_{number + 1}"
        model.graph.node.append(helper.make_node(rng.choice(("Relu", "Neg", "Identity")), [f"link_{number}"], [out]))


ONNX: dict[str, Callable[[Random, Any, Any, Any, Any], None]] = {
    "nodes": _onnx_nodes,
    "outputs": _onnx_outputs,
    "input sizes": _onnx_input_sizes,
    "input": _onnx_input,
    "rename": _onnx_rename,
    "everywhere": _onnx_everywhere,
    "wires": _onnx_wires,
    "operator": _onnx_operator,
    "attribute": _onnx_attribute,
    "weight": _onnx_weight,
    "model": _onnx_model,
    "deep": _onnx_deep,
}


# ------------------------------------------------------------------------------------------------- changes of arrays and state dicts


def _arrays(rng: Random) -> np.ndarray:
    """Arrays that are no good data, or odd ones."""
    images = np.zeros((8, 1, 8, 8), np.float32)
    spoiled = np.random.default_rng(rng.randrange(99)).normal(size=(8, 1, 8, 8)).astype(np.float32)
    _spoil(rng, spoiled)
    return rng.choice(
        (
            images,
            spoiled,
            spoiled,
            images[:0],
            images[:, :, :7],
            images[:, 0],
            images.astype(np.float64),
            images.astype(np.complex64),
            images.astype(np.int64) - 5,
            images.astype(np.uint8),
            np.zeros((8, 8, 8, 1), np.uint8),
            images.astype(bool),
            images.astype("U3"),
            images.astype("S2"),
            np.zeros(8, [("a", "f4"), ("b", "i4")]),
            np.array(3.0),
            np.zeros((0,)),
            np.zeros((8, 0, 8, 8), np.float32),
            np.asfortranarray(spoiled),
            images.astype(np.float16),
            images.astype(">f4"),
            np.zeros(8, "datetime64[s]"),
            np.full((8, 1, 8, 8), 1e300),
        )
    )


def change_npz(rng: Random, path: Path) -> str:
    array = _arrays(rng)
    keys = rng.choice((["images"], ["x"], ["labels"], ["images", "labels"], ["a", "b"], ["../RAN"], [""], ["class"], []))
    np.savez(path.with_suffix(".npz"), **dict.fromkeys(keys, array))
    return f"npz: {keys} {array.dtype} {array.shape}"


def change_npy(rng: Random, path: Path) -> str:
    np.save(path, _arrays(rng))
    if rng.random() < 0.5:
        return "npy: other numbers"
    shape, kind = (
        rng.choice(((8, -1), (2**40,), (2**62, 4), (0,), (8, 1, 8, 9), ("a",), "x", None)),
        rng.choice(("<f4", "|O", "f99", "<i8")),
    )
    header = repr({"descr": kind, "fortran_order": rng.choice((False, True, 3)), "shape": shape}).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8 * 64 * 4))
    return f"npy: header {header!r}"


def change_labels(rng: Random, path: Path) -> str:
    texts = ("", "1\n2\n", "x\n" * 450, "-1\n" * 450, "9999\n" * 450, "1.5\n" * 450, "\0", "1 2\n" * 225, "nan\n" * 450, "1\n" * 450)
    path.write_text(rng.choice(texts))
    return "labels: other text"


def change_state(rng: Random, path: Path) -> str:
    import torch

    state = {"0.weight": torch.ones(4, 1, 3, 3), "0.bias": torch.zeros(4), "3.weight": torch.ones(10, 64), "3.bias": torch.zeros(10)}
    key = rng.choice(list(state))
    value: Any = rng.choice(
        (
            torch.zeros(0),
            state[key].double(),
            state[key].half(),
            state[key].to(torch.int8),
            state[key] * float("nan"),
            state[key] * 1e38,
            state[key].to_sparse(),
            state[key][None],
            state[key].to(torch.complex64),
            3,
            "x",
            None,
            [1],
            torch.empty(state[key].shape, device="meta"),
        )
    )
    kind = rng.choice(("value", "drop", "name", "wrap", "list"))
    content: Any = {k: value if k == key else v for k, v in state.items()}
    if kind == "drop":
        content = {k: v for k, v in state.items() if k != key}
    elif kind == "name":
        content = {rng.choice(("x", 3, "module.x", "")) if k == key else k: v for k, v in state.items()}
    elif kind == "wrap":
        content = rng.choice(({"state_dict": content}, {"model": state, "epoch": 3}, {"x": {"y": state}}, {"state_dict": 3}))
    elif kind == "list":
        content = rng.choice(([state], list(state.values()), (), {}, 3, state[key]))
    torch.save(content, path)
    return f"state: {kind} {key} {type(value).__name__}"


def change_safetensors(rng: Random, path: Path) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, how = change_json(rng, data[8 : 8 + length])
    size = rng.choice((len(header), len(header), len(header), 0, 2**63, len(header) + 1))
    path.write_bytes(size.to_bytes(8, "little") + header + data[8 + length :])
    return f"safetensors: {how}"


# ------------------------------------------------------------------------------------------------------ changes of artifacts, recipes


def change_manifest(rng: Random, path: Path) -> str:
    file = path / MANIFEST
    manifest, how = change_plain(rng, json.loads(file.read_text()))
    again = isinstance(manifest, dict) and rng.random() < 0.6
    file.write_bytes((render(sealed(manifest)) if again else json.dumps(manifest)).encode("utf-8", "surrogatepass"))
    return f"manifest: {how}{', sealed again' if again else ''}"


def change_artifact_file(rng: Random, path: Path) -> str:
    """A file of the artifact, with a manifest that knows it as it is now, or not."""
    name = rng.choice(sorted(file.name for file in path.iterdir()))
    file = path / name
    kind = rng.choice(("bytes", "drop", "folder", "onnx", "arrays"))
    how = ""
    if kind == "drop":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "onnx" and name.endswith(".onnx"):
        how = change_onnx(rng, file)
    elif kind == "arrays" and name.endswith(".npz"):
        how = change_npz(rng, file) if rng.random() < 0.5 else change_archive(rng, file)
    else:
        how = change_bytes(rng, file)
    if file.is_file() and name != MANIFEST and rng.random() < 0.7:
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][name] = sha256(file.read_bytes())
        (path / MANIFEST).write_text(render(sealed(manifest)))
        how += ", sealed again"
    return f"{name}: {kind} {how}"


RECIPE = {
    "name": "tails",
    "activation": {"observer": "percentile", "percentile": 99.9},
    "weight": {"observer": "mse", "p": 2.0},
    "step": [{"name": "equalize"}, {"name": "bias_correction", "samples": 8}],
}


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return "''" if value is None else json.dumps(value)


def change_recipe(rng: Random, path: Path) -> str:
    document, how = change_plain(rng, json.loads(json.dumps(RECIPE)))
    table = document if isinstance(document, dict) else {"name": document}
    lines = [f"{json.dumps(str(key))} = {_toml(value)}\n" for key, value in table.items()]
    path.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    return f"recipe: {how}"


# ---------------------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A sample file, the ways to change it, and the command that reads it; `{}` is its path, `{at}` the folder of all samples."""

    file: str
    changes: tuple[tuple[Change, int], ...]
    command: str
    weight: int = 1


QUANTIZE = "quantize {} --backend snpe --data {at}/images.npz --out {out}"
SUBJECTS = (
    Subject(
        file="digits.pt2",
        changes=((change_bytes, 2), (change_archive, 2), (change_member_json, 6), (change_weight, 1), (change_program, 3)),
        command=QUANTIZE,
        weight=8,
    ),
    Subject(file="digits.onnx", changes=((change_bytes, 2), (change_onnx, 8)), command=QUANTIZE, weight=8),
    Subject(
        file="images.npz",
        changes=((change_bytes, 1), (change_archive, 1), (change_npz, 3)),
        command="quantize {at}/digits.pt2 --backend snpe --data {} --out {out}",
        weight=2,
    ),
    Subject(
        file="images.npy",
        changes=((change_bytes, 1), (change_npy, 3)),
        command="quantize {at}/digits.pt2 --backend snpe --data {} --out {out}",
        weight=2,
    ),
    Subject(
        file="labels.txt",
        changes=((change_bytes, 1), (change_labels, 2)),
        command="verify {at}/artifact --data {at}/images.npz --labels {}",
    ),
    Subject(
        file="state.pt",
        changes=((change_bytes, 1), (change_state, 3)),
        command="quantize {} --arch {at}/net.py:make --backend snpe --data {at}/images.npz --out {out}",
        weight=2,
    ),
    Subject(
        file="state.safetensors",
        changes=((change_bytes, 1), (change_safetensors, 2)),
        command="quantize {} --arch {at}/net.py:make --backend snpe --data {at}/images.npz --out {out}",
    ),
    Subject(file="artifact", changes=((change_manifest, 3), (change_artifact_file, 3)), command="verify {}", weight=4),
    Subject(
        file="artifact",
        changes=((change_manifest, 1), (change_artifact_file, 1)),
        command="quantize {at}/digits.pt2 --backend snpe --data {at}/images.npz --out {}",
    ),
    Subject(
        file="recipe.toml",
        changes=((change_bytes, 1), (change_recipe, 4)),
        command="quantize {at}/digits.pt2 --backend snpe --data {at}/images.npz --out {out} --recipe {}",
        weight=3,
    ),
)

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
"""


def make_samples(folder: Path) -> None:
    """The whole files that cases start from, and a first run of everything, which loads all that later ones need."""
    import torch
    from safetensors.torch import save_file

    images = np.load(ROOT / "samples" / "digits_test.npz")
    shutil.copy(ROOT / "samples" / "digits.pt2", folder / "digits.pt2")
    np.savez(folder / "images.npz", images=images["images"][:32], labels=images["labels"][:32])
    np.save(folder / "images.npy", images["images"][:32])
    (folder / "labels.txt").write_text("\n".join(map(str, images["labels"][:32])) + "\n")
    (folder / "recipe.toml").write_text("".join(f"{key} = {_toml(value)}\n" for key, value in RECIPE.items()))
    (folder / "net.py").write_text(NET)
    space: dict[str, Any] = {}
    exec(NET, space)
    state = space["make"]().state_dict()
    torch.save(state, folder / "state.pt")
    save_file(state, folder / "state.safetensors")
    common = ["--backend", "snpe", "--data", str(folder / "images.npz"), *QUICK, "--quiet"]
    assert _call(["quantize", str(folder / "digits.pt2"), *common, "--out", str(folder / "artifact")]) == 0
    model = onnx.load(folder / "artifact" / "model.onnx")
    onnx.save(model, folder / "digits.onnx")
    assert _call(["quantize", str(folder / "digits.onnx"), *common, "--out", str(folder / "warm")]) == 0
    shutil.rmtree(folder / "warm")


def _call(arguments: list[str]) -> int:
    """The status of the command line, in this process."""
    sys.argv = ["qdeploy", *arguments]
    try:
        qdeploy_main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a case."""

    number: int
    what: str = ""
    command: str = ""
    status: int | None = None
    seconds: float = 0.0
    peak: int = 0
    faults: list[str] = field(default_factory=list)
    shown: str = ""


def build(seed: int, number: int, samples: Path, folder: Path) -> tuple[str, list[str]]:
    """Make the files of a case in `folder`; how they were changed, and the arguments of the command."""
    rng = Random(f"{seed}.{number}")
    subject = rng.choices(SUBJECTS, [subject.weight for subject in SUBJECTS])[0]
    path = folder / subject.file
    source = samples / subject.file
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    done: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choices([change for change, _ in subject.changes], [weight for _, weight in subject.changes])[0]
        try:
            done.append(change(rng, path))
        except Exception as error:  # a second change may not be able to read what the first one left
            if not done:
                raise
            done.append(f"no more changes: {type(error).__name__}")
            break
    text = subject.command.format(str(path), at=samples, out=folder / "out")
    arguments = [*text.split(" ")]
    if arguments[0] == "quantize":
        arguments += ["--accept"]  # a network of garbage is not what is looked for
        arguments += [part for part in QUICK if part not in ("--recipe", "fast") or "--recipe" not in arguments]
        arguments += ["--input-shape", "1,1,8,8"] if subject.file.startswith("state") else []
    else:
        arguments += ["--runtime", "onnxruntime:none"]
    return "; ".join(done), arguments


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in sorted(folder.rglob("*"))}


def run_case(seed: int, number: int, samples: Path, keep: Path | None = None) -> Outcome:
    """Build a case, run it in a forked process, and judge it."""
    outcome = Outcome(number=number)
    top = Path(tempfile.mkdtemp(prefix="case.")) if keep is None else keep
    folder, scratch, here = top / "files", top / "tmp", top / "here"
    for one in (folder, scratch, here):
        one.mkdir(parents=True)
    try:
        outcome.what, arguments = build(seed, number, samples, folder)
        outcome.command = " ".join(arguments)
        before = listing(folder)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(arguments, top, scratch, here)
        status, usage = _wait(pid, start)
        outcome.seconds, outcome.peak = time.monotonic() - start, usage
        outcome.status = os.waitstatus_to_exitcode(status)
        out, err = ((top / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        outcome.shown = err[-3000:]
        outcome.faults = judge(outcome, arguments, out, err, folder, before, [*scratch.iterdir(), *here.iterdir()])
    finally:
        if keep is None:
            shutil.rmtree(top, ignore_errors=True)
    return outcome


def _child(arguments: list[str], top: Path, scratch: Path, here: Path) -> None:
    """Become the command line, with limits; never returns."""
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(top / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False), write_through=True) for number in (1, 2))
        os.chdir(here)
        tempfile.tempdir = str(scratch)
        os.environ["TMPDIR"] = str(scratch)
        own = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
        resource.setrlimit(resource.RLIMIT_DATA, (own + BYTES, own + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = _call(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, start: float) -> tuple[int, int]:
    """The status of a process and its peak of resident bytes; it is killed at the limit of time."""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return status, usage.ru_maxrss * 1024
        if time.monotonic() - start > SECONDS:
            os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            return status, usage.ru_maxrss * 1024
        time.sleep(0.01)


def judge(
    outcome: Outcome, arguments: list[str], out: str, err: str, folder: Path, before: dict[str, int], strays: list[Path]
) -> list[str]:
    """What is wrong with how a command ended."""
    faults = []
    lines = err.splitlines()
    failed_check = outcome.status == 1 and ("check" in out and "fault" not in err) and "Traceback" not in err
    if outcome.status not in (0, 2) and not failed_check:
        faults.append(f"status {outcome.status}" + (" (out of time)" if outcome.seconds > SECONDS else ""))
    if "Traceback" in err:
        faults.append(f"a traceback: {lines[-1] if lines else ''}"[:300])
    if outcome.status == 2:
        if len(lines) != 1 or not lines[0].startswith("error: "):
            faults.append(f"not one message, but {len(lines)} lines")
        elif len(lines[0]) > 4000 or any(not c.isprintable() for c in lines[0]):
            faults.append("a message too long, or with characters that cannot be printed")
        if any(not line.startswith(("write ONNX for ", "no --data: ")) for line in out.splitlines()):
            faults.append(f"something printed besides: {out[:200]!r}")
    if outcome.peak > BYTES:
        faults.append(f"{outcome.peak >> 20} MiB of memory")
    after = listing(folder)
    fresh = {name for name in after if name not in before}
    if arguments[0] == "quantize" and outcome.status in (0, 1):
        target = arguments[arguments.index("--out") + 1]
        fresh = {name for name in fresh if not (folder / name).is_relative_to(target)}
        if not (Path(target) / MANIFEST).is_file():
            faults.append("no artifact was written")
    elif arguments[0] == "quantize" and before.keys() - after.keys():
        faults.append(f"lost: {sorted(before.keys() - after.keys())[:5]}")
    strays += [folder / name for name in fresh]
    if strays:
        faults.append(f"left behind: {', '.join(path.name for path in strays[:5])}")
    return faults


@cache
def _prepared() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz."))
    make_samples(folder)
    return folder


def _worker(task: tuple[int, int]) -> Outcome:
    return run_case(*task, _prepared())


def _finish() -> None:
    if _prepared.cache_info().currsize:
        shutil.rmtree(_prepared(), ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these cases alone")
    parser.add_argument("--keep", type=Path, help="with --only, a new folder for the files of each")
    args = parser.parse_args()
    if args.keep is not None and not args.only:
        parser.error("--keep is for the cases that --only names")
    samples = _prepared()
    try:
        if args.keep is not None:
            outcomes = [run_case(args.seed, number, samples, args.keep / str(number)) for number in args.only]
            for outcome in outcomes:
                print(f"{outcome.number}: {outcome.command}\n{outcome.what}\n{outcome.shown}\n{outcome.faults}")
            return any(outcome.faults for outcome in outcomes)
        tasks = [(args.seed, number) for number in args.only or range(args.first, args.first + args.cases)]
        bad = 0
        counts: dict[int | None, int] = {}
        start = time.monotonic()
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:  # the workers share what was made above
            for outcome in pool.imap_unordered(_worker, tasks, chunksize=1):
                counts[outcome.status] = counts.get(outcome.status, 0) + 1
                if outcome.faults:
                    bad += 1
                    print(f"case {outcome.number}: {'; '.join(outcome.faults)}\n    {outcome.what}\n    {outcome.command}", flush=True)
                    if outcome.status == 1:
                        print("    " + outcome.shown[-1500:].replace("\n", "\n    "), flush=True)
        found = ", ".join(f"{count} with status {status}" for status, count in sorted(counts.items(), key=str))
        print(f"seed {args.seed}: {len(tasks)} cases, {found}; {bad} faults, {time.monotonic() - start:.0f} s")
        return bool(bad)
    finally:
        _finish()


if __name__ == "__main__":
    sys.exit(main())
