"""Runs that are killed, that meet each other, or that find no space lose and leave nothing, and the next run makes the right bytes."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest

Contents = dict[str, bytes]


HEARD: dict[int, int] = {}
"""Where to read what a process has said."""


def start(samples: Path, out: Path, seed: int, limit: Callable[[], None] = lambda: None) -> int:
    """Quantize into `out` in a forked process, which is returned."""
    sys.stdout.flush()
    reading, writing = os.pipe()  # which has no limit of size
    process = os.fork()
    if process:
        os.close(writing)
        HEARD[process] = reading
        return process
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        limit()
        options = ["--samples", "8", "--recipe", "fast", "--runtime", "onnxruntime:none", "--seed", str(seed)]
        data = ["--backend", "snpe", "--data", str(samples / "images.npz")]
        code = fuzz._call(["quantize", str(samples / "digits.pt2"), *data, *options, "--out", str(out)])
        sys.stderr.flush()
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


def end(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def said(process: int) -> str:
    """What the process, which has ended, put on its standard error."""
    with os.fdopen(HEARD.pop(process)) as file:
        return file.read()


def contents(folder: Path) -> Contents:
    """All files below `folder`, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def wholes(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Contents, float]]:
    """What runs of two seeds write when nothing happens to them, and their seconds."""
    found = []
    for seed in (0, 1):
        place = tmp_path_factory.mktemp("whole") / "here"
        place.mkdir()
        begin = time.monotonic()
        assert end(start(samples, place / "out", seed)) == 0
        found.append((contents(place), time.monotonic() - begin))
    assert found[0][0] != found[1][0]
    return found


@pytest.mark.parametrize("part", [range(5), *(pytest.param(range(n, n + 15), marks=pytest.mark.slow) for n in (5, 20, 35))])
def test_a_run_that_is_killed_at_any_moment_loses_and_leaves_nothing(
    part: range, samples: Path, wholes: list[tuple[Contents, float]], tmp_path: Path
) -> None:
    (older, _), (newer, seconds) = wholes
    place = tmp_path / "here"
    place.mkdir()
    assert end(start(samples, place / "out", 0)) == 0
    for number in part:
        process = start(samples, place / "out", 1)
        time.sleep(random.Random(number).uniform(0.3 if number % 3 else 0.9, 1.05) * seconds)
        os.kill(process, signal.SIGKILL)
        end(process)
        kept = {name: data for name, data in contents(place).items() if not name.startswith(".out.work")}
        assert kept in (older, newer), "an artifact is there as it was, or whole and new"
        assert end(start(samples, place / "out", number % 2)) == 0
        assert contents(place) == (newer if number % 2 else older)


@pytest.mark.parametrize("part", [range(2), pytest.param(range(2, 20), marks=pytest.mark.slow)])
def test_of_two_runs_at_once_one_writes_and_the_other_is_told_so(
    part: range, samples: Path, wholes: list[tuple[Contents, float]], tmp_path: Path
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    for number in part:
        processes = []
        for seed in (0, 1):
            processes.append(start(samples, place / "out", seed))
            time.sleep(random.Random(number).uniform(0, 0.02))
        statuses = [end(process) for process in processes]
        texts = [said(process) for process in processes]
        assert sorted(statuses) == [0, 2], texts
        winner = statuses.index(0)
        assert "another run that is writing there" in texts[1 - winner]
        assert contents(place) == wholes[winner][0]


@pytest.mark.parametrize("size", [1, 1000, 9000, 30_000, 60_000])
def test_on_a_full_disk_the_older_artifact_stays(
    size: int, samples: Path, wholes: list[tuple[Contents, float]], tmp_path: Path
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    assert end(start(samples, place / "out", 0)) == 0

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = start(samples, place / "out", 1, limit=limit)
    status = end(process)
    if max(map(len, wholes[1][0].values())) > size:
        assert status == 2, said(process)
        assert contents(place) == wholes[0][0]
    else:
        assert status == 0 and contents(place) == wholes[1][0]
