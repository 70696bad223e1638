"""Every backend as data, and the scale files against numbers worked by hand.

The golden files are written by hand for the toy network of `networks.Toy`. Worked, with 2/255 rounded to float32 as
0.007843137718737125: the range [-1, 1] of x starts 127.5 steps below 0, so code 0 stands for -128 steps, -1.003921627998352, code 255
for 127 steps, 0.9960784902796149, and the offset is -128. A weight of channel maximum 0.5 has the step 0.5/127 and codes from -128.
The bias counts steps of 2/255 x 0.5/127 in 32 bits, from -2^31.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
from qdeploy.backends.snpe import ENCODINGS, write_encodings

import qdeploy
from qdeploy import ops
from qdeploy.backend import Backend, backends
from qdeploy.errors import OptionError
from qdeploy.runtimes import find_runtime
from qdeploy.spec import Encoding, QuantSpec, Role

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = ("1.0.0", "0.6.1")
NAMES = {op.name for op in ops.OPS.values()}
UINT8 = QuantSpec(signed=False, symmetric=False)
INT8 = QuantSpec(signed=True, symmetric=True, axis=0)
INT32 = QuantSpec(bits=32, signed=True, symmetric=True, axis=0)
every = pytest.mark.parametrize("backend", list(backends), ids=lambda backend: backend.name)


def encoding(tensor: str, role: Role, spec: QuantSpec, scale: list[float], zero_point: list[int]) -> Encoding:
    return Encoding(tensor=tensor, role=role, spec=spec, scale=scale, zero_point=zero_point)


TOY = [
    encoding("conv0.weight", "weight", INT8, [0.5 / 127, 0.25 / 127], [0, 0]),
    encoding("conv0.bias", "bias", INT32, [3.0878494726493955e-05, 1.5439247363246977e-05], [0, 0]),
    encoding("shift", "constant", UINT8, [1 / 255], [128]),
    encoding("x", "activation", UINT8, [2 / 255], [128]),
    encoding("r0", "activation", UINT8, [2.54 / 255], [0]),
]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_scale_file_of_the_toy_network_is_the_one_worked_by_hand(version: str) -> None:
    (text,) = write_encodings(TOY, version).values()
    assert text == (GOLDEN / f"toy-{version}.encodings").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_toy_network_end_to_end_has_the_numbers_worked_by_hand(version: str, tmp_path: Path) -> None:
    net, data = networks.toy()
    prepared = qdeploy.calibrate(qdeploy.prepare(net, data[0], "snpe", recipe="fast"), data)
    made = rows(json.loads((qdeploy.convert(prepared, tmp_path / "out", version).path / ENCODINGS).read_text()))
    expected = {
        "x": (8, 2 / 255, -128, False),
        "r0": (8, 2.54 / 255, 0, False),
        "conv0.weight": (8, 1 / 255, -128, False),
        "conv0.bias": (32, 2 / 255 / 255, -(2**31), True),
    }
    assert {name: len(channels) for name, channels in made.items()} == dict.fromkeys(expected, 1)
    for name, (bits, scale, offset, symmetric) in expected.items():
        (row,) = made[name]
        assert (row["bits"], row["offset"], row["symmetric"]) == (bits, offset, symmetric), name
        # a scale may be raised by up to 2^-9 of itself to keep results off the rounding ties
        assert scale * (1 - 1e-6) <= row["scale"] <= scale * (1 + 2.0**-9 + 1e-6), name


def rows(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The channels of every tensor in either version; the type of each boolean is that of the version."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key in ("activation_encodings", "param_encodings"):
        if content["version"] == "1.0.0":
            for entry in content[key]:
                assert isinstance(entry["is_sym"], bool) and entry["dtype"] == "INT"
                assert entry["enc_type"] == ("PER_TENSOR" if len(entry["scale"]) == 1 else "PER_CHANNEL")
                numbers = zip(entry["scale"], entry["offset"], strict=True)
                found[entry["name"]] = [
                    {"bits": entry["bw"], "symmetric": entry["is_sym"], "scale": s, "offset": o} for s, o in numbers
                ]
            continue
        for name, channels in content[key].items():
            assert all(c["is_symmetric"] in ("True", "False") and c["dtype"] == "int" for c in channels)
            found[name] = [c | {"bits": c["bitwidth"], "symmetric": c["is_symmetric"] == "True"} for c in channels]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_the_scale_file_holds_every_encoding_with_offset_minus_zero_point(network: str, version: str) -> None:
    encodings = networks.artifact(network, "snpe").encodings
    made = rows(json.loads(write_encodings(encodings, version)[ENCODINGS]))
    assert set(made) == {e.tensor for e in encodings}
    for e in encodings:
        channels = made[e.tensor]
        np.testing.assert_array_equal(np.float32([c["scale"] for c in channels]), e.scale)
        smallest = -(2 ** (e.spec.bits - 1)) if e.spec.signed else 0
        assert [c["offset"] for c in channels] == [smallest - int(z) for z in e.zero_point]
        assert all(c["offset"] <= 0 for c in channels)
        if version == "0.6.1":
            for c in channels:
                assert c["min"] == pytest.approx(c["offset"] * c["scale"], rel=1e-12)
                assert c["max"] == pytest.approx((c["offset"] + 2 ** c["bits"] - 1) * c["scale"], rel=1e-12)


def test_the_artifact_holds_the_scale_file_of_its_own_encodings() -> None:
    artifact = networks.artifact("plain", "snpe")
    assert artifact.manifest["format"] == "1.0.0"
    assert (artifact.path / ENCODINGS).read_text() == write_encodings(artifact.encodings, "1.0.0")[ENCODINGS]


@every
def test_a_backend_names_only_ops_and_runtimes_that_there_are(backend: Backend) -> None:
    assert backends[backend.name] is backend
    named = [rule.ops for rule in backend.rules] + [part for pair in backend.fuse for part in (pair.heads, pair.tails)]
    assert all(group == ops.EVERY or group <= NAMES for group in named)
    assert backend.runtimes and all(find_runtime(name)[1] for name in backend.runtimes)
    assert backend.title and "{out}/model.onnx" in backend.command
    assert backend.command.format(out="here").count("here/") == backend.command.count("{out}")


@every
def test_a_backend_that_emits_float_writes_a_scale_file_and_no_other_does(backend: Backend) -> None:
    assert (backend.emits == "float") == (backend.write is not None) == bool(backend.formats)
    for version in backend.formats:
        assert backend.write is not None
        for name, text in backend.write(TOY, version).items():
            assert name in backend.command and text.endswith("\n")
            assert all(e.tensor in text for e in TOY)


@every
def test_the_default_widths_are_among_the_widths(backend: Backend) -> None:
    assert backend.check_bits("weight", backend.weight.bits) in backend.weight_bits
    assert backend.check_bits("activation", backend.activation.bits) in backend.activation_bits


@every
@pytest.mark.parametrize("what", ["weight", "activation"])
def test_a_width_that_the_backend_has_not_is_refused_with_the_list(backend: Backend, what: Any) -> None:
    with pytest.raises(OptionError, match=f"'{backend.name}' has no 3-bit {what}s; allowed: .*8"):
        replace(backend, weight_bits=(8, 16), activation_bits=(8, 16)).check_bits(what, 3)


@every
def test_a_format_is_the_default_or_one_of_the_list(backend: Backend) -> None:
    assert backend.choose_format(None) == (backend.formats[0] if backend.formats else "")
    assert [backend.choose_format(version) for version in backend.formats] == list(backend.formats)
    with pytest.raises(OptionError, match=r"does not write format '9\.9'; allowed: ") as error:
        backend.choose_format("9.9")
    assert (", ".join(backend.formats) or "no scale file") in str(error.value)


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'snpe'"):
        backends["snpee"]
