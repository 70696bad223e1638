"""`.pt2` files: ordinary ones load, code hidden in them does not run, and other versions are refused in words."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_files_model import SAMPLES, refused, repack
from torch import nn

from qdeploy.core.errors import InputError
from qdeploy.files.archive import Archive, BadArchive, Fresh
from qdeploy.files.model import load_model
from qdeploy.files.program_check import is_expression
from qdeploy.files.pt2 import load_program


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle4", "pt2 constants"])
def test_no_code_runs_without_leave(tmp_path: Path, form: str) -> None:
    path, sign = tmp_path / "m.pt", tmp_path / "ran"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(Bomb(sign), protocol=4 if form == "pickle4" else 2))
    elif form.startswith("pt2"):
        config = {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}}}

        def change(name: str, data: bytes) -> bytes:
            return json.dumps(config).encode() if "model_constants" in name else data

        repack(SAMPLES / "digits.pt2", path, change)
    else:
        torch.save({"state_dict": Bomb(sign)}, path, _use_new_zipfile_serialization=form == "zip")
    refused(InputError, str(path), "run", "--allow-pickle", path=path)
    assert not sign.exists()


CODE = "__import__('pathlib').Path('ran').touch()"


def _name(data: bytes, name: str) -> bytes:
    """The model with another name for its input."""
    own = json.loads(data)["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"]
    return data.replace(json.dumps(own).encode(), json.dumps(name).encode())


def _input_key(data: bytes, key: str) -> bytes:
    """The model with `key` for the name of an input that is given by name."""
    document = json.loads(data)
    signature = next(entry["signature"] for entry in document["graph_module"]["module_call_graph"] if entry["signature"])
    version, spec = json.loads(signature["in_spec"])
    spec["children_spec"][1]["context"] = json.dumps([key])
    signature["in_spec"] = json.dumps([version, spec])
    return json.dumps(document).encode()


def _parameter(data: bytes, name: str) -> bytes:
    return data.replace(b'"stem.0.weight"', json.dumps(name).encode())


MODEL_CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "a call in an expression": lambda data: data.replace(b"Symbol('", b"print('ran') or Symbol('"),
    "a line break in a symbol": lambda data: data.replace(
        b"Symbol('s", json.dumps(f"Symbol('a\\\n', Symbol(' ,{CODE}) #'), 's")[1:-1].encode()
    ),
    "a text that sympy would evaluate": lambda data: data.replace(b"Symbol('", b"Add('print(1)', 1) + Symbol('"),
    "a function of Python": lambda data: data.replace(b"torch.ops.aten.relu.default", b"torch.os.system"),
    "an operator that makes files": lambda data: data.replace(b"torch.ops.aten.relu.default", b"torch.ops.aten.from_file.default"),
    "a default value in a name": lambda data: _name(data, f"x={CODE}"),
    "an argument in a name": lambda data: _name(data, f"*x, y={CODE}"),
    "a keyword for a name": lambda data: _name(data, "lambda"),
    "a name with a quote in it": lambda data: _parameter(data, f'stem.0")or {CODE}or("'),
    "an attribute of every object": lambda data: _parameter(data, "stem.__class__"),
    "a key with a quote among the inputs": lambda data: _input_key(data, f'a"): {CODE} #'),
    "an object": lambda data: data.replace(b'{"as_none": true}', b'{"as_custom_obj": {"name": "o", "class_fqn": "a.B"}}', 1),
    "a number for a text": lambda data: data.replace(b'"torch.ops.aten.relu.default"', b"7"),
    "two kinds of one argument": lambda data: data.replace(b'{"as_none": true}', b'{"as_none": true, "as_int": 1}', 1),
    "a list that never ends": lambda data: data.replace(b'"nodes": [', b'"nodes": ' + b"[" * 100_000, 1),
}


@pytest.mark.parametrize("case", MODEL_CHANGES)
def test_a_graph_that_torch_would_not_have_written_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pt2"
    changed: list[bool] = []

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        made = MODEL_CHANGES[case](data)
        changed.append(made != data)
        return made

    repack(SAMPLES / "digits.pt2", path, change)
    assert changed == [True]
    refused(InputError, str(path), "could run code", "models/model.json", "--allow-pickle", path=path)
    assert not Path("ran").exists()


def test_guards_extra_files_and_sample_inputs_never_reach_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.pt2"
    guards = json.dumps({"guards_code": [CODE]})[1:-1].encode()
    inputs = io.BytesIO()
    torch.save(((Bomb(Path("ran")),), {}), inputs)

    def change(name: str, data: bytes) -> bytes:
        return inputs.getvalue() if "sample_inputs" in name else data.replace(b'"guards_code": []', guards)

    repack(SAMPLES / "digits.pt2", path, change)
    program = load_model(path)
    assert isinstance(program, torch.export.ExportedProgram) and program.example_inputs is None and not program._guards_code
    assert not Path("ran").exists()


PAYLOADS = {
    "pickled": ('"use_pickle": false', '"use_pickle": true', "pickles"),
    "under another name": ('"weight_0"', '"../../models/model.json"', "pickles"),
    "that is missing": ('"weight_0"', '"weight_999"', "no data"),
    "that is larger than its data": ('{"as_int": 16}', '{"as_int": 4096}', "bytes for"),
    "with a negative side": ('{"as_int": 16}', '{"as_int": -16}', "wrong shape"),
    "of no known dtype": ('"dtype": 7', '"dtype": 99', "99"),
}


@pytest.mark.parametrize("case", PAYLOADS)
def test_a_tensor_is_refused(case: str, tmp_path: Path) -> None:
    old, new, word = PAYLOADS[case]
    path = tmp_path / "m.pt2"
    edit = lambda name, data: data.replace(old.encode(), new.encode(), 1) if name.endswith("weights_config.json") else data  # noqa: E731
    repack(SAMPLES / "digits.pt2", path, edit)
    refused(InputError, str(path), word, path=path)


@pytest.mark.parametrize("case", ["emptied", "cut"])
def test_data_that_are_shorter_than_their_tensor_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    repack(SAMPLES / "digits.pt2", path, lambda name, data: data[: -1 if case == "cut" else 0] if name.endswith("weight_3") else data)
    refused(InputError, str(path), "which needs 576", path=path)


def _parts() -> dict[str, bytes]:
    with zipfile.ZipFile(SAMPLES / "digits.pt2") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(parts: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in parts:
            archive.writestr(name, data)
    return buffer.getvalue()


def _moved(directory: bytes, by: int) -> bytes:
    """A directory whose members stand `by` bytes further on."""
    out, at = bytearray(directory), 0
    while at < len(out):
        name, extra, comment = struct.unpack_from("<HHH", out, at + 28)
        struct.pack_into("<I", out, at + 42, struct.unpack_from("<I", out, at + 42)[0] + by)
        at += 46 + name + extra + comment
    return bytes(out)


def _two_directories() -> bytes:
    """One archive behind another; the end record says the place of the first directory and the size of the second."""
    one, two = (_zipped(list(_parts().items())) for _ in range(2))
    ends = [data.rfind(b"PK\5\6") for data in (one, two)]
    starts = [struct.unpack_from("<I", data, end + 16)[0] for data, end in zip((one, two), ends, strict=True)]
    body = one[: ends[0]] + two[: starts[1]] + _moved(two[starts[1] : ends[1]], ends[0])
    return body + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 53, 53, ends[1] - starts[1], starts[0], 0)


def _with(name: str, data: bytes = b"x") -> bytes:
    return _zipped([*_parts().items(), (name, data)])


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "two names that differ in case": (lambda: _with("digits/Data/weights/weight_0"), "if case does not count"),
    "two directories": (_two_directories, "directory"),
    "a name that leads out": (lambda: _with("digits/../x"), "no plain relative path"),
    "an absolute name": (lambda: _with("/digits/x"), "no plain relative path"),
    "a name with a line break": (lambda: _with("digits/a\nb"), "no plain relative path"),
    "two folders": (lambda: _with("other/x"), "one folder"),
    "a foreign part": (lambda: _with("digits/data/aotinductor/model/x.so"), "no part of a graph"),
    "packed data": (lambda: _zipped(list(_parts().items()), zipfile.ZIP_DEFLATED), "packed"),
    "bytes behind the end": (lambda: (SAMPLES / "digits.pt2").read_bytes() + b"x", "end record"),
    "bytes before the beginning": (lambda: b"PK\3\4" + (SAMPLES / "digits.pt2").read_bytes(), "end records contradict"),
    "a short end": (lambda: (SAMPLES / "digits.pt2").read_bytes()[:-9], "end record"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_in_which_readers_may_differ_is_refused(case: str, tmp_path: Path) -> None:
    make, word = ARCHIVES[case]
    path = tmp_path / "m.pt2"
    path.write_bytes(make())
    with pytest.raises(InputError, match=word):
        load_program(path, trusted=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_archive_with_a_changed_byte_is_refused_or_has_the_same_members(data: st.DataObject) -> None:
    whole = (SAMPLES / "digits.pt2").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1) | st.integers(len(whole) - 4100, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as file:
        file.write(changed)
        file.flush()
        try:
            archive = Archive(Path(file.name))
        except BadArchive:
            return
        names = archive.names()
        try:
            with zipfile.ZipFile(file.name) as other:
                assert sorted(names) == sorted(other.namelist())
                assert all(archive[name] == other.read(name) for name in names)
        except zipfile.BadZipFile:  # the data of a member were changed
            assert archive.damaged()


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}(/[a-z0-9_]{1,8})?", fullmatch=True), st.binary(max_size=300), max_size=6))
def test_a_fresh_archive_holds_its_parts_wherever_it_is_read(parts: dict[str, bytes]) -> None:
    fresh = Fresh(parts, {})
    with zipfile.ZipFile(io.BytesIO(fresh.read())) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == parts
    fresh.seek(0, io.SEEK_END)
    size = fresh.tell()
    for start in range(0, size, 97):
        fresh.seek(start)
        assert fresh.read(50) == (fresh.seek(0), fresh.read())[1][start : start + 50]


def test_a_plain_program_comes_through_unchanged(tmp_path: Path) -> None:
    ours, torchs = load_program(SAMPLES / "digits.pt2", trusted=False), torch.export.load(SAMPLES / "digits.pt2")
    assert ours.graph_module.code == torchs.graph_module.code and ours.state_dict.keys() == torchs.state_dict.keys()
    assert all(torch.equal(ours.state_dict[name], tensor) for name, tensor in torchs.state_dict.items())


class Strange(nn.Module):
    """Paths, keys, structures and shapes that are unusual and harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"layer-1": nn.Linear(3, 3), "a b": nn.Linear(3, 3)})
        self.register_buffer("none", torch.zeros(0, 3))

    def forward(self, x: torch.Tensor, rest: dict[str, list[torch.Tensor]]) -> dict[str, object]:
        y = torch.cat([self.parts["a b"](self.parts["layer-1"](x)), self.none])
        return {"it's": y.masked_fill(y > 0, -torch.inf), "é": (y[: y.shape[0] // 2], [rest["more"][0] * 2])}


def test_unusual_names_and_numbers_are_no_code(tmp_path: Path) -> None:
    example = (torch.randn(4, 3), {"more": [torch.randn(2)]})
    dynamic = {"x": {0: torch.export.Dim.AUTO}, "rest": {"more": [None]}}
    torch.export.save(torch.export.export(Strange(), example, dynamic_shapes=dynamic), tmp_path / "m.pt2")
    found = load_program(tmp_path / "m.pt2", trusted=False).module(check_guards=False)(*example)
    torch.testing.assert_close(found, torch.export.load(tmp_path / "m.pt2").module()(*example))


def test_arithmetic_on_sizes_is_told_from_code() -> None:
    assert is_expression("TruncToInt(Mul(Float('0.5', precision=53), ToFloat(Symbol('s27', positive=True, integer=True))))")
    assert is_expression("2*s0 + Max(1, s1//2)")
    calls = ("open('x')", "Add('print(1)', 2)", "Symbol('a').name", "Add(Mul('1'), 2)", "Symbol('a' 'b')", "__import__", "s0.real")
    syntax = ("(", "", "[1 for x in s]", "lambda: 1", "x if y else z", "a;b", "a\nb", "Symbol('a\\\n')")
    for text in (*calls, *syntax, "a" * 5000, "(" * 100 + "a" + ")" * 100):
        assert not is_expression(text), text


def test_program_with_two_dynamic_dimensions_loads(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] > 8:
                x = x + 1
            return nn.functional.interpolate(x[:, None], scale_factor=0.5).sum() * x.shape[1]

    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO},)
    program = torch.export.export(Half(), (torch.zeros(2, 16, 4),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "m.pt2")
    assert isinstance(load_model(tmp_path / "m.pt2"), torch.export.ExportedProgram)


def test_pt2_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.pt2"
    repack(
        SAMPLES / "digits.pt2",
        path,
        lambda _, data: data.replace(b'"schema_version": {"major": 8', b'"schema_version": {"major": 99'),
    )
    words = [str(path), "major=99", torch.__version__, "export the model again"]
    refused(InputError, *words, path=path)
    repack(SAMPLES / "digits.pt2", path, lambda name, data: b"7" if name.endswith("archive_version") else data)
    refused(InputError, str(path), "archive version 7", "export the model again", path=path)
    repack(SAMPLES / "digits.pt2", path, lambda name, data: None if "weight_3" in name else data)
    refused(InputError, str(path), "export the model again", path=path)
    assert not caplog.records
