"""Trackers of a recipe: `track: [wandb, tensorboard]`. They mirror the run folder and never stop training.

The Trainer talks to `Mirrors`, which builds the recipe's trackers and switches off one that fails.
Only rank 0 has any. They are built after a resume has taken `metrics.jsonl` back to its checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainer.recipe.recipe import Choice, build


class Tracker(Protocol):
    """Somewhere to look at a run."""

    def log(self, metrics: dict[str, Any], step: int, split: str) -> None:
        """Shows the finite numbers of `metrics` as `split/name`."""

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Shows image files."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Hands over `summary.json` and closes."""


class Mirrors:
    """All trackers of a run behind a guard: one that fails prints a line to stderr and is off from then on.

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

    def log(self, metrics: dict[str, Any], step: int, split: str) -> None:
        """Shows numbers of one split (`train`, `validation`) at a step."""
        self._each(lambda tracker: tracker.log(metrics, step, split))

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
    print(f"{name}: switched off, the run isn't affected: {one_line(error)}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """An error for people, however long its text."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def scalars(metrics: dict[str, Any], split: str) -> dict[str, float]:
    """The numbers of a line, by the names that trackers show: `train/loss`."""
    return {
        f"{split}/{name}": value
        for name, value in metrics.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
