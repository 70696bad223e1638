"""Run whole model families with random weights through capture, plan, calibration, emission and verification, for four targets.

    python tools/coverage.py --results coverage.json
    python tools/coverage.py --only resnet18,vit_tiny --backends snpe
    python tools/coverage.py --round-trip

Needs the extra `coverage` (timm, torchvision, transformers). Every family runs in a process of its own, with small inputs of random
values. The table says for each target the share of multiply-accumulates that run quantized, how many tensors that it computes in
integers have no encoding (see `completeness`), and whether ONNX Runtime agrees with the simulation; a family that fails says at which
step and why. With `--round-trip` every family goes through ONNX and back instead, float: exported by torch.onnx.export, run in ONNX
Runtime and imported by qdeploy. `--results` keeps what is measured, so that a later run goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_pipeline import machine, replace_block, table
from completeness import missing
from families import FAMILIES, Family
from roundtrip import CLOSE, round_trip
from torch import Tensor

BACKENDS = ("snpe", "tensorrt", "openvino", "vitis")
SHARE = {"vision": 0.95, "transformer": 0.90}
"""Of multiply-accumulates that should run quantized."""
LIMIT = 900
"""Seconds that one family may take."""


@dataclass
class Step:
    """Where the run of a family is, for the report of a failure."""

    name: str = "build"


def main() -> None:
    """Run the chosen families and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of families, with commas between")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--until", choices=("capture", "plan", "calibrate", "verify"), default="verify")
    parser.add_argument("--round-trip", action="store_true", help="through ONNX and back, instead of through quantization")
    parser.add_argument("--results", type=Path, help="a JSON file of families already measured, to which new ones are added")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        steps = there_and_back if args.round_trip else partial(run, backends=args.backends.split(","), until=args.until)
        print(json.dumps(measured(FAMILIES[args.child], steps)))
        return
    known: dict[str, Any] = json.loads(args.results.read_text()) if args.results is not None and args.results.is_file() else {}
    names = args.only.split(",") if args.only else list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            parser.error(f"no family '{name}'; there are {', '.join(FAMILIES)}")
        if name in known:
            continue
        options = ["--round-trip"] if args.round_trip else ["--backends", args.backends, "--until", args.until]
        known[name] = in_child(name, options)
        print(f"{name}: {brief(known[name])}", file=sys.stderr, flush=True)
        if args.results is not None:
            args.results.write_text(json.dumps(known, indent=1))
    chosen = {name: known[name] for name in names}
    made = round_trips(chosen) if args.round_trip else report(chosen, args.backends.split(","))
    text = f"{made}\n\n{machine()}"
    print(text)
    if args.write:
        replace_block(args.write, "coverage round trip" if args.round_trip else "coverage", text)


def in_child(name: str, options: list[str]) -> dict[str, Any]:
    """What one family gives, in a process of its own."""
    command = [sys.executable, __file__, "--child", name, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    except subprocess.TimeoutExpired:
        return {"step": "any", "error": f"took more than {LIMIT} s"}
    if done.returncode:
        return {"step": "any", "error": f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(family: Family, steps: Callable[[Family, Step, dict[str, Any]], None]) -> dict[str, Any]:
    """Run one family; what came of it, or the step and the error."""
    warnings.simplefilter("ignore")
    start, step = time.monotonic(), Step()
    result: dict[str, Any] = {"kind": family.kind}
    try:
        steps(family, step, result)
    except Exception as error:  # whatever a family does to us is what this tool is for
        first = (str(error).strip().splitlines() or [""])[0]
        result |= {"step": step.name, "error": f"{type(error).__name__}: {first}"[:600]}
        if os.environ.get("COVERAGE_TRACE"):
            raise
    return result | {"seconds": round(time.monotonic() - start, 1)}


def there_and_back(family: Family, step: Step, result: dict[str, Any]) -> None:
    """One family through ONNX and back."""
    torch.manual_seed(0)
    model, batch = family.make().eval(), family.inputs(2, 0)
    settle_statistics(model, family.inputs(16, 0))

    def at(name: str) -> None:
        step.name = name

    result |= round_trip(model, batch, at)
    if result["difference"] > CLOSE:
        raise AssertionError(f"the imported model differs from ONNX Runtime by {result['difference']:.1e} of the largest value")


def run(family: Family, step: Step, result: dict[str, Any], backends: list[str], until: str) -> None:
    """All steps of one family, with what they give in `result`."""
    from qdeploy import api

    torch.manual_seed(0)
    model = family.make().eval()
    batches = [family.inputs(2, number) for number in range(2)]
    settle_statistics(model, family.inputs(16, 0))
    wanted = model(*batches[0])
    step.name = "capture"
    several = api.prepare_all(model, batches[0], backends, recipe=family.recipe)
    captured = several[0].captured.module
    got = captured(*batches[0])
    result["ops"] = sum(node.op == "call_function" for node in captured.graph.nodes)
    for one, other in zip(leaves(wanted), leaves(got), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))
    step.name = "plan"
    result["share"] = {one.backend.name: one.plan.share for one in several}
    if until in ("capture", "plan"):
        return
    step.name = "calibrate"
    api.calibrate_all(several, batches)
    if until == "calibrate":
        return
    result["verify"], result["sqnr"], result["missing"] = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for one in several:
            name = one.backend.name
            step.name = f"emit for {name}"
            artifact = api.convert(one, Path(folder) / name)
            result["missing"][name] = missing(artifact.path)
            step.name = f"verify for {name}"
            report = api.verify(artifact, runtime="onnxruntime", simulation=one)
            result["verify"][name] = report.passed
            if report.faults:
                result.setdefault("faults", {})[name] = [str(fault) for fault in report.faults][:3]
            if not report.passed:
                result.setdefault("nudged", {})[name] = nudged(one.module, batches)
            result["sqnr"][name] = [round(float(row.sqnr), 1) for row in report.results if row.sqnr is not None]


def nudged(simulation: torch.nn.Module, batches: list[tuple[Tensor, ...]]) -> float:
    """The SQNR in dB of a simulation to itself with every weight nudged by half a unit in float32's last place.

    No runtime that computes any part in float can be expected to come nearer than this.
    """
    other = copy.deepcopy(simulation)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.data.mul_(1 + signs * 2.0**-24)
    with torch.no_grad():
        pairs = [pair for batch in batches for pair in zip(leaves(simulation(*batch)), leaves(other(*batch)), strict=True)]
    signal, noise = (sum(float(t.square().sum()) for t in some) for some in ([a for a, _ in pairs], [a - b for a, b in pairs]))
    return round(10 * math.log10(signal / noise), 1) if noise else math.inf


def settle_statistics(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> None:
    """Give batch norms statistics of their inputs, one after the other: with those of an untrained network values die out or explode.

    Half of the mean stays, and the second moment around that half is made 1. Random layers that take the whole mean away blow up every
    difference between samples by a factor a layer (Yang et al. 2019), until one code more or less decides the output of a deep network;
    trained ones do not. Parameters of zeros, as the last of a residual branch often are, get values.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval()

    def settle(norm: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        values = given[0].transpose(0, 1).flatten(1)
        mean = values.mean(1)
        norm.running_mean.copy_(mean / 2)
        norm.running_var.copy_((values - mean[:, None] / 2).square().mean(1))

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    with torch.no_grad():
        model(*batch)
    for hook in hooks:
        hook.remove()


def leaves(made: object) -> list[Tensor]:
    """The tensors of a nested output."""
    return [t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, Tensor)]


def brief(result: dict[str, Any]) -> str:
    """One line on one family."""
    if "error" in result:
        return f"FAILED at {result['step']}: {result['error']}"
    if "difference" in result:
        return f"ONNX round trip {result['difference']:.1e}, batch {result['batch']}, {result['seconds']} s"
    shares = " ".join(f"{name} {100 * share:.1f}%" for name, share in result["share"].items())
    gaps = {name: found[:3] for name, found in result.get("missing", {}).items() if found}
    shares += f", missing {gaps}" if gaps else ""
    return f"{result['ops']} ops, {shares}, verify {result.get('verify')}, sqnr {result.get('sqnr')}, {result['seconds']} s"


def passes(result: dict[str, Any], backend: str) -> bool:
    """Whether a family is deployed as it is simulated, with its compute ops quantized and every encoding that the target needs."""
    complete = "error" not in result and result["verify"][backend] and not result["missing"][backend]
    return complete and result["share"][backend] >= SHARE[result["kind"]]


def report(known: dict[str, Any], backends: list[str]) -> str:
    """The table."""
    rows = [["family", "ops", *backends, "seconds", "what failed"]]
    counts = dict.fromkeys(SHARE, 0)
    totals = dict.fromkeys(SHARE, 0)
    for name, result in known.items():
        kind = FAMILIES[name].kind
        totals[kind] += 1
        counts[kind] += "error" not in result and all(passes(result, backend) for backend in backends if "verify" in result)
        cells = [cell(result, backend) for backend in backends]
        rows.append([name, str(result.get("ops", "")), *cells, str(result.get("seconds", "")), why(result)])
    lines = [f"{counts[kind]} of {totals[kind]} {kind} families pass all of {', '.join(backends)}." for kind in SHARE if totals[kind]]
    return "\n".join([*lines, "", table(rows)])


def round_trips(known: dict[str, Any]) -> str:
    """The table of what went through ONNX and back."""
    rows = [["family", "ONNX round trip", "torch to ONNX Runtime", "batch", "seconds", "what failed"]]
    for name, result in known.items():
        differences = [f"{result[key]:.1e}" if key in result else "" for key in ("difference", "rounding")]
        rows.append([name, *differences, str(result.get("batch", "")), str(result.get("seconds", "")), why(result)])
    good = sum("error" not in result for result in known.values())
    return f"{good} of {len(known)} families come back from ONNX.\n\n{table(rows)}"


def why(result: dict[str, Any]) -> str:
    """Where a family failed, and of what."""
    return f"{result['step']}: {result['error']}".replace("|", "/") if "error" in result else ""


def cell(result: dict[str, Any], backend: str) -> str:
    """Share of quantized multiply-accumulates, and whether the runtime agrees."""
    if "share" not in result:
        return "-"
    share = f"{100 * result['share'][backend]:.1f}%"
    if "verify" not in result or backend not in result["verify"]:
        return share
    gaps, decibels = len(result["missing"][backend]), result["sqnr"][backend]
    # the first is what quantization leaves of the float model, the last how near the runtime comes to the simulation, and nudged how
    # near the simulation comes to itself, see `nudged`
    itself = result.get("nudged", {}).get(backend)
    failed = f", verify failed: runtime {decibels[-1]} dB, quantization {decibels[0]} dB, nudged {itself} dB"
    return share + (f", {gaps} missing" if gaps else "") + ("" if result["verify"][backend] else failed)


if __name__ == "__main__":
    main()
