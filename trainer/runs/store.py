"""The checkpoints of a run: each intact, or not there; nothing here imports torch.

    checkpoints/step_00000123/   see `checkpoint`
    checkpoints/last             link to the newest
    checkpoints/best             link to hard links of the best, which outlive its own folder
    checkpoints/.invalid-step_…  one that wasn't intact when the run resumed from an older one

A folder is written under another name, with a manifest of SHA-256 sums, flushed to disk, and renamed:
a kill at any moment leaves the previous checkpoints and at most a leftover that nothing reads.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.runs.checkpoint import InvalidCheckpoint, folder_name, read_counters, verify
from trainer.runs.durable import flush, replace_link

if TYPE_CHECKING:  # it imports torch, and a reader of run folders must not wait for that
    from trainer.runs.state import Checkpoint

WRITING, REPLACED, REMOVED, INVALID = ".writing-", ".replaced-", ".removed-", ".invalid-"


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        path: their folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, step: int) -> Path:
        """The folder of a step's checkpoint, existing or not."""
        return self.path / folder_name(step)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first, intact or not."""
        if not self.path.is_dir():
            return []
        return sorted(
            int(match[1]) for path in self.path.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name))
        )

    def newest_intact(self) -> tuple[int | None, list[str]]:
        """Step of the newest intact checkpoint (None: there is none), and what is wrong with each newer one,
        newest first.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                verify(self.folder(step))
            except InvalidCheckpoint as error:
                problems.append(f"{folder_name(step)} is not intact: {error}")
            else:
                return step, problems
        return None, problems

    # ------------------------------------------------------------ writing

    def save(self, checkpoint: Checkpoint, keep: int, best: bool) -> Path:
        """Writes a checkpoint, points `last` (and `best`) to it and removes all but the newest `keep`.

        Raises:
            OSError: it couldn't be written; older checkpoints are untouched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.recover()
        final = self.folder(checkpoint.step)
        temporary, replaced = self.path / f"{WRITING}{final.name}", self.path / f"{REPLACED}{final.name}"
        temporary.mkdir()
        try:
            checkpoint.write(temporary)
            if final.exists():  # of the same step: an invalid one, or one that was saved before this step's evaluation
                final.rename(replaced)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush(self.path)
        replace_link(self.path / "last", final.name)
        if best:
            self._keep_best(final)
        shutil.rmtree(replaced, ignore_errors=True)
        older = [step for step in self.steps() if step < checkpoint.step]
        for old in older[: max(0, len(older) - (keep - 1))]:
            self._remove(self.folder(old))
        for invalid in self.path.glob(f"{INVALID}*"):
            if int(invalid.name.rpartition("_")[2]) <= checkpoint.step:  # training has passed it again
                shutil.rmtree(invalid, ignore_errors=True)
        return final

    def recover(self) -> None:
        """Cleans up after a killed save: removes its leftovers, and puts back a checkpoint that was about to be
        replaced by one of the same step.
        """
        for leftover in (*self.path.glob(f"{WRITING}*"), *self.path.glob(f"{REMOVED}*")):
            shutil.rmtree(leftover, ignore_errors=True)  # a reader on a network file system may hold files of it
        for replaced in self.path.glob(f"{REPLACED}*"):
            final = self.path / replaced.name.removeprefix(REPLACED)
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)

    # ------------------------------------------------------------ the best one

    def find_best(self, step: int) -> Path | None:
        """The folder of an intact checkpoint of that step, which was the best at its time;
        None if it no longer exists.
        """
        for folder in (self.path / ".best" / folder_name(step), self.folder(step)):
            with suppress(InvalidCheckpoint):
                verify(folder)
                return folder
        return None

    def link_best(self, step: int | None) -> None:
        """Points `best` to the checkpoint of the best step according to the counters,
        if a kill came between saving it and moving the link.
        """
        link = self.path / "best"
        if (
            step is not None
            and self.folder(step).is_dir()
            and (not link.exists() or link.resolve().name != folder_name(step))
        ):
            self._keep_best(self.folder(step))

    def _keep_best(self, checkpoint: Path) -> None:
        """Hard-links a checkpoint's files to where pruning doesn't reach, then moves the `best` link at once."""
        kept, temporary = self.path / ".best" / checkpoint.name, self.path / f"{WRITING}best"
        _link_files(checkpoint, temporary)
        kept.parent.mkdir(exist_ok=True)
        if kept.exists():
            self._remove(kept)
        temporary.rename(kept)
        replace_link(self.path / "best", f".best/{checkpoint.name}")
        for old in kept.parent.iterdir():
            if old != kept:
                self._remove(old)

    # ------------------------------------------------------------ resuming

    def adopt(self, checkpoint: Path, best: Path | None) -> Path:
        """Adds a checkpoint of another folder, and the best one, to this empty store, by hard links where that is
        possible.

        Returns:
            Where the checkpoint is now.
        """
        final = self.folder(read_counters(checkpoint)["step"])
        _link_files(checkpoint, final)
        replace_link(self.path / "last", final.name)
        if best:
            self._keep_best(best)
        for path in (final, self.path):
            flush(path)
        return final

    def quarantine_newer(self, step: int) -> list[Path]:
        """Moves all checkpoints after `step`, which aren't intact, to names that are never read as checkpoints, and
        points `last` to `step`.

        A file system that fails for a moment brings them back later. By then the run has resumed from `step`, so they
        belong to another history, though they look newer.

        Returns:
            Where they are now, newest first.
        """
        moved = []
        for newer in reversed([each for each in self.steps() if each > step]):
            target = self.path / f"{INVALID}{folder_name(newer)}"
            shutil.rmtree(target, ignore_errors=True)
            moved.append(self.folder(newer).rename(target))
        replace_link(self.path / "last", folder_name(step))
        return moved

    def _remove(self, checkpoint: Path) -> None:
        """Removes a checkpoint under another name, so that a kill halfway leaves none with some of its files."""
        removed = self.path / f"{REMOVED}{checkpoint.parent.name}-{checkpoint.name}"
        shutil.rmtree(removed, ignore_errors=True)
        shutil.rmtree(checkpoint.rename(removed), ignore_errors=True)


def _link_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # a file system without hard links, or another one
            shutil.copy2(file, target / file.name)
