"""The format of a checkpoint folder, and whether one is intact; nothing here imports torch.

    step_00000123/   model.safetensors, ema.safetensors, optimizer.safetensors, trainer.json, manifest.json

The manifest holds size and SHA-256 of every other file. Everything is safetensors or JSON; loading can't run code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from trainer.runs.durable import flush

FORMAT = 3

COUNTERS, MANIFEST = "trainer.json", "manifest.json"


class Counters(TypedDict):
    """What a run has counted after `step` optimizer steps; the Trainer defines what each means."""

    step: int
    seconds: float
    best: float | None
    best_step: int | None
    improvements: list[bool]
    num_skipped: int
    unreadable: list[int]
    evaluation_pending: bool
    fingerprint: int
    means: dict[str, float]
    scaler: dict[str, Any] | None
    world_size: int
    threads: int
    data: NotRequired[str]  # identity of the prepared set; older versions didn't record it


_counters = TypeAdapter(Counters)


class InvalidCheckpoint(Exception):
    """A checkpoint folder that isn't intact; the message states what is wrong with it."""


def folder_name(step: int) -> str:
    """`step_00000123`."""
    return f"step_{step:08d}"


def seal(folder: Path, counters: Counters) -> None:
    """Completes a folder that holds the tensors: adds counters and manifest, and flushes everything to disk."""
    (folder / COUNTERS).write_text(json.dumps(counters, indent=1), encoding="utf-8")
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": counters["step"], "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in (*folder.iterdir(), folder):
        flush(file)


def verify(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        InvalidCheckpoint: something is missing, or differs from what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise InvalidCheckpoint(f"{MANIFEST}: format {manifest['format']}, this version reads {FORMAT}")
        files = dict(manifest["files"])
        if not {"model.safetensors", "optimizer.safetensors", COUNTERS} <= files.keys():
            raise InvalidCheckpoint(f"{MANIFEST}: lists too few files")
        for name, expected in files.items():
            file = folder / Path(name).name
            if not file.is_file():
                raise InvalidCheckpoint(f"{name}: missing")
            if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                raise InvalidCheckpoint(f"{name}: corrupted (checksum mismatch)")
        if read_counters(folder)["step"] != manifest["step"]:
            raise InvalidCheckpoint(f"{MANIFEST}: step {manifest['step']} differs from that in {COUNTERS}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpoint(
            f"{MANIFEST} or {COUNTERS} can't be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def read_counters(folder: Path) -> Counters:
    """The counters alone of a checkpoint; raises OSError, and ValueError where the file doesn't hold them."""
    return _counters.validate_python(json.loads((folder / COUNTERS).read_text(encoding="utf-8")))


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
