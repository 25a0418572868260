"""How far a run has come: the counters that a checkpoint holds beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.metrics.best import Best


@dataclass
class TrainState:
    """What a run has counted so far, equal on all processes.

    Attributes:
        best: the evaluations so far.
        step: optimizer steps done.
        seconds: of training over all interruptions, on rank 0's clock.
        num_skipped: steps that left the weights as they were, since something wasn't finite.
        evaluation_pending: whether the evaluation after `step` was interrupted and is still to be done.
    """

    best: Best
    step: int = 0
    seconds: float = 0.0
    num_skipped: int = 0
    evaluation_pending: bool = False

    def counters(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return self.best.state() | {
            "step": self.step,
            "seconds": self.seconds,
            "num_skipped": self.num_skipped,
            "evaluation_pending": self.evaluation_pending,
        }

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Continues from what a checkpoint holds."""
        self.best.restore(counters)
        self.step, self.seconds = counters["step"], counters["seconds"]
        self.num_skipped, self.evaluation_pending = counters["num_skipped"], counters["evaluation_pending"]
