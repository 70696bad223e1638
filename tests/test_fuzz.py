"""Damaged files of every kind give one clear message: the first 200 cases of tools/fuzz.py, and that the tool itself finds faults."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

EACH = 10


@pytest.mark.parametrize("first", range(0, 200, EACH))
def test_a_damaged_file_is_one_message_or_a_whole_artifact(first: int, samples: Path) -> None:
    outcomes = [fuzz.run_case(0, number, samples) for number in range(first, first + EACH)]
    assert [f"{one.number}: {one.faults}, {one.what}, {one.shown}" for one in outcomes if one.faults] == []


def test_a_case_is_the_same_every_time(samples: Path, tmp_path: Path) -> None:
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        what, command = fuzz.build(7, 3, samples, tmp_path / name)
        files = {p.name: p.read_bytes() for p in sorted((tmp_path / name).rglob("*")) if p.is_file()}
        made.append((what, [part.replace(name, "") for part in command], files))
    assert made[0] == made[1]


CRASHES = {
    "a traceback": ("raise KeyError('x')", "a traceback: KeyError"),
    "another status": ("sys.exit(3)", "status 3"),
    "a signal": ("os.kill(os.getpid(), 11)", "status -11"),
    "no message": ("sys.exit(2)", "not one message"),
    "two messages": ("sys.stderr.write('error: a\\nerror: b\\n'); sys.exit(2)", "not one message"),
    "something besides": ("sys.stderr.write('error: a\\n'); print('x'); sys.exit(2)", "something printed besides"),
    "no artifact": ("sys.exit(0)", "no artifact was written"),
    "a stray file": ("open('RAN', 'w'); sys.stderr.write('error: a\\n'); sys.exit(2)", "left behind: RAN"),
    "much memory": ("b'x' * (5 << 30)", "a traceback: MemoryError"),
    "much time": ("time.sleep(9)", "out of time"),
}


@pytest.mark.parametrize("kind", CRASHES)
def test_the_tool_tells_every_kind_of_fault(kind: str, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, words = CRASHES[kind]
    monkeypatch.setattr(fuzz, "qdeploy_main", lambda: exec(f"import os, sys, time\n{code}", {}))
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    number = next(
        n for n in range(99) if fuzz.Random(f"0.{n}").choices(fuzz.SUBJECTS, [s.weight for s in fuzz.SUBJECTS])[0].file == "digits.pt2"
    )
    assert any(words in fault for fault in fuzz.run_case(0, number, samples).faults)
