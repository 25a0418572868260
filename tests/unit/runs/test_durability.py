"""What is reported as saved survives a power cut: files, and the folders that name them,
are on disk before what refers to them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.unit.runs.test_checkpoint import make
from trainer.runs.durable import atomic_write
from trainer.runs.folder import RunFolder
from trainer.runs.store import CheckpointStore
from trainer.runs.writer import Writer


class Event(NamedTuple):
    """A flush of a file or folder, or a rename."""

    kind: str
    inode: int
    size: int = 0
    target: str = ""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Calls of the operating system, in order; files are identified by their inodes, which a rename keeps."""
    found: list[Event] = []
    fsync = os.fsync

    def flushing(file: Any) -> None:
        status = os.fstat(file)
        found.append(Event("flush", status.st_ino, 0 if stat.S_ISDIR(status.st_mode) else status.st_size))
        fsync(file)

    def renaming(function: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, *arguments: Any, **options: Any) -> None:
            found.append(Event("rename", os.lstat(source).st_ino, target=os.fspath(target)))
            function(source, target, *arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", flushing)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    return found


def flushed(events: list[Event], path: Path) -> bool:
    """Whether a file or folder, all of it, is on disk by these events."""
    status = path.stat()
    return any(
        event.kind == "flush" and event.inode == status.st_ino and (path.is_dir() or event.size == status.st_size)
        for event in events
    )


def renamed(events: list[Event], path: Path) -> int:
    """Where in the events something was renamed to `path`."""
    return next(
        number for number, event in enumerate(events) if event.kind == "rename" and event.target == os.fspath(path)
    )


def test_a_checkpoint_is_on_disk_before_it_is_there_and_before_links_point_to_it(
    tmp_path: Path, events: list[Event]
) -> None:
    folder = CheckpointStore(tmp_path).save(make(7), keep=3, best=True)
    before, after = (
        events[: renamed(events, folder)],
        events[renamed(events, folder) : renamed(events, tmp_path / "last")],
    )
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    for path in (*files, folder):
        assert flushed(before, path), f"{path.name} is not on disk when the checkpoint gets its name"
    assert flushed(after, tmp_path), "the checkpoint's name is not on disk when `last` points to it"


def test_metrics_are_on_disk_before_the_checkpoint_that_resumes_after_them(tmp_path: Path, events: list[Event]) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.log({"step": 7, "epoch": 0.5, "split": "train", "loss": 0.25})
    writer = Writer(run, keep=3)
    writer.write(make(7), best=False)
    writer.wait()
    assert flushed(events[: renamed(events, run.checkpoints.folder(7))], run.metrics)


def test_a_file_that_is_replaced_is_on_disk_before_it_has_its_name_and_so_is_the_name_afterwards(
    tmp_path: Path, events: list[Event]
) -> None:
    file = tmp_path / "summary.json"
    for text in ("old", json.dumps({"status": "running"})):
        events.clear()
        atomic_write(file, text)
        at = renamed(events, file)
        assert file.read_text() == text and flushed(events[:at], file) and flushed(events[at:], tmp_path)
