"""What a run tells: its folder, W&B and TensorBoard, and the terminal. Rank 0 alone tells anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from trainer.errors import TrainingFailed, UserError, one_line
from trainer.recipe.recipe import Recipe
from trainer.reporting.figures import draw_confusion, draw_curves, draw_precision_recall, save_sheet
from trainer.reporting.progress import Progress
from trainer.reporting.trackers.tracker import Mirrors
from trainer.runs.environment import environment
from trainer.runs.folder import Line, RunFolder, Status
from trainer.tasks.task import Color

CURVES_EVERY_S = 60.0


class Reporter:
    """Tells people and files how a run goes; silent on all ranks but 0.

    Args:
        folder: the run folder.
        recipe: what is trained.
        enabled: whether this is rank 0.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, enabled: bool) -> None:
        self.folder, self.recipe, self.enabled = folder, recipe, enabled
        self.display = Progress(enabled)
        self.say = self.display.say
        self.mirrors: Mirrors | None = None  # once the run has begun
        self._curves_drawn = 0.0
        self._advice: str | None = None  # of the last evaluation
        self._advice_given = False

    @property
    def is_open(self) -> bool:
        """Whether the run has begun, on this rank."""
        return self.mirrors is not None

    def begin(self, step: int, total_steps: int | None, facts: dict[str, Any]) -> None:
        """Writes environment.json, and opens trackers and progress bar."""
        if self.enabled:
            self.folder.write_environment(environment() | facts)
            self.mirrors = Mirrors(self.recipe.trackers, self.folder.path, self.recipe.name, self.recipe.resolved())
        self.display.start(total_steps, step)
        self._curves_drawn = time.monotonic()

    def train(self, line: Line) -> None:
        """A train line of the metrics."""
        self._log(line)
        if self.enabled:
            self.display.train(line)

    def validation(self, line: Line, names: Sequence[str], improved: bool, advice: str | None = None) -> None:
        """A validation line; `names` are the metrics for the terminal. A confusion matrix and curves in it are drawn,
        for `pictures` to show.

        `advice` is printed once, when two evaluations in a row have some, or the last one of a finished run.
        """
        self._log(line)
        figures = "  ".join(f"{name} {line[name]:.4f}" for name in names if name in line)
        self.say(f"step {line['step']:6d}  validation: {figures}{'  (best so far)' if improved else ''}")
        if self._advice:
            self._advise(advice)
        self._advice = advice
        if self.enabled and time.monotonic() - self._curves_drawn > CURVES_EVERY_S:
            self._draw_curves()
        if self.enabled and self.recipe.evaluate.pictures:
            for name, draw in (("confusion", draw_confusion), ("precision_recall", draw_precision_recall)):
                if line.get(name):
                    draw(line[name], self.folder.pictures / f"{name}_step_{line['step']:08d}.png")

    def _advise(self, advice: str | None) -> None:
        if advice and not self._advice_given:
            self.say(advice)
            self._advice_given = True

    def _log(self, line: Line) -> None:
        if self.enabled and self.mirrors:
            self.folder.log(line)
            self.mirrors.log(line, line["step"], line["split"])

    def pictures(
        self, samples: list[Tensor], step: int, panels: Sequence[str] = (), legend: Mapping[str, Color] = {}
    ) -> None:
        """Draws samples of the validation set, uint8 (P, 3, H, W) each, and shows all pictures of this step."""
        if self.enabled and self.mirrors:
            if samples:  # a task may have no pictures of its own
                save_sheet(samples, self.folder.pictures / f"validation_step_{step:08d}.png", panels, legend)
            self.mirrors.pictures(self.folder.pictures_of(step), step)

    def summary(self, status: Status, **facts: Any) -> dict[str, Any]:
        """Writes and returns summary.json."""
        return self.folder.write_summary(status, **facts) if self.enabled else {}

    def end(self, status: Status, text: str, **facts: Any) -> None:
        """Closes everything; `text` is the last line for people."""
        self.display.close()
        if self.enabled and self.mirrors:
            summary = self.summary(status, **facts)
            with suppress(OSError):  # a full disk has been reported
                self._draw_curves()
            self.mirrors.finish(summary)
            best = summary["best"].get(self.recipe.evaluate.best)
            figure = (
                f", best {self.recipe.evaluate.best} {best['value']:.4f} at step {best['step']}"
                if best and status == "finished"
                else ""
            )
            if status == "finished":
                self._advise(self._advice)
            if text:
                self.say(text + figure)

    def fail(self, error: BaseException, facts: dict[str, Any]) -> None:
        """Closes everything where the run has begun, and records why it failed; `facts` as in `summary`."""
        if self.is_open:
            self.end("failed", "", error=one_line(error), **facts)
        elif isinstance(error, UserError | TrainingFailed):  # anything else may not happen again
            self.folder.write_standing("failed", error=one_line(error))

    def _draw_curves(self) -> None:
        draw_curves(self.folder.read_metrics(), self.folder.pictures / "curves.png")
        self._curves_drawn = time.monotonic()
