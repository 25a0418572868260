"""Classification of images, as a plugin: a data set with labels, a task and a model that the package does not know.

A recipe lists this file under `plugins` and uses the package's own `cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from trainer.components import dataset, model, task
from trainer.data.images import encode_png
from trainer.data.source import DataInfo, Row, Source
from trainer.losses.loss import Loss
from trainer.metrics.confusion import accuracy, confusion_matrix, most_likely
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch, Forward, Task

CLASSES = ("rows", "columns", "checks")
SPLITS = {"train": 60, "validation": 13}  # 13: no number of processes divides it
SIDE = 16


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    for seed, (split, count) in enumerate(SPLITS.items()):
        for index in range(count):
            random = np.random.default_rng((seed, index))
            label, width = int(random.integers(len(CLASSES))), int(random.integers(2, 5))
            row, column = np.indices((SIDE, SIDE)) // width
            pattern = (row, column, row + column)[label] % 2
            image = random.integers(0, 96, (SIDE, SIDE, 3)) + 128 * pattern[..., None]
            yield split, {"image": encode_png(image.astype(np.uint8)), "label": label}


@dataset(fields=("image", "label"))
def patterns() -> Source:
    """Stripes and checks on noise, 16 x 16 pixels; three classes, 60 + 13 images."""
    return Source("patterns", DataInfo(CLASSES), {"image": "image", "label": "label"}, _rows)


@model(interface="labels")
def small_classifier(num_classes: int, /, *, width: Annotated[int, Field(gt=0)] = 16) -> nn.Module:
    """Images (B, 3, H, W) to logits (B, num_classes): three convolutions and a mean over the image."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


@task(interface="labels", fields=("image", "label"))
class Classification(Task[Tensor]):
    """One class for each `image` uint8 (B, 3, H, W), its `label` int64 (B,). It draws no pictures.

    Args:
        model: images float (B, 3, H, W) in [-1, 1] to logits (B, C).
        loss: takes the logits and class indices int64 (B,).
        classes: names of the classes.
    """

    metric_names = ("loss", "accuracy")

    def __init__(self, model: nn.Module, loss: Loss, classes: tuple[str, ...], /) -> None:
        super().__init__(model, loss)
        self.classes = classes

    def run(self, model: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and labels int64 (B,)."""
        return self.infer(model, batch), batch["label"]

    def infer(self, model: Forward, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = model(self.pixels(batch["image"]) / 127.5 - 1)
        return logits

    def decode(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The most likely class, int64 (B,)."""
        return most_likely(outputs)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`confusion` int64 (C, C)."""
        return {"confusion": confusion_matrix(most_likely(outputs), batch["label"], len(self.classes), None)}

    def measure(self, sums: EvaluationSums) -> dict[str, Any]:
        """`accuracy`, and the confusion matrix, of which the framework draws a picture."""
        matrix = sums.metrics["confusion"]
        confusion = dict(zip(self.classes, matrix.tolist(), strict=True))
        return {"accuracy": float(accuracy(matrix)), "confusion": confusion}
