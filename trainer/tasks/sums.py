"""What an evaluation gathers of its samples: sums, and rows that cannot be summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed.reduce import joined, total


@dataclass(frozen=True)
class EvaluationSums:
    """All that the metrics of some samples follow from: of one batch, of a process's share or of the whole set.

    Attributes:
        loss: the sums of the loss; empty for a task without a validation loss.
        metrics: sums of any shape that metrics follow from.
        rows: what metrics follow from and cannot be summed; tensors that are joined along their first dimension.
        samples: int64 scalar, the number of samples.
    """

    loss: dict[str, Tensor]
    metrics: dict[str, Tensor]
    rows: dict[str, Tensor]
    samples: Tensor

    def __add__(self, other: EvaluationSums) -> EvaluationSums:
        """Those of the samples of both."""
        return EvaluationSums(
            {name: value + other.loss[name] for name, value in self.loss.items()},
            {name: value + other.metrics[name] for name, value in self.metrics.items()},
            {name: torch.cat([value, other.rows[name]]) for name, value in self.rows.items()},
            self.samples + other.samples,
        )

    def emptied(self) -> EvaluationSums:
        """Those of no sample, with the same names, shapes and dtypes."""
        return EvaluationSums(
            {name: torch.zeros_like(value) for name, value in self.loss.items()},
            {name: torch.zeros_like(value) for name, value in self.metrics.items()},
            {name: value[:0] for name, value in self.rows.items()},
            torch.zeros_like(self.samples),
        )

    def over_processes(self) -> EvaluationSums:
        """Those of the samples of all processes, on the CPU: metrics are many small figures, and the host would wait
        for each.
        """
        parts = total(self.loss), total(self.metrics), joined(self.rows), total({"samples": self.samples})
        loss, metrics, rows, samples = ({name: value.cpu() for name, value in part.items()} for part in parts)
        return EvaluationSums(loss, metrics, rows, samples["samples"])
