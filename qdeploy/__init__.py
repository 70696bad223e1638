"""qdeploy: quantize a model for one piece of hardware, and prove that what was simulated is what is deployed.

    artifact = qdeploy.quantize(model, batches, backend="snpe", out="out")

Importing this package imports neither torch nor any backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.core.version import __version__

__all__ = ["__version__", "calibrate", "convert", "prepare", "quantize", "verify"]

# A bare checkout has `backends` and `calibration` beside this package; an installed qdeploy has them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "backends").is_dir() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

if TYPE_CHECKING:
    from qdeploy.api import calibrate, convert, prepare, quantize, verify


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qdeploy' has no attribute {name!r}")
    from qdeploy import api

    return getattr(api, name)
