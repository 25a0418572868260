"""Which folder a run lives in, and which checkpoint it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer import checkpoint as checkpoints
from trainer.errors import UserError
from trainer.recipe import Recipe, differences
from trainer.tracking import RunFolder, set_aside

Say = Callable[[str], None]


def open_run(folder: RunFolder, recipe: Recipe, resume: str, say: Say) -> Path | None:
    """Makes the folder ready to go on in; returns the checkpoint to go on from, None for a start from the beginning.

    Args:
        folder: of the run, locked.
        recipe: what is going to be trained.
        resume: `auto`, `never`, or the path of a checkpoint folder.
        say: prints a line for people.

    Raises:
        UserError: the folder holds another recipe's run, or no checkpoint is whole.
    """
    if resume == "auto":
        found = _newest_checkpoint(folder, recipe, say)
    elif resume == "never":
        found = None
        _set_aside(folder, say)
    else:
        found = _adopt(folder, recipe, Path(resume), say)
    folder.create()
    counters = checkpoints.read_counters(found) if found else None
    folder.truncate_metrics(counters["step"] if counters else 0, bool(counters and counters["evaluation_pending"]))
    folder.write_recipe(recipe.resolved())
    return found


def _set_aside(folder: RunFolder, say: Say) -> Path:
    if not folder.path.exists():
        return folder.path
    moved = set_aside(folder.path)
    say(f"the old {folder.path} is now {moved}")
    return moved


def _newest_checkpoint(folder: RunFolder, recipe: Recipe, say: Say) -> Path | None:
    checkpoints.recover(folder.checkpoints)
    if not checkpoints.steps(folder.checkpoints):
        return None  # nothing was computed that another recipe could spoil
    _same_recipe(folder, recipe)
    step, complaints = checkpoints.newest_valid(folder.checkpoints)
    for complaint in complaints:
        say(complaint)
    if step is None:
        raise UserError(f"{folder.checkpoints}: no checkpoint is whole; --resume never starts from the beginning")
    return folder.checkpoints / checkpoints.folder_name(step)


def _same_recipe(folder: RunFolder, recipe: Recipe) -> None:
    changed = differences(folder.read_recipe(), recipe)
    if changed:
        raise UserError(
            f"{folder.path} holds a run of another recipe; these keys differ: {', '.join(changed)}. "
            "Give this run another name=…, or set the old folder aside with --resume never"
        )


def _adopt(folder: RunFolder, recipe: Recipe, given: Path, say: Say) -> Path:
    """Makes a given checkpoint, of this run or of another of the same recipe, the only one of a new run folder."""
    try:
        checkpoints.verify(given)
    except checkpoints.InvalidCheckpoint as error:
        raise UserError(f"--resume {given}: {error}; it takes auto, never, or a folder such as runs/NAME/checkpoints/step_00000100") from None
    given = given.resolve()
    root = next((parent.parent for parent in given.parents if parent.name == "checkpoints"), None)
    if root is None:
        raise UserError(f"--resume {given}: not in the checkpoints/ of a run folder, so its recipe and metrics are unknown")
    _same_recipe(RunFolder(root), recipe)
    if root == folder.path.resolve():
        root = _set_aside(folder, say)
        given = root / given.relative_to(folder.path.resolve())
    else:
        _set_aside(folder, say)
    folder.create()
    for line in RunFolder(root).read_metrics():
        folder.log(line)
    return checkpoints.adopt(folder.checkpoints, given)
