"""Training that may be killed, limited, or spread over processes. Run as a program, it imports everything once and forks a
child for every line it reads: JSON with `words` (what comes after `kvgraph`), `stderr` (a file), `env`, and `memory` and
`file_size` in bytes, beyond what is in use. It answers with the child's pid. `wait PID` answers the child's exit status.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

import kvgraph.train.trainer  # noqa: F401
from kvgraph.cli import main


def child(job: dict[str, Any]) -> None:
    stderr = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(stderr, number)
    os.environ.update(job.get("env", {}))
    if memory := job.get("memory"):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    if size := job.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    main(job["words"])


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        if line.startswith("wait "):
            answer = os.waitstatus_to_exitcode(os.waitpid(int(line.split()[1]), 0)[1])
        elif (answer := os.fork()) == 0:
            try:
                child(json.loads(line))
            except SystemExit as exit_:
                sys.stdout.flush()
                os._exit(int(exit_.code or 0))
            finally:
                os._exit(70)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
