"""Metrics that a user may judge outputs by: against slow formulas, and from the steps of a recipe to the table of a verification."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qdeploy
from qdeploy.cli.main import main
from qdeploy.core.errors import InputError, OptionError
from qdeploy.numerics.metrics import METRICS, find_metric
from qdeploy.runtimes.runtime import Runtime

Outputs = dict[str, np.ndarray]
PAIRS = hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-100, 100, width=32).map(lambda v: round(v, 3)))


@pytest.fixture(autouse=True)
def _onnxruntime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "installed", lambda self: self.name == "onnxruntime")


@given(PAIRS)
def test_metrics_are_those_of_their_formulas_sample_by_sample(both: np.ndarray) -> None:
    made, wanted = both.astype(np.float64)
    names = ["y"]
    found = {name: metric.scores(names, [both[0]], [both[1]], None) for name, metric in METRICS.items()}
    for row in range(3):
        a, b = made[row], wanted[row]
        assert found["top1"][row] == float(np.argmax(a) == np.argmax(b))
        lengths = float(np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()))
        assert found["cosine"][row] == pytest.approx((a @ b) / lengths if lengths else float((a == b).all()), abs=1e-9)
        union = sum(max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))
        both_have = sum(min(abs(x), abs(y)) for x, y in zip(a, b, strict=True))
        assert found["iou"][row] == pytest.approx(both_have / union if union else 1.0, abs=1e-9)
        if b.any():
            assert found["relative_error"][row] == pytest.approx(-np.sqrt(((a - b) ** 2).sum() / (b**2).sum()), rel=1e-6)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)))
def test_nothing_is_better_than_the_same(outputs: np.ndarray) -> None:
    for metric in METRICS.values():
        same, other = (metric.scores(["y"], [made], [outputs], None) for made in (outputs, outputs + 1))
        assert (same + 1e-9 >= other).all(), metric.name


def test_labels_say_which_class_is_right() -> None:
    scores = METRICS["top1"].scores(["y"], [np.eye(3)], [np.eye(3)[::-1]], np.array([0, 1, 0]))
    assert scores.tolist() == [1, 1, 0]


def fewest_positive(made: Outputs, wanted: Outputs, labels: object) -> float:
    """Against all reason, a metric that is best where no output is above 0."""
    return -float(sum((array > 0).mean() for array in made.values()))


def test_a_metric_of_ones_own_judges_steps_and_rows(tmp_path: Path) -> None:
    artifact = qdeploy.quantize(
        networks.network("plain"), networks.batches("plain"), "snpe", tmp_path / "out", recipe="default", metric=fewest_positive
    )
    assert {entry["metric"] for entry in artifact.manifest["steps"]} == {"fewest_positive"}
    verified = artifact.manifest["verify"]
    assert verified["metric"] == "fewest_positive"
    arrays = artifact.reference()
    values = {row["name"]: row["metric"] for row in verified["results"]}
    for kind in ("float", "simulated"):
        assert values[kind] == pytest.approx(fewest_positive({n: arrays[f"{kind}.{n}"] for n in artifact.outputs}, {}, None))
    assert all(row["agreement"] is None for row in verified["results"]), "outputs that are no classes have no top-1"


def test_a_builtin_metric_stands_beside_the_others_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    qdeploy.quantize(networks.network("plain"), networks.batches("plain"), "onnxruntime", tmp_path / "out", recipe="fast")
    monkeypatch.setattr(sys, "argv", ["qdeploy", "verify", str(tmp_path / "out"), "--metric", "cosine", "--json"])
    with pytest.raises(SystemExit):
        main()
    shown = json.loads(capsys.readouterr().out)
    assert shown["metric"] == "cosine"
    rows = {row["name"]: row["metric"] for row in shown["results"]}
    assert rows["float"] == 1 and 0.99 < rows["simulated"] < 1 and rows["onnxruntime:none"] == pytest.approx(rows["simulated"])


def test_a_metric_is_found_in_the_folder_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metric.py").write_text("def score(outputs, wanted, labels):\n    return len(outputs)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    metric = find_metric("my_metric:score")
    assert metric is not None and metric.scores(["a", "b"], [np.zeros(2)] * 2, [np.zeros(2)] * 2, None).tolist() == [2.0]


@pytest.mark.parametrize("name", ["map", "no_such_module:f", "math:no_such_function", "math:pi"])
def test_a_metric_that_there_is_not_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="metric"):
        find_metric(name)


@pytest.mark.parametrize("returned", [None, "much", float("nan")])
def test_a_metric_that_returns_no_number_is_refused(returned: object) -> None:
    metric = find_metric(lambda made, wanted, labels: returned)
    assert metric is not None
    with pytest.raises(InputError, match="metric"):
        metric.scores(["y"], [np.zeros((1, 2))], [np.zeros((1, 2))], None)


def test_a_metric_that_no_samples_tell_apart_leaves_the_word_to_the_noise() -> None:
    data = networks.batches("plain")
    labels = networks.network("plain")(torch.cat([x for (x,) in data])).argmax(1)
    made = qdeploy.calibrate(networks.fresh("plain", "snpe", recipe="default"), data, labels=labels)
    assert {entry["metric"] for entry in made.log} == {"top1"}
