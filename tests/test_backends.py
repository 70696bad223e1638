"""Every backend as data, and the files of the encodings targets in artifacts of real networks.

The toy network, worked: 2/255 rounded to float32 is 0.007843137718737125; the range [-1, 1] of x starts 127.5 steps below 0, so code 0
stands for -128 steps, -1.003921627998352, code 255 for 127 steps, 0.9960784902796149, and the offset is -128. A symmetric weight of
channel maximum 0.5 has the step 0.5/127 and codes from -128, an asymmetric one with values in [-0.5, 0.5] the step 1/255. The bias
counts steps of 2/255 x the weight's step in 32 bits, from -2^31. The files themselves are in tests/golden.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import networks
import numpy as np
import pytest
from toy import toy

import qdeploy
from qdeploy.core import ops
from qdeploy.core.backend import QDQ, Backend, Emitted, Format, backends
from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.runtimes.runtime import find_runtime
from qdeploy.simulation.prepared import Prepared

ENCODINGS = "model.encodings"
VERSIONS = [(name, version) for name in ("snpe", "qnn") for version in ("1.0.0", "0.6.1")]
NAMES = {op.name for op in ops.OPS.values()}
every = pytest.mark.parametrize("backend", list(backends), ids=lambda backend: backend.name)
each_version = pytest.mark.parametrize(("name", "version"), VERSIONS)


@cache
def calibrated(network: str) -> dict[str, Prepared]:
    """A network for both targets whose files are read here."""
    net, data = networks.toy() if network == "toy" else (networks.network(network), networks.batches(network))
    return networks.several(net, data, ("snpe", "qnn"), recipe="fast")


@each_version
def test_the_toy_network_end_to_end_has_the_numbers_worked_by_hand(name: str, version: str, tmp_path: Path) -> None:
    made = rows(json.loads((qdeploy.convert(calibrated("toy")[name], tmp_path / "out", version).path / ENCODINGS).read_text()))
    steps = [1 / 255] if name == "snpe" else [0.5 / 127, 0.25 / 127]
    expected = {
        "x": (8, [2 / 255], -128, False),
        "r0": (8, [2.54 / 255], 0, False),
        "conv0.weight": (8, steps, -128, name == "qnn"),
        "conv0.bias": (32, [2 / 255 * step for step in steps], -(2**31), True),
    }
    assert {tensor: len(channels) for tensor, channels in made.items()} == {t: len(scales) for t, (_, scales, _, _) in expected.items()}
    for tensor, (bits, scales, offset, symmetric) in expected.items():
        for row, scale in zip(made[tensor], scales, strict=True):
            assert (row["bits"], row["offset"], row["symmetric"]) == (bits, offset, symmetric), tensor
            # a scale may be raised by up to 2^-9 of itself to keep results off the rounding ties
            assert scale * (1 - 1e-6) <= row["scale"] <= scale * (1 + 2.0**-9 + 1e-6), tensor


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


@each_version
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_the_scale_file_holds_every_encoding_with_offset_minus_zero_point(network: str, name: str, version: str) -> None:
    encodings = calibrated(network)[name].encodings()
    writer = backends[name].choose_format(version).write
    assert writer is not None
    emitted = Emitted(encodings=tuple(encodings), nodes=(), shapes={}, inputs=(), outputs=())
    made = rows(json.loads(writer(emitted)[ENCODINGS]))
    assert set(made) == {e.tensor for e in encodings}
    for e in encodings:
        channels = made[e.tensor]
        np.testing.assert_array_equal(np.array([c["scale"] for c in channels], dtype=np.float32), e.scale)
        smallest = -(2 ** (e.spec.bits - 1)) if e.spec.signed else 0
        assert [c["offset"] for c in channels] == [smallest - int(z) for z in e.zero_point]
        assert all(c["offset"] <= 0 for c in channels)
        if version == "0.6.1":
            for c in channels:
                assert c["min"] == pytest.approx(c["offset"] * c["scale"], rel=1e-12)
                assert c["max"] == pytest.approx((c["offset"] + 2 ** c["bits"] - 1) * c["scale"], rel=1e-12)


@pytest.mark.parametrize("name", ["snpe", "qnn"])
def test_the_artifact_holds_the_scale_file_of_its_own_encodings(name: str) -> None:
    artifact = networks.artifact("residual", name)
    assert artifact.manifest["format"] == "1.0.0"
    made = rows(json.loads((artifact.path / ENCODINGS).read_text()))
    assert {t: [c["scale"] for c in channels] for t, channels in made.items()} == {
        e.tensor: [float(s) for s in e.scale] for e in artifact.encodings
    }


@every
def test_a_backend_names_only_ops_and_runtimes_that_there_are(backend: Backend) -> None:
    assert backends[backend.name] is backend
    named = [rule.ops for rule in backend.rules] + [part for pair in backend.fuse for part in (pair.heads, pair.tails)]
    assert all(group == ops.EVERY or group <= NAMES for group in named)
    assert backend.runtimes and all(find_runtime(name)[1] for name in backend.runtimes)
    assert backend.title and backend.vendor_runtime in ("", *backend.runtimes)
    assert all(find_runtime(name)[1] for name in backend.deciding)
    assert set(backend.deciding) == {backend.vendor_runtime, "onnxruntime:none"} - {""}


@every
def test_a_command_names_the_files_of_its_format_and_only_the_folder_is_to_be_filled_in(backend: Backend) -> None:
    for form in backend.formats:
        if form.command:
            assert "{out}/model.onnx" in form.command, form.name
            assert form.command.format(out="here").count("here/") == form.command.count("{out}")
            assert "{" not in form.command.replace("{out}/", "")


@every
def test_a_scale_file_is_text_about_tensors_or_nodes_of_the_model(backend: Backend) -> None:
    emitted = toy(backend)
    for form in backend.formats:
        for name, text in (form.write(emitted) if form.write is not None else {}).items():
            assert "conv0" in text or "r0" in text, name
            assert text.endswith("\n") and not text.endswith("\n\n"), name


@every
def test_the_default_widths_are_among_the_widths(backend: Backend) -> None:
    assert backend.check_bits("weight", backend.weight.bits) in backend.weight_bits
    assert backend.check_bits("activation", backend.activation.bits) in backend.activation_bits


@every
@pytest.mark.parametrize("what", ["weight", "activation"])
def test_a_width_that_the_backend_has_not_is_refused_with_the_list(backend: Backend, what: Literal["weight", "activation"]) -> None:
    with pytest.raises(OptionError, match=f"'{backend.name}' has no 3-bit {what}s; allowed: .*8"):
        replace(backend, weight_bits=(8, 16), activation_bits=(8, 16)).check_bits(what, 3)


@every
def test_a_format_is_the_default_or_one_of_the_list(backend: Backend) -> None:
    assert backend.choose_format(None) is backend.formats[0]
    assert [backend.choose_format(form.name) for form in backend.formats] == list(backend.formats)
    with pytest.raises(OptionError, match=r"does not write format '9\.9'; allowed: ") as error:
        backend.choose_format("9.9")
    assert ", ".join(form.name for form in backend.formats) in str(error.value)


def test_a_backend_that_says_nothing_of_formats_writes_a_qdq_model_alone() -> None:
    int8 = QuantSpec(signed=True, symmetric=True)
    plain = Backend(name="plain", title="Plain", activation=int8, weight=int8, bias="float", rules=())
    assert plain.formats == (QDQ,) == (Format(name="qdq"),)


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'snpe'"):
        backends["snpee"]
