"""The watched metric: which evaluation was the best, and how many have passed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name is best when lowest: losses are, everything else is best when highest."""
    return metric.endswith("loss")


@dataclass
class Best:
    """The best value of a recipe's `evaluate.best` so far. A better one is kept as a checkpoint; too many evaluations
    without one may lower the learning rate (schedule `plateau`) or end the training (`evaluate.stop_after`).

    Attributes:
        metric: its name.
        value, step: of the best evaluation; None before the first one that has a value.
        improvements: for each evaluation, whether it was the best so far.
    """

    metric: str
    value: float | None = None
    step: int | None = None
    improvements: list[bool] = field(default_factory=list)

    def is_improved_by(self, value: float | None) -> bool:
        """Whether a value (None: the metric has none on this set) is better than all before."""
        sign = -1.0 if lower_is_better(self.metric) else 1.0
        return value is not None and isfinite(value) and (self.value is None or sign * value > sign * self.value)

    def add(self, value: float | None, step: int, improved: bool) -> None:
        """Records an evaluation."""
        self.improvements.append(improved)
        if improved:
            self.value, self.step = value, step

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        return next(
            (since for since, improved in enumerate(reversed(self.improvements)) if improved), len(self.improvements)
        )

    def plateaus(self, patience: int) -> int:
        """How often more than `patience` evaluations in a row brought no improvement; the count restarts after each."""
        count = waited = 0
        for improved in self.improvements:
            waited = 0 if improved else waited + 1
            if waited > patience:
                count, waited = count + 1, 0
        return count

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"best": self.value, "best_step": self.step, "improvements": list(self.improvements)}

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Restores what a checkpoint holds."""
        self.value, self.step, self.improvements = (
            counters["best"],
            counters["best_step"],
            list(counters["improvements"]),
        )
