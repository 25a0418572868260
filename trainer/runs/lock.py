"""Which process holds a run; nothing here imports torch."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from filelock import FileLock, Timeout

from trainer.errors import UserError


def lock_run(folder: Path) -> FileLock:
    """Locks a run for this process; the operating system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file(folder))
    try:
        lock.acquire(timeout=1)  # longer than `is_locked` takes
    except Timeout:
        raise UserError(
            f"{folder} is in use by another process; wait for it, or give this run another name=…"
        ) from None
    return lock


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run. Tries a shared lock: two simultaneous callers must not see each other."""
    try:
        descriptor = os.open(lock_file(folder), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_file(folder: Path) -> Path:
    """The file, beside the folder, that is locked; it stays when the lock is released."""
    return folder.with_name(f".{folder.name}.lock")
