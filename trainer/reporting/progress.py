"""Progress of a training: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.signals import leave_closed_terminal


@contextmanager
def _survives_terminal() -> Iterator[None]:
    """If the terminal was closed, skips the output inside and lets training continue."""
    try:
        yield
    except OSError:
        if not leave_closed_terminal():
            raise


class Progress:
    """A progress bar on rank 0; silent on other ranks.

    Args:
        enabled: whether this process prints anything.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bar: Any = None

    @property
    def has_bar(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    @_survives_terminal()
    def start(self, total_steps: int | None, step: int) -> None:
        """Shows the bar at `step` of `total_steps` (None if the duration of the training is in minutes)."""
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total_steps, completed=step)
            self._bar.start()

    @_survives_terminal()
    def step(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    @_survives_terminal()
    def train(self, line: dict[str, Any]) -> None:
        """Shows a training line of the metrics."""
        text = f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['samples_per_second']:.0f} samples/s"
        self.show(text, before=f"step {line['step']:6d}  epoch {line['epoch']:6.2f}  ")

    @_survives_terminal()
    def show(self, text: str, before: str) -> None:
        """Writes a text beside the bar, or as a line of its own after what the bar would show."""
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            self.say(before + text)

    @_survives_terminal()
    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self.enabled:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    @_survives_terminal()
    def close(self) -> None:
        """Stops the bar."""
        bar, self._bar = self._bar, None
        if bar:
            bar.stop()
