"""Which folder a run lives in, and which checkpoint it resumes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from trainer.errors import UserError
from trainer.recipe.recipe import Recipe, differences
from trainer.runs.checkpoint import InvalidCheckpoint, read_counters, verify
from trainer.runs.folder import RunFolder, move_aside

PARTIAL, READY = "partial", "ready"  # how complete the new folder of a run that resumes from a given checkpoint is

Say = Callable[[str], None]


def open_run(folder: RunFolder, recipe: Recipe, resume: str, say: Say) -> Path | None:
    """Prepares the folder for training; returns the checkpoint to resume from, None to start from scratch.

    Args:
        folder: of the run, locked.
        recipe: what is to be trained.
        resume: `auto`, `never`, or the path of a checkpoint folder.
        say: prints a line on the terminal.

    Raises:
        UserError: the folder holds a run of another recipe, or no checkpoint is intact.
    """
    _finish_swap(folder)
    found = None
    if resume == "auto":
        found = _newest_checkpoint(folder, recipe, say)
    elif resume == "never":
        _move_aside(folder, say)
    else:
        found = _adopt(folder, recipe, Path(resume), say)
    folder.create()
    counters = read_counters(found) if found else None
    folder.truncate_metrics(counters["step"] if counters else 0, bool(counters and counters["evaluation_pending"]))
    folder.write_recipe(recipe.resolved())
    folder.is_open = True
    folder.update_status("running")
    return found


def _move_aside(folder: RunFolder, say: Say) -> None:
    if folder.path.exists():
        say(f"moved the old {folder.path} to {move_aside(folder.path)}")


def _newest_checkpoint(folder: RunFolder, recipe: Recipe, say: Say) -> Path | None:
    store = folder.checkpoints
    store.recover()
    if not store.steps():
        return None  # nothing was computed that another recipe could invalidate
    _check_same_recipe(folder, recipe)
    folder.is_open = True
    step, problems = store.newest_intact()
    if step is None:
        for problem in problems:
            say(problem)
        raise UserError(f"{store.path}: no checkpoint is intact; --resume never starts from scratch")
    if problems:
        for problem, moved in zip(problems, store.quarantine_newer(step), strict=True):
            say(f"{problem}; moved to {moved.name}")
    return store.folder(step)


def _check_same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    changed = differences(folder.read_recipe(), recipe)
    if changed:
        raise UserError(
            f"{folder.path} holds a run of another recipe; these keys differ: {', '.join(changed)}. "
            f"Give this run another name=…, or move the old folder to {folder.path.name}.1 with --resume never"
        )


def _adopt(folder: RunFolder, recipe: Recipe, given: Path, say: Say) -> Path:
    """Makes a given checkpoint, of this run or of another of the same recipe, the newest one of a new run folder,
    along with the best so far.

    The folder is built under a hidden name. Two renames then swap it with the old one; `_finish_swap` does the second
    if a kill came between them.
    """
    try:
        verify(given)
    except InvalidCheckpoint as error:
        raise UserError(
            f"--resume {given}: {error}; must be auto, never, or a folder such as runs/NAME/checkpoints/step_00000100"
        ) from None
    given = given.resolve()
    root = next((parent.parent for parent in given.parents if parent.name == "checkpoints"), None)
    if root is None:
        raise UserError(
            f"--resume {given}: not in the checkpoints/ of a run folder, so its recipe and metrics are unknown"
        )
    old = RunFolder(root)
    _check_same_recipe(old, recipe)
    best_step = read_counters(given)["best_step"]
    best = None if best_step is None else old.checkpoints.find_best(best_step)
    if best_step is not None and best is None:
        say(
            f"the best checkpoint so far, that of step {best_step}, no longer exists; the next improvement creates "
            "checkpoints/best"
        )
    new = RunFolder(_hidden(folder, PARTIAL))
    shutil.rmtree(new.path, ignore_errors=True)
    new.create()
    for line in old.read_metrics():
        new.log(line)
    found = new.checkpoints.adopt(given, best)
    new.write_recipe(recipe.resolved())
    new.path.rename(_hidden(folder, READY))
    _move_aside(folder, say)
    _finish_swap(folder)
    return folder.checkpoints.path / found.name


def _finish_swap(folder: RunFolder) -> None:
    """Moves a new folder into place where the old one has been moved away; while the old one is still there,
    it stays.
    """
    ready = _hidden(folder, READY)
    if not folder.path.exists() and ready.exists():
        ready.rename(folder.path)
    for leftover in (ready, _hidden(folder, PARTIAL)):
        shutil.rmtree(leftover, ignore_errors=True)


def _hidden(folder: RunFolder, state: str) -> Path:
    return folder.path.with_name(f".{folder.path.name}.{state}")
