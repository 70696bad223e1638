"""mypy --strict over the package as it is installed: with `backends/` and `calibration/` inside `qdeploy/`.

mypy does not follow the `__path__` that a checkout extends at run time, so this links the folders into a temporary tree.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run mypy; its exit status is ours."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "qdeploy"
        package.mkdir()
        for source in (*(ROOT / "qdeploy").iterdir(), ROOT / "backends", ROOT / "calibration"):
            if source.name != "__pycache__":
                (package / source.name).symlink_to(source)
        config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
        return subprocess.run([sys.executable, "-m", "mypy", *config, "qdeploy"], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
