"""Writes that survive a kill and a power cut; nothing here imports torch."""

from __future__ import annotations

import os
from pathlib import Path


def atomic_write(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8): a reader, or a kill at any moment, sees the old or the new file,
    never a part of one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)  # the rename itself is stored in the folder


def flush(path: Path) -> None:
    """Returns when a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_link(link: Path, target: str) -> None:
    """Points a symbolic link, existing or not, to `target`, in one step."""
    temporary = link.with_name(f".{link.name}-link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
