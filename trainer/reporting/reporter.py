"""Reports a run to its folder, to W&B and TensorBoard, and to the terminal. Only rank 0 reports anything."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.accelerator import resolve_precision
from trainer.errors import TrainingFailed, UserError, one_line
from trainer.recipe.recipe import Recipe
from trainer.reporting.figures import draw_confusion, draw_curves, draw_precision_recall, save_sheet
from trainer.reporting.progress import Progress
from trainer.reporting.trackers.tracker import Mirrors
from trainer.runs.environment import environment
from trainer.runs.folder import Line, RunFolder, Status
from trainer.signals import STOP

CURVES_EVERY_S = 60.0

Color = tuple[int, int, int]
"""RGB, 0 to 255."""


class Reporter:
    """Reports the progress of a run; silent on all ranks but 0.

    Args:
        folder: the run folder.
        recipe: of the run.
        enabled: whether this is rank 0.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, enabled: bool) -> None:
        self.folder, self.recipe, self.enabled = folder, recipe, enabled
        self.display = Progress(enabled)
        self.say, self.step = self.display.say, self.display.step
        self.mirrors: Mirrors | None = None  # the trackers: from `begin` on, on rank 0
        self._curves_drawn = 0.0  # time of the last drawing, in seconds
        self._advice: str | None = None  # from the last evaluation
        self._advice_given = False

    @property
    def is_open(self) -> bool:
        """Whether the run has begun, on this rank."""
        return self.mirrors is not None

    # ------------------------------------------------------------ before the first step

    def already_finished(self, step: int) -> None:
        """Prints that nothing is left to train."""
        self.say(
            f"{self.recipe.name} is already finished, at step {step}; to continue, set a longer train.duration (or "
            "another evaluate.stop_after)"
        )

    def resumed(self, step: int, caveats: Iterable[str]) -> None:
        """Prints the step from which the run resumes, and why it may differ from an uninterrupted one."""
        self.say(f"resumed {self.recipe.name} from step {step}")
        for caveat in caveats:
            self.say(caveat)

    def begin(self, step: int, total_steps: int | None, device: torch.device, data: dict[str, Any]) -> None:
        """Writes environment.json and data.json; opens trackers and progress bar."""
        if self.enabled:
            self.folder.write_data(data)
            precision = resolve_precision(self.recipe.train.precision)
            self.folder.write_environment(environment() | {"precision": precision, "device": str(device)})
            self.mirrors = Mirrors(self.recipe.trackers, self.folder.path, self.recipe.name, self.recipe.resolved())
        self.display.start(total_steps, step)
        self._curves_drawn = time.monotonic()

    # ------------------------------------------------------------ while training

    def train(self, line: Line) -> None:
        """Reports a line of training metrics."""
        self._log(line)
        if self.enabled:
            self.display.train(line)

    def skipped(self, description: str, total: int, advice: str) -> None:
        """Prints which step was skipped, and why."""
        self.say(f"{description}; skipped, {total} so far" + (f": {advice}" if advice else ""))

    def time_limit_near(self, step: int) -> None:
        """Prints why a checkpoint is saved now."""
        self.say(f"the time limit of this job is near: saving a checkpoint at step {step}")

    def validation(self, line: Line, names: Sequence[str], improved: bool, advice: str | None = None) -> None:
        """Reports a line of validation metrics.

        Args:
            line: all metrics.
            names: of those to print.
            improved: whether the evaluation is the best so far.
            advice: printed once per run: after two evaluations in a row with advice, or at the end of a run whose last
                evaluation has some.
        """
        self._log(line)
        figures = "  ".join(f"{name} {line[name]:.4f}" for name in names if name in line)
        self.say(f"step {line['step']:6d}  validation: {figures}{'  (best so far)' if improved else ''}")
        if self._advice:
            self._advise(advice)
        self._advice = advice
        if self.enabled and time.monotonic() - self._curves_drawn > CURVES_EVERY_S:
            self._draw_curves()

    def pictures(
        self, line: Line, samples: Sequence[Tensor], panels: Sequence[str] = (), legend: Mapping[str, Color] = {}
    ) -> None:
        """Draws an evaluation: samples of the validation set, and the confusion matrix and curves of its metrics.

        Args:
            line: all metrics, as in `validation`.
            samples: uint8 (P, 3, H, W) each; empty if the task draws none.
            panels: names of the P panels.
            legend: the name of each colour.
        """
        if not self.mirrors:
            return
        folder, step = self.folder.pictures, line["step"]
        for name, draw in (("confusion", draw_confusion), ("precision_recall", draw_precision_recall)):
            if line.get(name):
                draw(line[name], folder / f"{name}_step_{step:08d}.png")
        if samples:
            save_sheet(samples, folder / f"validation_step_{step:08d}.png", panels, legend)
        self.mirrors.pictures(self.folder.pictures_of(step), step)

    def _log(self, line: Line) -> None:
        if self.mirrors:
            self.folder.log(line)
            self.mirrors.log(line)

    def _advise(self, advice: str | None) -> None:
        if advice and not self._advice_given:
            self.say(advice)
            self._advice_given = True

    def _draw_curves(self) -> None:
        draw_curves(self.folder.read_metrics(), self.folder.pictures / "curves.png")
        self._curves_drawn = time.monotonic()

    # ------------------------------------------------------------ at the end

    def summary(self, status: Status, **facts: Any) -> dict[str, Any]:
        """Writes summary.json and returns its contents, {} on other ranks."""
        return self.folder.write_summary(status, **facts) if self.enabled else {}

    def stopped(self, resume: str, facts: Mapping[str, Any]) -> None:
        """Closes everything after a stop signal and prints how to resume; `resume` is this command's option."""
        rerun = "rerun" if resume == "auto" else "rerun with --resume auto"
        signal = STOP.signal_name or "a signal"
        self._close("stopped", facts)
        self.say(f"stopped on {signal} at step {facts['step']}, checkpoint saved; {rerun} to resume")

    def finished(self, evaluations_since_best: int | None, facts: Mapping[str, Any]) -> None:
        """Closes everything after the last step; `evaluations_since_best` is None unless training ended early."""
        early = "" if evaluations_since_best is None else f" early, {evaluations_since_best} evaluations after the best"
        metric = self.recipe.evaluate.best
        best = self._close("finished", facts).get("best", {}).get(metric)
        figure = f", best {metric} {best['value']:.4f} at step {best['step']}" if best else ""
        self._advise(self._advice)
        self.say(
            f"finished {self.recipe.name}{early}: {facts['step']} steps in {facts['seconds']:.0f} s; see "
            f"{self.folder.path}{figure}"
        )

    def failed(self, error: BaseException, facts: Mapping[str, Any]) -> None:
        """Records why the run failed; closes everything if it has begun."""
        if self.is_open:
            self._close("failed", {"error": one_line(error), **facts})
        elif isinstance(error, UserError | TrainingFailed):  # any other error may be temporary
            self.folder.update_status("failed", error=one_line(error))

    def _close(self, status: Status, facts: Mapping[str, Any]) -> dict[str, Any]:
        self.display.close()
        if not self.mirrors:
            return {}
        summary = self.summary(status, **facts)
        with suppress(OSError):  # a full disk has been reported
            self._draw_curves()
        self.mirrors.finish(summary)
        return summary
