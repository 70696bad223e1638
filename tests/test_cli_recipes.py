"""Recipes on the command line: the table of steps, labels of the calibration data, interrupted runs, and no data at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

from qdeploy.cli.main import main
from qdeploy.recipes.presets import RECIPES
from qdeploy.recipes.step import step_options

ROOT = Path(__file__).resolve().parent.parent
MODEL, CALIBRATION = (str(ROOT / "samples" / name) for name in ("digits.pt2", "digits_calibration.npz"))
COMMON = ["--samples", "96", "--runtime", "onnxruntime:none"]
SHORT = '[[step]]\nname = "ranges"\n[[step]]\nname = "qdrop"\niterations = 150\nbatch = 16\n'


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plain network, quicker than the sample, its images and the classes that it sees in them; read only."""
    folder = tmp_path_factory.mktemp("plain")
    net, images = networks.network("plain"), torch.cat([batch for (batch,) in networks.batches("plain")])
    program = torch.export.export(net, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "plain.pt2")
    np.save(folder / "images.npy", images.numpy())
    np.save(folder / "labels.npy", net(images).argmax(1).numpy())
    return folder


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the program with these arguments."""
    monkeypatch.setattr(sys, "argv", ["qdeploy", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def command(out: Path, recipe: Path, *more: str) -> list[str]:
    start = [sys.executable, "-c", "from qdeploy.cli.main import main; main()", "quantize", MODEL, "--backend", "academic"]
    return [*start, "--data", CALIBRATION, "--recipe", str(recipe), "--weight-bits", "4", *COMMON, "--out", str(out), *more]


def contents(out: Path) -> dict[str, object]:
    """All bytes of an artifact."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_steps_are_printed_as_a_table(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    given = ["--data", plain / "images.npy", *COMMON, "--out", out]
    assert run("quantize", plain / "plain.pt2", "--backend", "snpe", *given, monkeypatch=monkeypatch) == 0
    shown = capfd.readouterr().out
    steps = json.loads((out / "qdeploy.json").read_text())["steps"]
    assert [entry["step"] for entry in steps] == ["start", *(choice.step for choice in RECIPES["default"].steps)]
    for entry in steps:
        assert entry["step"] in shown and entry["decision"] in shown and entry["metric"] == "SQNR dB"
    assert not (tmp_path / ".out.work").exists(), "the parts of a finished run are gone"


def test_with_labels_of_the_data_steps_are_judged_by_right_classes(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = ["--data", plain / "images.npy", "--data-labels", plain / "labels.npy", *COMMON, "--out", tmp_path / "out", "--quiet"]
    assert run("quantize", plain / "plain.pt2", "--backend", "snpe", *given, monkeypatch=monkeypatch) == 0
    steps = json.loads((tmp_path / "out/qdeploy.json").read_text())["steps"]
    late = [entry for entry in steps if entry["step"] != "equalize"]
    assert late and all(entry["metric"] == "top1" and entry["before"] > 0.9 for entry in late)


def test_labels_without_data_are_refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert run("quantize", MODEL, "--backend", "snpe", "--data-labels", "x.npy", monkeypatch=monkeypatch) == 2
    assert "--data-labels go with --data" in capfd.readouterr().err


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.steps])
def test_a_recipe_is_shown_with_every_option_of_its_steps(
    name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert run("recipes", name, "--json", monkeypatch=monkeypatch) == 0
    (shown,) = json.loads(capfd.readouterr().out)
    for choice, entry in zip(RECIPES[name].steps, shown["steps"], strict=True):
        assert entry == {"name": choice.step} | step_options(choice.step) | dict(choice.options)
    assert run("recipes", name, monkeypatch=monkeypatch) == 0
    text = capfd.readouterr().out
    assert all(f"{option}={value}" in text for entry in shown["steps"] for option, value in entry.items() if option != "name")


def test_an_unknown_option_of_a_step_is_refused_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.toml").write_text('[[step]]\nname = "qdrop"\niteration = 5\n')
    given = ["--data", CALIBRATION, "--recipe", tmp_path / "mine.toml", "--out", tmp_path / "out"]
    assert run("quantize", MODEL, "--backend", "snpe", *given, monkeypatch=monkeypatch) == 2
    assert "did you mean 'iterations'" in capfd.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_is_resumed_to_the_same_bytes(how: signal.Signals, tmp_path: Path):
    recipe = tmp_path / "short.toml"
    recipe.write_text(SHORT)
    subprocess.run(command(tmp_path / "whole", recipe), check=True, cwd=ROOT, capture_output=True)
    work = tmp_path / ".out.work"
    process = subprocess.Popen(command(tmp_path / "out", recipe), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    start = time.monotonic()
    while not list(work.rglob("*.safetensors")) and time.monotonic() - start < 120:
        time.sleep(0.02)
    process.send_signal(how)
    shown, error = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how), error
    assert how == signal.SIGKILL or "--resume" in shown
    assert not (tmp_path / "out").exists() and list(work.rglob("*.safetensors"))
    subprocess.run(command(tmp_path / "out", recipe, "--resume"), check=True, cwd=ROOT, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") and not work.exists()


def test_the_work_of_another_run_is_refused(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / ".out.work/parts").mkdir(parents=True)
    (tmp_path / ".out.work/parts/run.json").write_text("{}")
    given = ["--data", plain / "images.npy", *COMMON, "--out", tmp_path / "out", "--resume"]
    assert run("quantize", plain / "plain.pt2", "--backend", "snpe", *given, monkeypatch=monkeypatch) == 2
    assert "work of another run" in capfd.readouterr().err


def test_without_data_images_are_distilled(
    plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    given = ["--recipe", "data_free", "--samples", "8", "--runtime", "onnxruntime:none", "--out", tmp_path / "out"]
    assert run("quantize", plain / "plain.pt2", "--backend", "snpe", *given, monkeypatch=monkeypatch) == 0
    shown = capfd.readouterr().out
    assert "8 images distilled from the batch-norm statistics" in " ".join(shown.split())
    assert json.loads((tmp_path / "out/qdeploy.json").read_text())["calibration_samples"] == 8


def test_without_data_and_without_batch_norms_it_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    program = torch.export.export(networks.network("concat"), (torch.zeros(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "concat.pt2")
    given = ["--runtime", "onnxruntime:none", "--out", tmp_path / "out"]
    assert run("quantize", tmp_path / "concat.pt2", "--backend", "snpe", *given, monkeypatch=monkeypatch) == 2
    assert "--data" in capfd.readouterr().err and not (tmp_path / "out").exists()
