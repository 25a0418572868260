"""A kind of task on samples that are no images, in one file: data set, model, loss and task; recipes list it under
`plugins`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.components import dataset, loss, model, task
from trainer.data.source import DataInfo, Row, Source
from trainer.losses.loss import Loss
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch, Forward, Task

TRAIN, VALIDATION = 60, 13  # 13: no number of processes divides it
SHAPE = (2, 3)


def sample(index: int) -> tuple[np.ndarray, int]:
    """Numbers in their shape, and their class: that of the centre they are drawn around."""
    random = np.random.default_rng(index)
    label = int(random.integers(3))
    return (2 * np.eye(3)[label] + random.normal(0, 0.5, SHAPE)).astype(np.float32), label


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    for index in range(TRAIN + VALIDATION):
        numbers, label = sample(index)
        yield "train" if index < TRAIN else "validation", {"numbers": numbers, "label": label}


@dataset(fields=("numbers", "label"))
def vectors() -> Source:
    """Points around three centres."""
    return Source("vectors", DataInfo(("a", "b", "c")), {"numbers": "array[2,3]", "label": "label"}, _rows)


@model(interface="logits")
def perceptron(num_classes: int, /, *, width: Annotated[int, Field(gt=0)] = 16) -> nn.Module:
    """Arrays (B, 2, 3) to logits (B, C)."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SHAPE[0] * SHAPE[1], width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, num_classes)
    )


@loss(name="mean_log_loss", interface="logits")
class MeanLogLoss(Loss):
    """The mean of -log p(true class), of logits (B, C) and labels (B,)."""

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sum and number of samples."""
        sums = F.cross_entropy(outputs.double(), targets, reduction="sum")
        return {"nll": sums, "samples": sums.new_tensor(len(targets))}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean."""
        return {"loss": sums["nll"] / sums["samples"]}


@task(name="vectors", interface="logits", fields=("numbers", "label"))
class Vectors(Task[Tensor]):
    """Which class numbers belong to. It draws no pictures."""

    metric_names = ("accuracy", "loss")

    def __init__(self, model: nn.Module, loss: Loss, /) -> None:
        super().__init__(model, loss)

    def run(self, model: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and labels (B,)."""
        return self.infer(model, batch), batch["label"]

    def infer(self, model: Forward, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        return model(batch["numbers"].to(next(self.model.parameters()).dtype))

    def decode(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The most likely class, int64 (B,)."""
        return outputs.argmax(1)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """How many are right."""
        return {"right": (self.decode(outputs, batch) == batch["label"]).sum()}

    def measure(self, sums: EvaluationSums) -> dict[str, Any]:
        """The share that is right."""
        return {"accuracy": float(sums.metrics["right"] / sums.samples)}
