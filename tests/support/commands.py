"""Commands in processes that start at once: a program imports what takes seconds, and forks a child for each command.
With KVGRAPH_SOAK=1 each is started as a user would start it.

A child ends as any process does: with its own exit code, by a signal, and after whatever runs at Python's exit.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from soak import SOAK


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


_program: subprocess.Popen[str] | None = None
_asking = threading.Lock()


def _ask(line: str) -> str:
    global _program
    with _asking:
        if _program is None:
            path = os.pathsep.join(sys.path)
            _program = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        assert _program.stdin is not None and _program.stdout is not None
        _program.stdin.write(line + "\n")
        _program.stdin.flush()
        return _program.stdout.readline()


def end() -> None:
    """End the program, if it was started."""
    if _program is not None:
        _program.communicate()


def _next_job() -> dict[str, Any] | None:
    """In a child: its command. In the program: None, when nobody asks any more."""
    for line in sys.stdin:
        job = json.loads(line)
        if "poll" in job:
            pid, status = os.waitpid(job["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return job
        print(json.dumps(answer), flush=True)
    return None


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
    job = _next_job()
    if job is not None:
        _become(job)
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
