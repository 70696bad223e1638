"""Where an artifact goes: one run at a time holds the place, nothing of the user's is replaced, and what a killed run left is mended.

    out                  the artifact
    .out.work/lock       held by the run that will write it; the system frees it when the process ends, however that happens
    .out.work/new        what is being written; it is renamed to `out` when it is whole
    .out.work/replaced   the artifact that stood at `out`, until the new one does
    .out.work/parts      finished parts of long steps, for --resume

Without a run, `.out.work` is not there, but for the parts of an interrupted one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from qdeploy.core.errors import ArtifactError, InputError
from qdeploy.export import manifest
from qdeploy.export.manifest import MANIFEST, sha256

LOCK, NEW, REPLACED, PARTS = "lock", "new", "replaced", "parts"
_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What systems put into folders that somebody looks at."""


class Place:
    """The folder `out`, held by this process, with a place beside it to work in."""

    def __init__(self, out: Path, work: Path):
        self.out, self._work = out, work

    @property
    def parts(self) -> Path:
        """Where finished parts of long steps are kept."""
        return self._work / PARTS

    def replace(self, text: str) -> None:
        """Write `text` to the file `out`, at once or not at all."""
        new = self._work / NEW
        new.write_text(text, encoding="utf-8")
        new.replace(self.out)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A place to write an artifact to; it becomes `out` at the end of the block, and vanishes if that raises."""
        new, old = self._work / NEW, self._work / REPLACED
        new.mkdir()
        try:
            fresh = new / self.out.name
            yield fresh
            try:
                if self.out.exists():
                    self.out.rename(old)
                    _check_own(self.out, old)  # what came in while we worked
                fresh.rename(self.out)
            except BaseException:
                if old.exists() and not self.out.exists():
                    old.rename(self.out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def drop_parts(self) -> None:
        """Remove the finished parts, now that the artifact is written."""
        shutil.rmtree(self.parts, ignore_errors=True)

    def _mend(self) -> None:
        """Bring back the artifact that a killed run was replacing, and remove what else it left."""
        old = self._work / REPLACED
        if old.exists() and not self.out.exists():
            old.rename(self.out)
        if old.exists():
            _check_own(old, old)
            shutil.rmtree(old)
        if (self._work / NEW).exists():
            shutil.rmtree(self._work / NEW)


def _work(out: Path) -> Path:
    return out.parent / f".{out.name}.work"


@contextmanager
def claim(out: Path) -> Iterator[Place]:
    """Hold `out` for this process while the block runs.

    `InputError` where another run holds it, or where it may not be written; see `check_free`.
    """
    check_free(out)
    with held(out) as place:
        place._mend()
        check_free(out)
        yield place


@contextmanager
def held(out: Path, wait: float = 0) -> Iterator[Place]:
    """A place to work in beside `out`, whatever that is; `InputError` where another process holds it for `wait` seconds.

    Folders that had to be made go again where nothing came into them.
    """
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    work = _work(out)
    try:
        lock = _lock(out, work, wait)
        try:
            strange = sorted({entry.name for entry in work.iterdir()} - {LOCK, NEW, REPLACED, PARTS})
            if strange:
                action = "move it away, or name another folder with --out"
                raise InputError(f"cannot work in '{work}'", found=f"a folder with other files, such as '{strange[0]}'", action=action)
            yield Place(out, work)
        finally:
            with suppress(OSError):
                (work / LOCK).unlink()  # before it is free: whoever opened it meanwhile finds that it has no name any more
            with suppress(OSError):
                work.rmdir()
            lock.release()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _lock(out: Path, work: Path, wait: float) -> BaseFileLock:
    """The lock in `work`, held."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK, timeout=wait, poll_interval=0.01, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            action = "wait until it ends, or name another folder with --out"
            raise InputError(f"cannot write to '{out}'", found="another run that is writing there", action=action) from None
        except FileNotFoundError:  # the run before has just removed the folder
            continue
        return lock


def check_free(out: Path) -> None:
    """`InputError` where `out` is something that qdeploy did not write, or holds something besides: to write replaces the folder."""
    if out.is_symlink() or out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"cannot write to '{out}'", found="a link, or the folder at work", action="name a new folder with --out")
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        kind = "a folder with other files" if out.is_dir() else "a file"
        raise InputError(f"cannot write to '{out}'", found=kind, action="name a new folder with --out")
    _check_own(out, out)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to '{out}'", found=f"'{parent}' is not a writable folder", action="name another folder")


def _check_own(out: Path, folder: Path) -> None:
    """`InputError` where `folder`, which is or was at `out`, is an artifact with other files than its own."""
    foreign = _foreign(folder)
    if foreign:
        found = f"{', '.join(map(repr, foreign[:5]))}{' and more' if len(foreign) > 5 else ''}, which qdeploy did not write so"
        raise InputError(f"cannot write to '{out}'", found=found, action="move them out of the folder, or name a new one with --out")


def _foreign(folder: Path) -> list[str]:
    """What lies in an artifact's folder besides the files of its manifest, as they were written; nothing where there is no manifest."""
    if not (folder / MANIFEST).is_file():
        return []
    try:
        written = manifest.read(folder)["files"]
    except (OSError, ArtifactError):
        written = {}
    kept = []
    for path in sorted(folder.iterdir()):
        same = path.is_file() and not path.is_symlink() and sha256(path.read_bytes()) == written.get(path.name)
        if not same and path.name not in _SYSTEM | {MANIFEST, _work(folder / MANIFEST).name}:
            kept.append(path.name)
    return kept
