"""Run the sample and the fast tests with the oldest and the newest releases that pyproject.toml allows.

    python tools/test_versions.py [oldest] [newest] [-- ARGUMENTS OF PYTEST]
    python tools/test_versions.py oldest -- -n 0 tests/test_api.py

oldest  every requirement of the package and of its runtimes at its lower bound exactly, so that a bound that does not work fails here
newest  the newest releases that pip finds within the bounds

Each set has an environment of its own in `.venv-versions/NAME`, made with the Python that runs this (oldest needs one that had been
released when these packages were: 3.11 to 3.13), and kept: the next run changes only what differs. pip's own settings apply, such as
an index of torch without CUDA. Runtimes whose packages do not fit the set are left out; their tests skip, and the table says so.
The exit status is 1 where the sample or a test failed, or a set could not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / ".venv-versions"
SETS = ("oldest", "newest")
SAMPLE = "samples/digits.pt2 --backend snpe --data samples/digits_calibration.npz --verify-data samples/digits_test.npz"
"""What `make demo` quantizes."""
NOT_FOR_TESTS = ("build", "mypy", "pytest-cov", "ruff")
"""In the extra `dev`, and needed by neither the sample nor the tests."""
LEFT_OUT = "left out"


@dataclass
class Outcome:
    """What came of one set."""

    installed: dict[str, str] = field(default_factory=dict)
    sample: str = "not run"
    tests: str = "not run"
    good: bool = False


def main() -> int:
    """Try the sets that are asked for; 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help="oldest, newest; both by default")
    ours, rest = _at_dashes(sys.argv[1:])
    sets = parser.parse_args(ours).sets or list(SETS)
    if unknown := set(sets) - set(SETS):
        parser.error(f"there is no set {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    outcomes = {name: try_set(name, project, rest) for name in sets}
    print("\n" + table(project, outcomes))
    return 0 if all(outcome.good for outcome in outcomes.values()) else 1


def _at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def try_set(name: str, project: dict[str, Any], rest: list[str]) -> Outcome:
    """Make the environment, run the sample, then the tests."""
    outcome, folder = Outcome(), PLACE / name
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    if not install(python, name, project):
        outcome.sample = "no environment"
        return outcome
    outcome.installed = versions(python)
    done = _run([python.with_name("qdeploy"), "quantize", *SAMPLE.split(), "--out", folder / "sample"])
    outcome.sample = "failed" if done else "passed"
    outcome.tests, tests_good = run_tests(python, rest)
    outcome.good = not done and tests_good
    return outcome


def install(python: Path, name: str, project: dict[str, Any]) -> bool:
    """Install the package and what its tests need; False where that fails. Runtimes come last, each if it fits the set."""
    extras = project["optional-dependencies"]
    fixed = PLACE / f"{name}.txt"
    lines = [re.sub(r">=([^,;]+).*", r"==\1", line) for line in _requirements(project)] if name == "oldest" else []
    fixed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", fixed]
    if name == "newest":
        pip += ["--upgrade", "--upgrade-strategy", "eager"]
    tools = [line for line in extras["dev"] if not line.startswith("qdeploy[") and package(line) not in NOT_FOR_TESTS]
    if _run([*pip, "--editable", ".[images]", *tools]):
        return False
    for line in extras["all"]:
        for extra in re.findall(r"\[(.*)\]", line)[0].split(","):
            if extra != "images" and _run([*pip, "--editable", f".[{extra}]"]):
                print(f"{name}: no release of '{extra}' fits this set", flush=True)
    return True


def run_tests(python: Path, rest: list[str]) -> tuple[str, bool]:
    """The counts of the fast tests, and whether all is well. Two processes with one thread each, as in `make test`."""
    command = [python, "-m", "pytest", "-n", "2", "-m", "not slow", *rest]
    last = ""
    with subprocess.Popen(_say(command), cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if re.search(r"\d+ (passed|failed|skipped|error)", line) else last
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last))
    return counts or f"exit status {process.returncode}", process.returncode == 0


def versions(python: Path) -> dict[str, str]:
    """What pip lists, by normal name."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True)
    return {normal(one["name"]): one["version"] for one in json.loads(listed.stdout)}


def table(project: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """One row for each requirement, and two for what came of it; one column for each set."""
    rows = [("package", "bounds", *outcomes)]
    for line in _requirements(project):
        name = package(line)
        found = [one.installed.get(normal(name), LEFT_OUT if one.installed else "") for one in outcomes.values()]
        rows.append((name, line[len(name) :], *found))
    rows.append(("sample", "", *(one.sample for one in outcomes.values())))
    rows.append(("tests", "", *(one.tests for one in outcomes.values())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _requirements(project: dict[str, Any]) -> Iterator[str]:
    extras = project["optional-dependencies"]
    """Those of the package and of its runtimes."""
    yield from project["dependencies"]
    for extra, lines in extras.items():
        if extra not in ("all", "dev", "coverage"):
            yield from lines


def package(line: str) -> str:
    """The name in a requirement."""
    return re.split(r"[<>=!~\[; ]", line)[0]


def normal(name: str) -> str:
    """One spelling of a name, as pip compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _say(command: list[str | Path]) -> list[str]:
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    return words


def _run(command: list[str | Path]) -> int:
    return subprocess.run(_say(command), cwd=ROOT, env=_environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
