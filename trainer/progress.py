"""What a person sees while training: a bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A progress bar on rank 0; silent on the others.

    Args:
        enabled: whether this process shows anything.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bar: Any = None

    def start(self, total_steps: int | None, step: int) -> None:
        """Shows the bar at `step` of `total_steps` (None where the training's duration is in minutes)."""
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total_steps, completed=step)
            self._bar.start()

    def step(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def train(self, line: dict[str, Any]) -> None:
        """Shows a train line of the metrics."""
        text = f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['samples_per_second']:.0f} samples/s"
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            self.say(f"step {line['step']:6d}  epoch {line['epoch']:6.2f}  {text}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self.enabled:
            return
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None
