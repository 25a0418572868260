"""Trackers of a recipe: `track: [wandb, tensorboard]`. They mirror the run folder and never stop training.

The Reporter uses `Mirrors`, which builds the recipe's trackers and disables one that fails.
Only rank 0 has any. They are built after resuming has taken `metrics.jsonl` back to its checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.recipe.recipe import Choice, build
from trainer.runs.folder import Line


class Tracker(Protocol):
    """A service that shows a run."""

    def log(self, line: Line) -> None:
        """Shows the finite numbers of a line of `metrics.jsonl` as `split/name`, at its step."""

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Shows image files at a step."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Sends `summary.json` and closes."""


class Mirrors:
    """All trackers of a run; one that fails is reported in a line on stderr and disabled.

    Args:
        choices: the recipe's trackers; none on ranks other than 0.
        folder: the run folder.
        run_name: the run's name.
        config: the resolved recipe.
    """

    def __init__(self, choices: Sequence[Choice], folder: Path, run_name: str, config: dict[str, Any]) -> None:
        self._trackers: dict[str, Tracker] = {}
        for component, settings in choices:
            try:
                self._trackers[component.name] = build(
                    component, settings, folder=folder, run_name=run_name, config=config
                )
            except Exception as error:
                _report(component.name, error)

    def log(self, line: Line) -> None:
        """Shows a line of `metrics.jsonl`."""
        self._each(lambda tracker: tracker.log(line))

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Shows image files at a step."""
        self._each(lambda tracker: tracker.pictures(files, step))

    def finish(self, summary: dict[str, Any]) -> None:
        """Closes all trackers, within a bounded time."""
        self._each(lambda tracker: tracker.finish(summary))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, each in list(self._trackers.items()):
            try:
                call(each)
            except Exception as error:
                del self._trackers[name]
                _report(name, error)


def _report(name: str, error: Exception) -> None:
    print(f"{name}: disabled, training continues: {one_line(error)}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """An error in one line of limited length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def scalars(line: Line) -> dict[str, float]:
    """The finite numbers of a line, by the names that trackers show: `train/loss`."""
    return {
        f"{line['split']}/{name}": value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
