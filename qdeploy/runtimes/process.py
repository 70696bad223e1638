"""Sessions in a process of their own, for runtimes whose libraries may crash or hang.

A vendor's library that aborts, or never comes back, would take the whole program with it, and the artifact that it was to check. Here
it ends its own process only, which is an ordinary error for whoever waits for the answer. The process is a fresh interpreter, not a
copy of this one: threads that run here do not survive a fork, and the user's script is not run again. Requests and answers go through
a pipe, arrays and all. It starts with the first session, stays for those that follow, and ends with its `Host`, or with this process.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import IO, Any

from qdeploy.core.errors import ArtifactError, QDeployError, one_line
from qdeploy.runtimes.runtime import Array, Runtime, Session

START = """
import sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
sys.path[:] = pipe.recv()
from qdeploy.runtimes.process import serve
serve(pipe)
"""
_GRACE = 2.0
"""Seconds that a process without work has to end by itself."""


class Host:
    """Where the sessions of `runtime` are open: in a process of their own if it is `isolated`, here otherwise.

    A session is valid until the next one is opened, or until `close`.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self._process: _Process | None = None

    def open(self, path: Path, batch: int, variant: str) -> Session:
        """`Runtime.open`. Isolated, this and the session raise `ArtifactError`, whatever happened over there."""
        if not self.runtime.isolated:
            return self.runtime.open(path, batch, variant)
        if self._process is None or self._process.ended:
            self._process = _Process(self.runtime.limit)
        self._process.ask("open", self.runtime.open, path.absolute(), batch, variant)
        return _Remote(self._process)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.end()
            self._process = None


@dataclass(frozen=True, slots=True)
class _Remote:
    """A session that is open over there."""

    process: _Process

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """All outputs for one batch of `inputs`, both in graph order."""
        made: list[Array] = self.process.ask("run", list(inputs))
        return made

    def placement(self) -> Mapping[str, int]:
        """Where the nodes run, as the session says."""
        found: Mapping[str, int] = self.process.ask("placement")
        return found


class _Process:
    """The other process and this end of its pipe. Every answer has to come within `limit` seconds."""

    def __init__(self, limit: float):
        self.limit = limit
        self.ended = False
        self._busy = False
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-P", "-c", START, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                start_new_session=True,  # Ctrl-C comes to us alone, and what it starts itself can be ended with it
            )
        self._finish = weakref.finalize(self, _end, self._process, self._pipe, self._said)
        self._pipe.send(sys.path)

    def ask(self, what: str, *arguments: object) -> Any:
        """The answer to one request. Raises `ArtifactError` for an error over there, a process that ended, or no answer in time."""
        self._busy = True
        try:
            self._pipe.send((what, arguments))
            if not self._pipe.poll(self.limit):
                raise ArtifactError(f"no answer within {self.limit:g} s")
            done, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._crashed() from None
        except BaseException:  # an answer that is never read would be taken for the next one
            self.end()
            raise
        self._busy = False
        if not done:
            raise ArtifactError(answer)
        return answer

    def _crashed(self) -> ArtifactError:
        """Why it ended: by which signal, and its last words."""
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            code = None
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        self.end()
        if code is None:
            what = "closed its pipe"
        elif code < 0:
            what = f"ended by signal {_signal(-code)}"
        else:
            what = f"ended with exit status {code}"
        action = "try a machine with more memory" if code == -signal.SIGKILL else None
        return ArtifactError(f"the process of the runtime {what}", found=lines[-1].strip()[:300] if lines else None, action=action)

    def end(self) -> None:
        """End the process: at once where it still works on an answer."""
        self.ended = True
        if self._busy:
            _kill(self._process)
        self._finish()


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _end(process: subprocess.Popen[bytes], pipe: Connection, said: IO[bytes]) -> None:
    pipe.close()
    said.close()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(pipe: Connection) -> None:
    """Answer requests until the pipe is closed. This is what the other process does; it does not return."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    server = _Server()
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # without the destructors of the library, which may crash
        try:
            what, arguments = pickle.loads(request)  # from the process that started this one
            answer = ForkingPickler.dumps((True, getattr(server, what)(*arguments)))
        except Exception as error:  # a vendor's library may raise anything
            answer = ForkingPickler.dumps((False, str(error) if isinstance(error, QDeployError) else one_line(error)))
        pipe.send_bytes(answer)


class _Server:
    """What can be asked for: one session at a time."""

    def __init__(self) -> None:
        self.session: Session | None = None

    def open(self, opened: Callable[[Path, int, str], Session], path: Path, batch: int, variant: str) -> None:
        self.session = None  # its memory is free before the next one takes its own
        self.session = opened(path, batch, variant)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        assert self.session is not None
        return self.session.run(inputs)

    def placement(self) -> dict[str, int]:
        assert self.session is not None
        return dict(self.session.placement())


def _end_with(parent: int) -> None:
    """End with the process that asks, also where it was killed while the library is at work."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpid(), signal.SIGKILL)
