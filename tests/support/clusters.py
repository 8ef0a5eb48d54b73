"""Processes of a Ray on this machine, found and killed."""

from __future__ import annotations

import os
import signal

import psutil

from serving import metrics


def replica_of(url: str) -> str:
    """The replica that has most requests now."""
    running = {n: v for n, v in metrics(url).items() if n.startswith("kvgraph_replica_requests")}
    return max(running, key=running.__getitem__).split('"')[1]


def serving_replicas() -> list[psutil.Process]:
    """Processes that are replicas."""
    return [process for process, words in _commands() if "ServeReplica" in words]


def kill_replica(replica: str) -> None:
    """kill -9 of a replica's process, which is the one that writes its log."""
    for process in serving_replicas():
        if any(replica in file.path for file in process.open_files()):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError(f"there is no process of replica {replica}")


def encoding_workers() -> list[int]:
    """Processes that encode."""
    return [process.pid for process, words in _commands() if words.startswith("ray::") and "_Worker" in words]


def _commands() -> list[tuple[psutil.Process, str]]:
    found = psutil.process_iter(["cmdline", "status"])
    alive = (process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE)
    return [(process, "".join(process.info["cmdline"] or ())) for process in alive]
