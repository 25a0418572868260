"""Which folder a run lives in, and which checkpoint it resumes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from trainer.errors import UserError
from trainer.recipe.recipe import Recipe, differences
from trainer.runs import checkpoint as checkpoints
from trainer.runs.folder import RunFolder, set_aside

PARTIAL, READY = "partial", "ready"  # how far the folder of a run that resumes from a given checkpoint has come

Say = Callable[[str], None]


def open_run(folder: RunFolder, recipe: Recipe, resume: str, say: Say) -> Path | None:
    """Makes the folder ready to train in; returns the checkpoint to resume from, None for a start from scratch.

    Args:
        folder: of the run, locked.
        recipe: what is going to be trained.
        resume: `auto`, `never`, or the path of a checkpoint folder.
        say: prints a line for people.

    Raises:
        UserError: the folder holds another recipe's run, or no checkpoint is intact.
    """
    _finish_swap(folder)
    found = None
    if resume == "auto":
        found = _newest_checkpoint(folder, recipe, say)
    elif resume == "never":
        _set_aside(folder, say)
    else:
        found = _adopt(folder, recipe, Path(resume), say)
    folder.create()
    counters = checkpoints.read_counters(found) if found else None
    folder.truncate_metrics(counters["step"] if counters else 0, bool(counters and counters["evaluation_pending"]))
    folder.write_recipe(recipe.resolved())
    folder.is_open = True
    folder.write_standing("running")
    return found


def _set_aside(folder: RunFolder, say: Say) -> None:
    if folder.path.exists():
        say(f"the old {folder.path} moved to {set_aside(folder.path)}")


def _newest_checkpoint(folder: RunFolder, recipe: Recipe, say: Say) -> Path | None:
    checkpoints.recover(folder.checkpoints)
    if not checkpoints.steps(folder.checkpoints):
        return None  # nothing was computed that another recipe could spoil
    _same_recipe(folder, recipe)
    folder.is_open = True
    step, complaints = checkpoints.newest_valid(folder.checkpoints)
    if step is None:
        for complaint in complaints:
            say(complaint)
        raise UserError(f"{folder.checkpoints}: no checkpoint is intact; --resume never starts from scratch")
    if complaints:
        for complaint, moved in zip(complaints, checkpoints.set_newer_aside(folder.checkpoints, step), strict=True):
            say(f"{complaint}; moved to {moved.name}")
    return folder.checkpoints / checkpoints.folder_name(step)


def _same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    changed = differences(folder.read_recipe(), recipe)
    if changed:
        raise UserError(
            f"{folder.path} holds a run of another recipe; these keys differ: {', '.join(changed)}. "
            f"Give this run another name=…, or move the old folder to {folder.path.name}.1 with --resume never"
        )


def _adopt(folder: RunFolder, recipe: Recipe, given: Path, say: Say) -> Path:
    """Makes a given checkpoint, of this run or of another of the same recipe, the newest one of a new run folder,
    beside the best so far.

    The folder is built under a hidden name. Two renames then put it in the old one's place; `_finish_swap` does the
    second where a kill came between them.
    """
    try:
        checkpoints.verify(given)
    except checkpoints.InvalidCheckpoint as error:
        raise UserError(
            f"--resume {given}: {error}; it takes auto, never, or a folder such as runs/NAME/checkpoints/step_00000100"
        ) from None
    given = given.resolve()
    root = next((parent for parent in given.parents if parent.name == "checkpoints"), None)
    if root is None:
        raise UserError(
            f"--resume {given}: not in the checkpoints/ of a run folder, so its recipe and metrics are unknown"
        )
    old = RunFolder(root.parent)
    _same_recipe(old, recipe)
    best_step = checkpoints.read_counters(given)["best_step"]
    best = None if best_step is None else checkpoints.find_best(root, best_step)
    if best_step is not None and best is None:
        say(
            f"the best checkpoint so far, that of step {best_step}, is no longer there; checkpoints/best appears with "
            "the next better one"
        )
    new = RunFolder(_hidden(folder, PARTIAL))
    shutil.rmtree(new.path, ignore_errors=True)
    new.create()
    for line in old.read_metrics():
        new.log(line)
    found = checkpoints.adopt(new.checkpoints, given, best)
    new.write_recipe(recipe.resolved())
    new.path.rename(_hidden(folder, READY))
    _set_aside(folder, say)
    _finish_swap(folder)
    return folder.checkpoints / found.name


def _finish_swap(folder: RunFolder) -> None:
    """Puts a new folder in its place where the old one has left it; where the old one is still there,
    that one stays.
    """
    ready = _hidden(folder, READY)
    if not folder.path.exists() and ready.exists():
        ready.rename(folder.path)
    for leftover in (ready, _hidden(folder, PARTIAL)):
        shutil.rmtree(leftover, ignore_errors=True)


def _hidden(folder: RunFolder, state: str) -> Path:
    return folder.path.with_name(f".{folder.path.name}.{state}")
