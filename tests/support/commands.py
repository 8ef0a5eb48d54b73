"""Commands in processes that start at once: a program imports what takes seconds, and forks a child for each command.
With KVGRAPH_SOAK=1 each is started as a user would start it. All processes of a test run share the program.

A child ends as any process does: with its own exit code, by a signal, and after whatever runs at Python's exit.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from soak import SOAK

PLACE = "KVGRAPH_TEST_COMMANDS"  # the variable with the program's socket
STARTING = 60.0  # seconds that its imports may take


class Command:
    """`kvgraph WORDS`, or `python -m MODULE WORDS`, in a process of its own. What it prints goes into two files.
    fresh: whether it isn't forked."""

    def __init__(self, *words: object, module: str = "kvgraph.cli", fresh: bool = SOAK, **environment: str):
        folder = Path(tempfile.mkdtemp(prefix="command-", dir=os.environ["XDG_CACHE_HOME"]))
        self._out, self._err = folder / "out", folder / "err"
        self._out.touch()
        self._err.touch()
        self.returncode: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), **environment}
        if fresh:
            with self._out.open("wb") as out, self._err.open("wb") as err:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, words)], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    env={**os.environ, **environment},
                    # Who runs the tests in the background may have made them ignore Ctrl-C, which would be inherited.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )  # fmt: skip
            self.pid = self._process.pid
            return
        job = {
            "module": module,
            "words": [str(word) for word in words],
            "stdout": str(self._out),
            "stderr": str(self._err),
            "environment": {**os.environ, **environment},
            "folder": os.getcwd(),
        }
        self.pid = int(_ask(json.dumps(job)))

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        if self._process is not None:
            self.returncode = self._process.poll()
        elif self.returncode is None:
            self.returncode = json.loads(_ask(json.dumps({"poll": self.pid})))
        return self.returncode

    def wait(self, seconds: float = 60) -> int:
        until = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < until, f"the command doesn't end: {self.stderr}"
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def share() -> None:
    """Let this process, and those that it starts, ask one program, until this process ends it."""
    os.environ.setdefault(PLACE, os.path.join(os.environ["XDG_CACHE_HOME"], f"commands-{os.getpid()}"))


def end() -> None:
    """End the program, if it was started and this process is the one that shares it."""
    place = os.environ[PLACE]
    if _owner(place) == os.getpid() and os.path.exists(place):
        _ask("end")


def _owner(place: str) -> int:
    return int(place.rpartition("-")[2])


def _ask(line: str) -> str:
    with _connected(os.environ[PLACE]) as connection, connection.makefile("rw") as stream:
        stream.write(line + "\n")
        stream.flush()
        return stream.readline()


@contextmanager
def _connected(place: str) -> Iterator[socket.socket]:
    """A connection to the program, which is started if there is none."""
    if not os.path.exists(place):
        with FileLock(f"{place}.lock"):
            if not os.path.exists(place):
                _start(place)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        yield connection


def _start(place: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    nothing = subprocess.DEVNULL
    program = subprocess.Popen([sys.executable, __file__, place], stdin=nothing, stdout=nothing, env=environment)
    until = time.monotonic() + STARTING
    while not os.path.exists(place):
        assert program.poll() is None and time.monotonic() < until, "the program that runs commands doesn't start"
        time.sleep(0.01)


def _next_job(listener: socket.socket, owner: int) -> dict[str, Any] | None:
    """Fork a child for each command. In the child, this returns the command. In the program, it returns None: at the end of the
    test run, or when the process that owns the run is gone.
    """
    while psutil.pid_exists(owner):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection, connection.makefile("rw") as stream:
            line = stream.readline()
            if line == "end\n":
                return None
            job = json.loads(line)
            if "poll" in job:
                pid, status = os.waitpid(job["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            elif (answer := os.fork()) == 0:
                listener.close()
                return job
            stream.write(json.dumps(answer) + "\n")
    return None


def _listening(place: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}.new")
    listener.listen()
    listener.settimeout(5.0)
    os.rename(f"{place}.new", place)  # only now does anybody find it
    return listener


def _become(job: dict[str, Any]) -> None:
    """Give a child what it would have as a process that was started by itself."""
    for number, (name, mode) in enumerate((("/dev/null", os.O_RDONLY), (job["stdout"], os.O_WRONLY | os.O_CREAT),
                                           (job["stderr"], os.O_WRONLY | os.O_CREAT))):  # fmt: skip
        file = os.open(name, mode)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:0] = [folder for folder in job["environment"]["PYTHONPATH"].split(os.pathsep) if folder not in sys.path]
    sys.argv = ["kvgraph", *job["words"]]


if __name__ == "__main__":
    import kvgraph.cli

    kvgraph.cli._keep_libraries_quiet()  # transformers looks at it once, when it is imported
    for name in ("uvicorn", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
                 "transformers.tokenization_utils_tokenizers", "kvgraph.engine.engine", "kvgraph.server.app",
                 "kvgraph.train.trainer", "kvgraph.eval.run"):  # fmt: skip
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = _next_job(_listening(sys.argv[1]), _owner(sys.argv[1]))
    if job is not None:
        _become(job)
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
