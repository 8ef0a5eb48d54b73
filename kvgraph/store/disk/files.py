"""Files that others see whole or not at all, even after a crash: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp-"


class StagedFile:
    """A file under a temporary name, locked, so that `remove_if_abandoned` can tell that its writer is alive."""

    def __init__(self, path: Path, temporary: Path, file: BinaryIO):
        self.path, self.temporary, self.file = path, temporary, file

    def commit(self) -> os.stat_result:
        """Rename it to its own name, so that others see all of it, even after a crash. Raises OSError."""
        with self.file:
            try:
                os.fsync(self.file.fileno())
                self.temporary.rename(self.path)
            except BaseException:
                self.temporary.unlink(missing_ok=True)
                raise
            info = os.fstat(self.file.fileno())
        sync_folder(self.path.parent)
        return info

    def discard(self) -> None:
        """Remove it."""
        with self.file:
            self.temporary.unlink(missing_ok=True)


def stage(path: Path, buffers: Sequence[bytes | memoryview]) -> StagedFile:
    """Write what is to become a file; `commit` shows it. Raises OSError."""
    if not path.parent.is_dir():
        path.parent.mkdir(exist_ok=True)
        sync_folder(path.parent.parent)
    while True:
        temporary = path.parent / f"{TEMPORARY}{os.urandom(8).hex()}"
        file = open(temporary, "xb")  # `commit` closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink == 0:  # taken for abandoned between its creation and its lock
                file.close()
                continue
            file.writelines(buffers)
            file.flush()
        except BaseException:
            temporary.unlink(missing_ok=True)
            with suppress(OSError):
                file.close()
            raise
        return StagedFile(path, temporary, file)


def write_atomically(path: Path, buffers: Sequence[bytes | memoryview]) -> os.stat_result:
    """Write a file so that others see all of it under its name or nothing, even after a crash. Raises OSError."""
    return stage(path, buffers).commit()


def remove_if_abandoned(path: Path, only_look: bool = False) -> bool:
    """Remove a temporary file whose writer is dead; whether it was."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not only_look:
                path.unlink()
    except OSError:  # locked by its writer, or gone
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make the folder's own entries durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
