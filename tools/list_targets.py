"""Write docs/targets.md from the registry.

    python tools/list_targets.py [--check]

`--check` writes nothing and fails where the file is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qdeploy.core.backend import Backend, Format, OpRule, backends
from qdeploy.core.spec import QuantSpec
from qdeploy.export.artifact import MODEL, SIMULATION

PAGE = Path(__file__).parent.parent / "docs" / "targets.md"
HEAD = """# Targets

Written by `python tools/list_targets.py` from the files in `backends/`; do not edit.

How far each is proven: **vendor's runtime** means that the emitted file runs here on the vendor's own runtime and is compared with the
simulation; all others are run in ONNX Runtime, in standard ONNX with model-local functions where ONNX has no operator. Where the files
come from: **ONNX** is the standard itself, **public documents** are the vendor's or those of a public tool that writes the format, and
**qdeploy's own** is [encodings.json](encodings.md), for targets whose format is not public. How a target is added:
[add_a_target.md](add_a_target.md).

"""
ORIGINS = {"standard": "ONNX", "public": "public documents", "qdeploy": "qdeploy's own"}


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"error: '{PAGE}' is out of date: run python tools/list_targets.py")


def page() -> str:
    """The whole page."""
    lines = ["| target | hardware | weights | activations | bias | status |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| [{b.name}](#{b.name}) | {b.title} | {scheme(b, 'weight')} | {scheme(b, 'activation')} | {bias(b)} | {status(b)} |"
        for b in backends
    ]
    return HEAD + "\n".join(lines) + "\n" + "".join(section(backend) for backend in backends)


def scheme(backend: Backend, what: str) -> str:
    """The scheme of weights or activations with its widths, and what else may be chosen."""
    spec: QuantSpec = backend.weight if what == "weight" else backend.activation
    widths = backend.weight_bits if what == "weight" else backend.activation_bits
    others = [f"{show_widths(widths)} bits"] if widths != (spec.bits,) else []
    others += [other.describe() for other in backend.weight_schemes if what == "weight"]
    others += ["any scheme"] if backend.any_scheme else []
    return spec.describe() + (f" (or {', '.join(others)})" if others else "")


def show_widths(widths: tuple[int, ...]) -> str:
    """A list of widths, or a range without gaps."""
    whole = len(widths) > 2 and widths == tuple(range(widths[0], widths[-1] + 1))
    return f"{widths[0]} to {widths[-1]}" if whole else ", ".join(map(str, widths))


def exception(rule: OpRule) -> str:
    """What a rule says of weights that are not as the others."""
    assert rule.weight is not None
    words = []
    if rule.only is not None:
        words += ["x".join(map(str, rule.only.kernel))] if rule.only.kernel else []
        words += [f"stride {rule.only.stride[0]}"] if rule.only.stride else []
        words += [f"dilation {rule.only.dilation[0]}"] if rule.only.dilation else []
        words += ["grouped" if rule.only.grouped else "one group"] if rule.only.grouped is not None else []
    shape = f" ({', '.join(words)})" if words else ""
    return f"- weights of {', '.join(sorted(rule.ops))}{shape}: {rule.weight.describe()}"


def bias(backend: Backend) -> str:
    """What the biases are."""
    return backend.bias if isinstance(backend.bias, str) else backend.bias.describe()


def status(backend: Backend) -> str:
    """How far the target is proven, and where its files come from."""
    proof = f"runs here on the vendor's runtime ({backend.vendor_runtime})" if backend.vendor_runtime else "simulated in ONNX Runtime"
    origins = [form.origin for form in backend.formats]
    worst = next(origin for origin in ("qdeploy", "public", "standard") if origin in origins)
    return f"{proof}; format: {ORIGINS[worst]}"


def section(backend: Backend) -> str:
    """One target in full."""
    lines = [f"\n## {backend.name}\n", f"{backend.title}.\n"]
    lines += [f"- **weights** {scheme(backend, 'weight')}; **activations** {scheme(backend, 'activation')}; **bias** {bias(backend)}"]
    lines += [exception(rule) for rule in backend.rules if rule.weight is not None]
    lines += [f"- checked with {', '.join(backend.runtimes)}"]
    lines += [f"- format `{form.name}`: {written(form)}" for form in backend.formats]
    lines += [f"  next: `{form.command}`" for form in backend.formats[:1] if form.command]
    lines += [f"- source: {source}" for source in backend.sources]
    return "\n".join(lines) + "\n"


def written(form: Format) -> str:
    """What a format writes."""
    kinds = {"qdq": "QDQ ONNX", "float": "float ONNX", "float16": "half-precision ONNX"}
    files = ", ".join([f"{MODEL} ({kinds[form.model]})", *form.files])
    return f"{files}; {ORIGINS[form.origin]}" + ("" if form.model == "qdq" else f"; the simulation in {SIMULATION}")


if __name__ == "__main__":
    main()
