"""The command line: what each command prints and writes, where, and with which exit status."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qdeploy.cli.main import main
from qdeploy.export.manifest import sealed
from qdeploy.files.model import load_model
from qdeploy.runtimes.runtime import Session, runtimes

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
MODEL, CALIBRATION, TEST = (str(SAMPLES / name) for name in ("digits.pt2", "digits_calibration.npz", "digits_test.npz"))
QUICK = ["--recipe", "fast", "--samples", "64", "--runtime", "onnxruntime:none"]
PROGRAM = [sys.executable, "-c", "from qdeploy.cli.main import main; main()"]
FILES = {"model.onnx", "model.encodings", "model.sim.onnx", "reference.npz", "qdeploy.json"}

ZOO = """
    import numpy as np
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.fc = nn.Linear(144, 10)
        def forward(self, x):
            return self.fc(torch.relu(self.conv(x)).flatten(1))

    class Four(Net):
        def forward(self, x):
            return self.fc(torch.relu(self.conv(x)).reshape(4, 144))

    def net():
        torch.manual_seed(0)
        return Net()

    def make():
        print("what the user's own code prints")
        return net()

    def four(): return torch.export.export(Four().eval(), (torch.zeros(4, 1, 8, 8),))
    def one(): return torch.export.export(Net().eval(), (torch.zeros(1, 1, 8, 8),))
    def images(): return np.random.default_rng(0).random((10, 1, 8, 8), np.float32)
    def endless():
        import itertools, time
        class Slow:
            def __len__(self): return 100000
            def __getitem__(self, index):
                if index > 32:
                    print("calibrating", flush=True)
                time.sleep(0.001)
                return torch.zeros(1, 8, 8)
        return Slow()
    def interrupting():
        import os, signal
        class Interrupting:
            def __len__(self): return 100000
            def __getitem__(self, index):
                if index > 32:
                    os.kill(os.getpid(), signal.SIGINT)
                return torch.zeros(1, 8, 8)
        return Interrupting()
"""

MY_NPU = """
    from dataclasses import replace

    from qdeploy.core.backend import Format, backends, register

    FORMAT = Format(name="mine", command="my-compiler {out}/model.onnx")
    MINE = register(replace(backends["onnxruntime"], name="my_npu", title="My own NPU", formats=(FORMAT,)))
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's own files."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "zoo.py").write_text(textwrap.dedent(ZOO))
    (folder / "my_npu.py").write_text(textwrap.dedent(MY_NPU))
    (folder / "mine.toml").write_text('name = "mine"\n[activation]\nobserver = "percentile"\npercentile = 99.5\n')
    return folder


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(*arguments: object) -> int:
    """The exit status of the command line, in this process."""
    before = sys.argv
    sys.argv = ["qdeploy", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def quantize(out: Path, *arguments: object, model: str = MODEL, data: object = CALIBRATION, backend: object = "snpe") -> int:
    return run("quantize", model, "--backend", backend, "--data", data, "--out", out, *QUICK, *arguments)


def quantize_net(zoo: Path, out: Path, *arguments: object, model: str = "net", backend: object = "snpe") -> int:
    """Of the user's own small network."""
    given = ["--input-shape", "1,1,8,8", *arguments]
    return quantize(out, *given, model=f"{zoo}/zoo.py:{model}", data=f"{zoo}/zoo.py:images", backend=backend)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample, quantized; read only."""
    out = tmp_path_factory.mktemp("artifact") / "out"
    assert quantize(out, "--quiet") == 0
    return out


def test_help_is_fast_and_imports_no_torch() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, timeout=30)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "quantize" in done.stdout, done.stderr
    assert statistics.median(times) < 0.5, times
    code = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); from qdeploy.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=30)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("command", ["quantize", "verify", "debug", "inspect", "backends", "recipes", "runtimes"])
def test_help_of_every_command(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    out, err = capfd.readouterr()
    assert f"qdeploy {command}" in out and "--json" in out
    assert err == ""


@pytest.mark.parametrize(
    ("command", "name", "keys"),
    [
        ("backends", "snpe", {"hardware", "weights", "activations", "weight_bits", "formats", "runtimes", "command"}),
        ("recipes", "percentile", {"summary", "activation", "weight"}),
        ("runtimes", "onnxruntime", {"title", "variants", "installed", "install"}),
    ],
)
def test_lists(command: str, name: str, keys: set[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--json") == 0
    rows = json.loads(capfd.readouterr().out)
    names = [row["name"] for row in rows]
    assert name in names and len(names) > 3
    assert run(command, name, "--json") == 0
    (one,) = json.loads(capfd.readouterr().out)
    assert one == rows[names.index(name)] and keys <= one.keys()
    assert run(command) == 0
    table = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["name", *names]
    assert run(command, name) == 0
    assert capfd.readouterr().out.startswith("name ")


def test_quantize_prints_the_table_and_the_next_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert quantize(out, "--verify-data", TEST, "--runtime", "onnxruntime:all") == 0
    shown, err = capfd.readouterr()
    assert err == ""  # no progress bar where nobody looks
    lines = shown.splitlines()
    header = next(i for i, line in enumerate(lines) if "accuracy" in line)
    assert lines[header].split() == [
        "accuracy",
        "top-1",
        "agreement",
        "SQNR",
        "dB",
        "max",
        "steps",
        "nodes",
        "size",
        "decides",
        "check",
    ]
    rows = {line.split()[0]: line for line in lines[header + 1 : header + 5]}
    assert list(rows) == ["float", "simulated", "onnxruntime:none", "onnxruntime:all"]
    assert "exact" in rows["simulated"] and rows["onnxruntime:none"].rstrip().endswith("passed")
    accuracy = float(rows["simulated"].split()[1].rstrip("%"))
    assert accuracy > 97
    assert "450 samples" in shown
    assert lines[-1] == f"next: qairt-converter --input_network {out}/model.onnx --quantization_overrides {out}/model.encodings"
    assert {path.name for path in out.iterdir()} == FILES
    assert all(name in shown for name in FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = json.loads((out / "qdeploy.json").read_text())
    assert (manifest["backend"], manifest["calibration_samples"], manifest["verify"]["passed"]) == ("snpe", 64, True)


def test_json_is_one_document(zoo: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "out"))  # the artifact of another backend, which is replaced
    assert quantize(out, "--json", model=f"{zoo}/zoo.py:make", data=f"{zoo}/zoo.py:images", backend="onnxruntime") == 2
    assert "--input-shape" in capfd.readouterr().err
    assert {path.name for path in out.iterdir()} == FILES
    assert quantize_net(zoo, out, "--json", model="make", backend="onnxruntime") == 0
    shown, err = capfd.readouterr()
    document = json.loads(shown)
    assert err == "what the user's own code prints\n"
    assert document["verify"]["passed"] and document["out"] == str(out) and document["backend"] == "onnxruntime"
    assert str(out) in document["command"]
    first = document["verify"]["results"][0]
    assert first["samples"] == 10 and first["accuracy"] is None
    assert {path.name for path in out.iterdir()} == {"model.onnx", "reference.npz", "qdeploy.json"}
    assert run("verify", out, "--runtime", "onnxruntime:none", "--json") == 0
    assert json.loads(capfd.readouterr().out)["passed"] is True


def test_quiet_prints_nothing_in_any_format(zoo: Path, artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    capfd.readouterr()
    assert quantize_net(zoo, out, "--quiet", "--format", "0.6.1") == 0
    assert capfd.readouterr() == ("", "")
    old, new = (json.loads((folder / "model.encodings").read_text()) for folder in (out, artifact))
    assert (old["version"], new["version"]) == ("0.6.1", "1.0.0")
    assert json.loads((out / "qdeploy.json").read_text())["format"] == "0.6.1"
    assert run("verify", out, "--quiet", "--runtime", "onnxruntime:none") == 0
    assert capfd.readouterr() == ("", "")


def test_verify_with_and_without_data(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "out"))
    assert run("verify", out, "--runtime", "onnxruntime") == 0
    shown = capfd.readouterr().out
    assert "64 samples" in shown and "onnxruntime:all" in shown and "onnxruntime:none" in shown and "%" in shown
    assert run("verify", out, "--data", TEST, "--runtime", "onnxruntime:none", "--json") == 0
    own = json.loads(capfd.readouterr().out)
    assert own["results"][0]["samples"] == 450 and own["results"][-1]["accuracy"] > 0.97
    stored = np.load(TEST)
    (tmp_path / "labels.txt").write_text("\n".join(map(str, (stored["labels"] + 1) % 10)))
    np.save(tmp_path / "images.npy", stored["images"])
    given = ["--data", tmp_path / "images.npy", "--labels", tmp_path / "labels.txt", "--runtime", "onnxruntime:none", "--json"]
    assert run("verify", out, *given) == 0
    assert json.loads(capfd.readouterr().out)["results"][-1]["accuracy"] < 0.1  # every label is wrong
    assert json.loads((out / "qdeploy.json").read_text())["verify"]["results"][-1]["accuracy"] < 0.1


def test_failed_checks_are_exit_status_1(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "out"))
    model = onnx.load(out / "model.sim.onnx")
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    changed = 0
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if tensor.name in scales and value.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value * (3 if changed % 2 else 0.2), np.float32), tensor.name))
            changed += 1
    assert changed
    onnx.save(model, out / "model.sim.onnx")
    manifest = json.loads((out / "qdeploy.json").read_text())
    manifest["files"]["model.sim.onnx"] = hashlib.sha256((out / "model.sim.onnx").read_bytes()).hexdigest()
    (out / "qdeploy.json").write_text(json.dumps(sealed(manifest)))
    assert run("verify", out, "--runtime", "onnxruntime:none") == 1
    shown, err = capfd.readouterr()
    assert "SQNR" in shown and "is below 40 dB" in " ".join(shown.split()) and err == ""
    assert run("verify", out, "--runtime", "onnxruntime:none", "--json", "--data", TEST) == 1
    report = json.loads(capfd.readouterr().out)
    assert report["passed"] is False and report["faults"]
    assert run("verify", out, "--runtime", "onnxruntime:none", "--quiet") == 1
    assert capfd.readouterr() == ("", "")


def test_debug_shows_every_tensor_on_the_samples_of_the_artifact_or_others(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (artifact / "qdeploy.json").read_bytes()
    assert run("debug", artifact, "--runtime", "onnxruntime:none") == 0
    shown, err = capfd.readouterr()
    lines = shown.splitlines()
    assert lines[0].split() == ["tensor", "ops", "scheme", "codes", "that", "differ", "largest,", "in", "steps"] and err == ""
    assert [line.split()[0] for line in lines[1:3]] == ["images", "relu"] and "uint8 asymmetric per-tensor" in lines[1]
    assert lines[-2] == "64 samples on onnxruntime:none" and lines[-1].startswith("no tensor parts: ")
    given = ["--data", TEST, "--samples", 20, "--isolate", "--json"]
    assert run("debug", artifact, "--runtime", "onnxruntime", *given) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["runtime"], document["samples"], document["isolated"], document["first"]) == ("onnxruntime:all", 16, True, None)
    assert all(set(one) == {"tensor", "op", "scheme", "values", "differ", "largest", "failure"} for one in document["tensors"])
    assert run("debug", artifact, "--runtime", "onnxruntime", "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert (artifact / "qdeploy.json").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--runtime", "onnxruntim"], "did you mean 'onnxruntime'"),
        (["--runtime", "onnxruntime:al"], "unknown variant of runtime 'onnxruntime'"),
        (["--runtime", "onnxruntime", "--samples", 0], "--samples is too small; found: 0"),
        (["--runtime", "onnxruntime", "--data", "nowhere.npz"], "nowhere.npz"),
        ([], "--runtime"),
    ],
)
def test_debug_says_what_is_wrong_with_its_arguments(
    given: list[object], message: str, artifact: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("debug", artifact, *given) == 2
    shown, err = capfd.readouterr()
    assert shown == "" and message in err and "Traceback" not in err


def test_a_runtime_that_fails_is_followed_by_what_to_do_next(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "an out"))
    real = runtimes["onnxruntime"]

    class Wrong:
        """A session with other outputs."""

        def __init__(self, session: Session) -> None:
            self.session = session

        def run(self, inputs: Any) -> Any:
            return [2 * made for made in self.session.run(inputs)]

        def placement(self) -> dict[str, int]:
            return {}

    def opened(path: Path, batch: int, variant: str) -> Any:
        session = real.open(path, batch, variant)
        return Wrong(session) if variant == "all" else session

    monkeypatch.setitem(runtimes._values, "onnxruntime", replace(real, open=opened))
    assert run("verify", out, "--runtime", "onnxruntime", "--data", TEST) == 1
    lines = capfd.readouterr().out.splitlines()
    command = f"qdeploy debug '{out}' --runtime onnxruntime:all --data {TEST}"
    assert lines[-2:] == [f"to see which tensor parts first: {command}", "the file is usable on onnxruntime:none"]
    assert run(*shlex.split(command)[1:]) == 0
    assert "the first to part: 'images' (input)" in capfd.readouterr().out


def test_inspect_gives_a_reason_for_every_tensor(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", MODEL, "--backend", "snpe", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["backend"] == "snpe" and len(document["tensors"]) > 10
    assert all(all(tensor[key] for key in ("tensor", "role", "op", "scheme", "reason")) for tensor in document["tensors"])
    assert run("inspect", MODEL, "--backend", "snpe") == 0
    shown = capfd.readouterr().out
    assert all(f"{tensor['tensor']} " in shown and tensor["reason"] in shown for tensor in document["tensors"])


def test_a_backend_file_and_a_recipe_file_of_the_users_own(zoo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert quantize_net(zoo, out, "--recipe", zoo / "mine.toml", backend=zoo / "my_npu.py") == 0
    assert capfd.readouterr().out.endswith(f"next: my-compiler {out}/model.onnx\n")
    manifest = json.loads((out / "qdeploy.json").read_text())
    assert (manifest["backend"], manifest["recipe"]["name"]) == ("my_npu", "mine")
    assert manifest["recipe"]["activation"] == {"observer": "percentile", "options": {"percentile": 99.5}}
    assert run("verify", out, "--quiet", "--runtime", "onnxruntime:none") == 0  # without the file


def _images(folder: Path) -> Path:
    from PIL import Image

    for name in "ab":
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (16, 12), (20 * i, 99, 7)).save(folder / "photos" / name / f"{i}.png")
    return folder / "photos"


@pytest.mark.parametrize("case", ["state dict and arrays", "pickle and images"])
def test_models_and_data_of_every_kind(case: str, zoo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """But callables, which most tests here give."""
    if case == "state dict and arrays":
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "d.npz", x=rng.random((10, 1, 8, 8), np.float32), labels=np.arange(10))
        torch.save(load_model(f"{zoo}/zoo.py:net").state_dict(), tmp_path / "w.pt")  # type: ignore[union-attr]
        model, data, more = tmp_path / "w.pt", tmp_path / "d.npz", ["--arch", f"{zoo}/zoo.py:net"]
    else:
        torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)), tmp_path / "m.pt")
        model, data, more = tmp_path / "m.pt", _images(tmp_path), ["--allow-pickle", "--input-shape", "1,1,8,8"]
        more += ["--mean", "0.5", "--std", "0.25", "--resize", "8x8"]
    given = ["--json", "--verify-data", data, *more]
    assert quantize(tmp_path / "out", *given, model=str(model), data=data, backend="onnxruntime") == 0
    report = json.loads(capfd.readouterr().out)["verify"]
    assert report["passed"] and report["results"][0]["samples"] == 10
    assert report["results"][0]["accuracy"] is not None


@pytest.mark.parametrize(("name", "samples"), [("four", 8), ("one", 10)])
def test_program_with_a_fixed_batch(name: str, samples: int, zoo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).random((10, 1, 8, 8), np.float32)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(10))
    data = tmp_path / "d.npz"
    given = ["--json", "--verify-data", data]
    assert quantize(tmp_path / "out", *given, model=f"{zoo}/zoo.py:{name}", data=data, backend="onnxruntime") == 0
    report = json.loads(capfd.readouterr().out)["verify"]
    assert report["passed"] and report["results"][0]["samples"] == samples
    assert run("verify", tmp_path / "out", "--data", data, "--runtime", "onnxruntime:none", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    assert report["passed"] and report["results"][0]["samples"] == samples


def test_progress_on_a_terminal_only(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(artifact, tmp_path / "out"))
    for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # how Linux says that the other side is closed
            while part := os.read(ours, 4096):
                seen.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert run("verify", out, "--data", TEST, "--runtime", "onnxruntime:none") == 0
    finally:
        reader.join(60)
        os.close(ours)
    terminal_shown, shown = b"".join(seen).decode(), capfd.readouterr()
    assert "verify" in terminal_shown and "450/450" in terminal_shown
    assert "450/450" not in shown.out and "\x1b" not in shown.out and shown.err == ""


def test_an_interrupt_of_the_calibration_leaves_nothing(zoo: Path, tmp_path: Path) -> None:
    given = [f"{zoo}/zoo.py:net", "--input-shape", "1,1,8,8", "--data", f"{zoo}/zoo.py:endless", "--samples", "100000"]
    command = [*PROGRAM, "quantize", *given, "--backend", "onnxruntime", *QUICK[:2], "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if "calibrating" in line:
            break
    process.send_signal(signal.SIGINT)
    shown, err = process.communicate(timeout=60)
    assert process.returncode in (1, 130)
    assert "Traceback" not in err and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_an_interrupt_of_the_verification_leaves_nothing(zoo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    late = f"{zoo}/zoo.py:interrupting"
    assert quantize_net(zoo, tmp_path / "out", "--verify-data", late, backend="onnxruntime") in (1, 130)
    shown, err = capfd.readouterr()
    assert "Traceback" not in err and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_one_message(
    number: int, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def write_bytes(self: Path, data: Any) -> int:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert quantize_net(zoo, tmp_path / "out", "--json") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {os.strerror(number)}: '{tmp_path}/") and err.count("\n") == 1
    assert "; to do: " in err
    assert not list(tmp_path.iterdir())
