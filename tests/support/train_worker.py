"""`kvgraph WORDS` within limits. Run as a program: `train_worker.py MEMORY FILE_SIZE WORDS`, bytes that it may take beyond
what is in use, and that a file may have; 0 is no limit."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import kvgraph.train.trainer  # noqa: F401  # what it takes in memory is in use before the limit is set
from kvgraph.cli import main

if __name__ == "__main__":
    memory, file_size = map(int, sys.argv[1:3])
    if memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    main(sys.argv[3:])
