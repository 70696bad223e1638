"""Sessions in a process of their own: what they compute is the same, and whatever ends them is an error that says so."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest
from odd_runtimes import crashes, crashes_at_work, exits, hangs, hangs_at_work, raises, refuses, runtime, works

from qdeploy.core.errors import ArtifactError
from qdeploy.export.artifact import Artifact
from qdeploy.runtimes.process import Host
from qdeploy.runtimes.runtime import Session, runtimes
from qdeploy.verification.debug import divergence
from qdeploy.verification.verify import verify_artifact

ROOT = Path(__file__).resolve().parent.parent


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").is_file() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


@pytest.fixture
def hosts() -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(opened: Callable[[Path, int, str], Session], limit: float = 60) -> Host:
        made.append(Host(runtime(opened, limit)))
        return made[-1]

    yield make
    for host in made:
        host.close()


def test_a_session_computes_elsewhere_what_it_computes_here_until_it_is_closed(hosts: Callable[..., Host], tmp_path: Path) -> None:
    host = hosts(works)
    session = host.open(tmp_path / "model.onnx", 2, "default")
    for value in (np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 2), np.int64), np.arange(12).reshape(3, 4).T[::2]):
        (made,) = session.run([value])
        np.testing.assert_array_equal(made, value + 1)
        assert (made.dtype, made.shape) == (value.dtype, value.shape) and made.flags.writeable
    pid = session.placement()["accelerator"]
    assert pid != os.getpid() and alive(pid)
    again = host.open(tmp_path / "model.onnx", 4, "default")
    assert again.placement()["accelerator"] == pid, "one process for all that is opened in turn"
    host.close()
    assert gone(pid)


def test_a_process_ends_with_a_host_that_nobody_closes(tmp_path: Path) -> None:
    host = Host(runtime(works))
    pid = host.open(tmp_path / "model.onnx", 2, "default").placement()["accelerator"]
    del host
    assert gone(pid)


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (crashes, "the process of the runtime ended by signal SIGSEGV; found: vector::_M_range_check"),
        (crashes_at_work, "the process of the runtime ended by signal SIGSEGV; found: vector::_M_range_check"),
        (exits, "the process of the runtime ended with exit status 7"),
        (hangs, "no answer within 3 s"),
        (hangs_at_work, "no answer within 3 s"),
        (refuses, "cannot read 'model.onnx'; found: default; to do: choose another runtime"),
        (raises, "NotImplementedError: weights of 1e-20"),
    ],
)
def test_whatever_happens_over_there_is_one_error_that_says_so(
    opened: Callable[[Path, int, str], Session], said: str, hosts: Callable[..., Host], tmp_path: Path
) -> None:
    host = hosts(opened, 3 if said.startswith("no answer") else 60)
    for _ in range(2):  # a process that ended is replaced by the next session
        with pytest.raises(ArtifactError) as error:
            host.open(tmp_path / "model.onnx", 2, "default").run([np.ones((2, 2))])
        assert str(error.value) == said


def test_an_error_leaves_the_session_as_it_was(hosts: Callable[..., Host], tmp_path: Path) -> None:
    session = hosts(works).open(tmp_path / "model.onnx", 2, "default")
    with pytest.raises(ArtifactError, match="TypeError"):
        session.run([np.array(["a"])])
    np.testing.assert_array_equal(session.run([np.ones(3)])[0], np.full(3, 2.0))


def add(monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path, int, str], Session], limit: float = 60) -> None:
    monkeypatch.setitem(runtimes._values, "own", runtime(opened, limit))


@pytest.mark.parametrize("opened", [crashes, crashes_at_work, exits, hangs])
def test_a_library_that_crashes_or_hangs_is_a_row_and_costs_nothing_else(
    opened: Callable[[Path, int, str], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch, opened, 3 if opened is hangs else 60)
    report = verify_artifact(Artifact.open(networks.artifact_path("plain", "snpe")), None, ["own", "onnxruntime:none"])
    *_, row, other = report.results
    assert row.faults[0].startswith("could not run: ") and not row.passed and row.samples == 0
    assert any(words in row.faults[0] for words in ("signal SIGSEGV", "exit status 7", "no answer within 3 s"))
    assert other.passed and other.samples == 32


def test_an_op_that_crashes_alone_is_a_row_of_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, crashes)
    found = divergence(networks.artifact("plain", "snpe"), "own", isolate=True)
    assert found.tensors and all("signal SIGSEGV" in row.failure for row in found.tensors)
    with pytest.raises(ArtifactError, match=r"runtime 'own' cannot run the file with all tensors.*signal SIGSEGV"):
        divergence(networks.artifact("plain", "snpe"), "own")


def test_what_a_library_prints_on_its_way_does_not_reach_the_user(
    hosts: Callable[..., Host], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError):
        hosts(crashes).open(tmp_path / "model.onnx", 2, "default")
    assert capfd.readouterr() == ("", "")


SCRIPT = """
import sys, time
from pathlib import Path
import odd_runtimes
from qdeploy.runtimes.process import Host

host = Host(odd_runtimes.runtime(odd_runtimes.{opened}))  # no `if __name__`: the script is not run a second time
session = host.open(Path("model.onnx"), 2, "default")
print(session.placement()["accelerator"], flush=True)
import numpy
session.run([numpy.ones(2)])
time.sleep({sleep})
"""


def script(opened: str, sleep: int = 0) -> subprocess.Popen[str]:
    code = textwrap.dedent(SCRIPT).format(opened=opened, sleep=sleep)
    places = os.pathsep.join((str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": places}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def test_a_script_without_a_main_guard_ends_with_all_its_processes() -> None:
    done = script("works")
    said, errors = done.communicate(timeout=60)
    assert (done.returncode, errors) == (0, "") and gone(int(said))


@pytest.mark.parametrize(("opened", "sleep"), [("works", 60), ("hangs_at_work", 0)])
@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
def test_a_process_ends_with_a_program_that_is_interrupted_or_killed(way: signal.Signals, opened: str, sleep: int) -> None:
    program = script(opened, sleep)
    assert program.stdout is not None
    pid = int(program.stdout.readline())
    time.sleep(0.3)
    os.killpg(program.pid, way)  # Ctrl-C goes to all of the terminal's group
    program.communicate(timeout=20)
    assert gone(pid)


@pytest.mark.parametrize("name", [one.name for one in runtimes if one.isolated])
def test_isolated_runtimes_can_be_opened_by_name_elsewhere(name: str) -> None:
    assert pickle.loads(pickle.dumps(runtimes[name].open)) is runtimes[name].open


@pytest.mark.parametrize("name", ["openvino", "qnn_htp", "tvm"])
def test_outputs_of_another_process_are_those_of_this_one(name: str) -> None:
    found = runtimes[name]
    if not found.installed():
        pytest.skip(f"runtime '{name}' is not installed")
    artifact = networks.artifact("plain", "snpe")
    inputs = [artifact.reference()["input.x"][:4]]
    made = []
    for isolated in (True, False):
        host = Host(replace(found, isolated=isolated))
        session = host.open(artifact.simulation, 4, found.variants[0])
        made.append((session.run(inputs)[0], dict(session.placement())))
        host.close()
    np.testing.assert_array_equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
