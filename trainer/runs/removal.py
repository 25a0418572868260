"""Removes runs; nothing here imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.errors import UserError
from trainer.runs.lock import is_locked, lock_file, lock_run

REMOVED = "removed"


def check_removable(folder: Path) -> None:
    """Raises UserError where a process holds the run, or where its folder is a link."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {folder.readlink()}: remove that folder, and the link, yourself")
    if is_locked(folder):
        raise UserError(f"{folder} is in use by a process, which trains it; stop that process first")


def remove_run(folder: Path) -> None:
    """Removes a run's folder and its lock file.

    The folder is renamed to a hidden name first: a kill at any moment leaves the whole run, or none and a hidden
    leftover, which the next removal of any run clears away.

    Raises:
        UserError: a process holds the run, or it can't be removed.
    """
    check_removable(folder)
    lock = lock_run(folder)  # no process can start to train it meanwhile
    try:
        folder.rename(folder.with_name(f".{folder.name}.{REMOVED}-{folder.stat().st_ino}"))
        lock_file(folder).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be removed: {error.strerror or error}") from error
    finally:
        lock.release()
    for leftover in folder.parent.glob(f".*.{REMOVED}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
