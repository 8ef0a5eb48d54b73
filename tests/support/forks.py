"""Children that may be killed: a program that has loaded what takes long forks one for every line that it reads."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping


def serve(commands: Mapping[str, Callable[[str], None]]) -> None:
    """Say "ready", then answer every line of stdin: `COMMAND ARGUMENT` by the pid of a child that runs the command, and
    `wait PID` by the child's exit status."""
    print("ready", flush=True)
    for line in sys.stdin:
        command, argument = line.rstrip("\n").split(maxsplit=1)
        if command == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                try:
                    commands[command](argument)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
        print(answer, flush=True)
