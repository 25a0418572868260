"""Checkpoints: a whole, verified folder or none.

    checkpoints/step_00000123/   model.safetensors, ema.safetensors, optimizer.safetensors, trainer.json, manifest.json
    checkpoints/last             link to the newest
    checkpoints/best             link to hard links of the best, which outlive its own folder
    checkpoints/.invalid-step_…  one that wasn't intact when the run resumed from an older one

A folder is written under another name, with a manifest of SHA-256 sums, flushed to disk, and renamed:
a kill at any moment leaves the previous checkpoints and at most a leftover that nothing reads. A thread does this,
from a copy of the state: training waits for the copy only.
Everything is safetensors or JSON; loading can't run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from trainer.errors import TrainingFailed, UserError

FORMAT = 3

MANIFEST = "manifest.json"

WRITING, REPLACED, REMOVED, INVALID = ".writing-", ".replaced-", ".removed-", ".invalid-"


def folder_name(step: int) -> str:
    """`step_00000123`."""
    return f"step_{step:08d}"


class Counters(TypedDict):
    """What a run has counted after `step` optimizer steps; the Trainer says what each means."""

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


@dataclass
class Checkpoint:
    """The state of a run after `counters["step"]` steps, on the CPU.

    Attributes:
        model: raw weights and buffers.
        ema: averaged ones, where the run has them.
        optimizer: `<parameter name>/<state name>` -> tensor.
        counters: everything else, JSON.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    counters: Counters
    ema: dict[str, Tensor] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.counters["step"]


_counters = TypeAdapter(Counters)


class InvalidCheckpoint(Exception):
    """A checkpoint folder that isn't intact; the message says what is wrong with it."""


def save(root: Path, checkpoint: Checkpoint, keep: int, best: bool) -> Path:
    """Writes a checkpoint, points `last` (and `best`) to it and removes all but the newest `keep`.

    Raises:
        OSError: it couldn't be written; older checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    recover(root)
    final = root / folder_name(checkpoint.step)
    temporary, replaced = root / f"{WRITING}{final.name}", root / f"{REPLACED}{final.name}"
    temporary.mkdir()
    try:
        tensors = {"model": checkpoint.model, "optimizer": checkpoint.optimizer} | (
            {"ema": checkpoint.ema} if checkpoint.ema is not None else {}
        )
        for name, values in tensors.items():
            save_file(
                {key: value.contiguous() for key, value in values.items()},
                temporary / f"{name}.safetensors",
                metadata={"format": "pt"},
            )
        (temporary / "trainer.json").write_text(json.dumps(checkpoint.counters, indent=1), encoding="utf-8")
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "step": checkpoint.step, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        if final.exists():  # of the same step: an invalid one, or one that was saved before this step's evaluation
            final.rename(replaced)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(root)
    _point(root / "last", final.name)
    if best:
        _keep_best(root, final)
    shutil.rmtree(replaced, ignore_errors=True)
    older = [step for step in steps(root) if step < checkpoint.step]
    for old in older[: max(0, len(older) - (keep - 1))]:
        _remove(root, root / folder_name(old))
    for invalid in root.glob(f"{INVALID}*"):
        if int(invalid.name.rpartition("_")[2]) <= checkpoint.step:  # the training has come past it again
            shutil.rmtree(invalid, ignore_errors=True)
    return final


def recover(root: Path) -> None:
    """Removes what a killed save left behind; puts a checkpoint back that was about to be
    replaced by one of the same step.
    """
    for leftover in (*root.glob(f"{WRITING}*"), *root.glob(f"{REMOVED}*")):
        shutil.rmtree(leftover, ignore_errors=True)  # a reader on a network file system may hold files of it
    for replaced in root.glob(f"{REPLACED}*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)


class Writer:
    """Writes checkpoints in a thread, one after the other.

    Args:
        root: the folder of the checkpoints.
        keep: how many of the newest stay.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, checkpoint: Checkpoint, best: bool) -> None:
        """Begins to write; waits for the one before. Raises what went wrong with it."""
        self.wait()
        # No daemon: a normal exit waits for it.
        self._thread = threading.Thread(target=self._write, args=(checkpoint, best), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises what went wrong with the last one, if that is known already."""
        if (thread := self._thread) and not thread.is_alive():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the last one is written, or for so long; raises what went wrong.

        Raises:
            TrainingFailed: it can't be written, e.g. the disk is full; older checkpoints are whole.
        """
        if thread := self._thread:
            thread.join(seconds)
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint, best: bool) -> None:
        try:
            if (metrics := self.root.with_name("metrics.jsonl")).exists():
                _flush(metrics)  # a checkpoint's lines are on disk before it is
            save(self.root, checkpoint, self.keep, best)
        except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
            reason = getattr(error, "strerror", None) or error
            free = shutil.disk_usage(self.root).free / 2**20
            self._error = TrainingFailed(
                f"the checkpoint of step {checkpoint.step} can't be written to {self.root}: {reason} ({free:.0f} MiB "
                "free); "
                "older checkpoints are whole: make room, then the same command goes on from the newest"
            )
            self._error.on_one_rank = True
        except BaseException as error:
            self._error = error


def restore_best(root: Path, step: int | None) -> None:
    """Points `best` to the checkpoint that the state says is the best,
    if a kill came between saving it and pointing.
    """
    link = root / "best"
    if (
        step is not None
        and (root / folder_name(step)).is_dir()
        and (not link.exists() or link.resolve().name != folder_name(step))
    ):
        _keep_best(root, root / folder_name(step))


def adopt(root: Path, checkpoint: Path, best: Path | None) -> Path:
    """Makes a checkpoint of another folder, and the best one, those of a new `root`, by hard links where that is
    possible.

    Returns:
        Where the checkpoint is now.
    """
    final = root / folder_name(read_counters(checkpoint)["step"])
    _link_files(checkpoint, final)
    _point(root / "last", final.name)
    if best:
        _keep_best(root, best)
    for path in (final, root):
        _flush(path)
    return final


def find_best(root: Path, step: int) -> Path | None:
    """The folder of an intact checkpoint of that step, which was the best at its time;
    None where there is none any more.
    """
    for folder in (root / ".best" / folder_name(step), root / folder_name(step)):
        with suppress(InvalidCheckpoint):
            verify(folder)
            return folder
    return None


def set_newer_aside(root: Path, step: int) -> list[Path]:
    """Moves all checkpoints after `step`, which aren't intact, to names that are never read as checkpoints, and points
    `last` to `step`.

    A file system that fails for a moment brings them back later. The run has gone on from `step` by then, so they
    belong to another history, though they look newer.

    Returns:
        Where they are now, newest first.
    """
    moved = []
    for newer in reversed([each for each in steps(root) if each > step]):
        target = root / f"{INVALID}{folder_name(newer)}"
        shutil.rmtree(target, ignore_errors=True)
        moved.append((root / folder_name(newer)).rename(target))
    _point(root / "last", folder_name(step))
    return moved


def _keep_best(root: Path, checkpoint: Path) -> None:
    """Hard-links a checkpoint's files to where pruning doesn't reach, then moves the `best` link over at once."""
    store, temporary = root / ".best" / checkpoint.name, root / f"{WRITING}best"
    _link_files(checkpoint, temporary)
    store.parent.mkdir(exist_ok=True)
    if store.exists():
        _remove(root, store)
    temporary.rename(store)
    _point(root / "best", f".best/{checkpoint.name}")
    for old in store.parent.iterdir():
        if old != store:
            _remove(root, old)


def _remove(root: Path, checkpoint: Path) -> None:
    """Removes a checkpoint under another name, so that a kill on the way leaves none with half of its files."""
    removed = root / f"{REMOVED}{checkpoint.parent.name}-{checkpoint.name}"
    shutil.rmtree(removed, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(removed), ignore_errors=True)


def _link_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # a file system without hard links, or another one
            shutil.copy2(file, target / file.name)


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}-link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def steps(root: Path) -> list[int]:
    """Steps of all checkpoints in the folder, oldest first, valid or not."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for path in root.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name)))


def verify(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        InvalidCheckpoint: something is missing, or not as it was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise InvalidCheckpoint(f"{MANIFEST}: format {manifest['format']}, this version reads {FORMAT}")
        files = dict(manifest["files"])
        if not {"model.safetensors", "optimizer.safetensors", "trainer.json"} <= files.keys():
            raise InvalidCheckpoint(f"{MANIFEST}: names too few files")
        for name, expected in files.items():
            file = folder / Path(name).name
            if not file.is_file():
                raise InvalidCheckpoint(f"{name}: missing")
            if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
                raise InvalidCheckpoint(f"{name}: not as it was written (checksum)")
        if read_counters(folder)["step"] != manifest["step"]:
            raise InvalidCheckpoint(f"{MANIFEST}: names step {manifest['step']}, trainer.json another")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpoint(
            f"{MANIFEST} or trainer.json can't be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def newest_valid(root: Path) -> tuple[int | None, list[str]]:
    """Step of the newest intact checkpoint (None: there is none), and what is wrong with each newer one,
    newest first.
    """
    complaints = []
    for step in reversed(steps(root)):
        try:
            verify(root / folder_name(step))
        except InvalidCheckpoint as error:
            complaints.append(f"{folder_name(step)} is not intact: {error}")
        else:
            return step, complaints
    return None, complaints


def read_counters(folder: Path) -> Counters:
    """The counters alone of a checkpoint; raises OSError, and ValueError where the file doesn't hold them."""
    return _counters.validate_python(json.loads((folder / "trainer.json").read_text(encoding="utf-8")))


def load(folder: Path) -> Checkpoint:
    """Reads a verified checkpoint.

    Raises:
        UserError: it can't be read.
    """
    try:
        ema = folder / "ema.safetensors"
        return Checkpoint(
            model=load_file(folder / "model.safetensors"),
            optimizer=load_file(folder / "optimizer.safetensors"),
            counters=read_counters(folder),
            ema=load_file(ema) if ema.exists() else None,
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder}: can't be read: {error}") from error


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of weights and buffers on the CPU, in the standard memory layout."""
    return _copies(model.state_dict())


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """A copy of the optimizer's state by parameter name; hyperparameters come from the recipe and aren't stored."""
    return _copies(
        {
            f"{names[parameter]}/{key}": torch.as_tensor(value)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if value is not None
        }
    )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; those from a GPU share a block of pinned memory for each dtype,
    and are waited for together.
    """
    values = {key: value.detach() for key, value in tensors.items()}
    parts: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype in {value.dtype for value in values.values() if value.is_cuda}:
        sizes = [value.numel() for value in values.values() if value.is_cuda and value.dtype == dtype]
        parts[dtype] = iter(torch.empty(sum(sizes), dtype=dtype, pin_memory=True).split(sizes))
    copies: dict[str, Tensor] = {}
    for key, value in values.items():
        if value.is_cuda:
            copies[key] = next(parts[value.dtype]).view(value.shape)
            copies[key].copy_(value, non_blocking=True)
        else:
            copies[key] = value.to("cpu", memory_format=torch.contiguous_format, copy=True)
    if parts:
        torch.cuda.current_stream().synchronize()
    return copies


def restore(
    state: Checkpoint,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
) -> None:
    """Puts a checkpoint's tensors in place.

    Raises:
        UserError: they aren't those of this model and optimizer.
    """
    try:
        model.load_state_dict(state.model)
        if ema and state.ema:
            ema.load_state_dict(state.ema)
        load_optimizer(optimizer, state.optimizer, names)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the checkpoint of step {state.step} doesn't fit this model: {str(error)[:300]}") from error


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], names: Mapping[Tensor, str]
) -> None:
    """Restores what `optimizer_tensors` returned.

    State of a parameter's shape gets the parameter's memory layout: fused kernels walk both by address.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for key, value in tensors.items():
        name, _, state = key.rpartition("/")
        parameter = by_name[name]
        if value.shape == parameter.shape and value.dim():
            optimizer.state[parameter][state] = torch.empty_like(
                parameter, dtype=value.dtype, requires_grad=False
            ).copy_(value)
        else:
            optimizer.state[parameter][state] = value.to(parameter.device)
