"""Which target: the backends that a user names, and the schemes chosen for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdeploy.core.backend import Backend, backends
from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec

Target = str | Backend
Targets = str | Sequence[Target]


def find_backend(name: Target) -> Backend:
    """The backend called `name`, or the one that a user's own Python file registers."""
    if isinstance(name, Backend):
        return name
    return backends.load_file(Path(name)) if name.endswith(".py") else backends[name]


def find_backends(names: Targets) -> tuple[Backend, ...]:
    """The backends of a list, or of a text with commas; `OptionError` for one that is named twice."""
    if isinstance(names, str):
        names = [part.strip() for part in names.split(",")]
    found = tuple(find_backend(name) for name in names)
    if not found:
        raise OptionError("no backend is named", action="name one, such as snpe")
    for backend in found:
        if sum(other.name == backend.name for other in found) > 1:
            raise OptionError(f"backend '{backend.name}' is named twice", action="name it once")
    return found


def with_schemes(backend: Backend, weight: str | None, activation: str | None) -> Backend:
    """`backend` with the schemes that the user chose, in the words of `QuantSpec.describe`; `OptionError` where it has none such."""
    chosen: dict[str, Any] = {}
    for what, text in (("weight", weight), ("activation", activation)):
        if text is not None:
            chosen[what] = _scheme(backend, what, text)
    # other grids have one width
    fixed: dict[str, Any] = {f"{what}_bits": (spec.bits,) for what, spec in chosen.items() if not spec.linear}
    if fixed:
        fixed["first_last_bits"] = None
    return replace(backend, **chosen, **fixed)


def _scheme(backend: Backend, what: str, text: str) -> QuantSpec:
    """The scheme that `text` says, of the weights or the activations, if the backend allows it."""
    try:
        spec = QuantSpec.parse(text)
    except ValueError as error:
        raise OptionError(f"{what} scheme '{text}'", found=str(error), action="write it as 'int4 symmetric per-channel'") from error
    if what == "activation" and spec.axis is not None:
        raise OptionError("activation scheme", found="per-channel", allowed="per-tensor", action="choose per-channel for weights only")
    if backend.any_scheme:
        return spec
    default, widths = (backend.weight, backend.weight_bits) if what == "weight" else (backend.activation, backend.activation_bits)
    known = [default, *(backend.weight_schemes if what == "weight" else ())]
    allowed = [replace(one, bits=bits) if one.linear else one for one in known for bits in (widths if one.linear else (one.bits,))]
    if spec not in allowed:
        names = ", ".join(one.describe() for one in allowed)
        free = ", ".join(b.name for b in backends if b.any_scheme)
        action = f"choose one of these, or a backend that leaves the choice: {free}"
        raise OptionError(f"backend '{backend.name}' has no such {what} scheme", found=spec.describe(), allowed=names, action=action)
    return spec
