"""Object detection: the boxes of objects and what each of them is."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt
from torch import nn

from trainer.components import Fraction, task
from trainer.detection.boxes import Detections, Targets, postprocess
from trainer.losses.loss import Loss
from trainer.tasks.objects import ObjectTask
from trainer.tasks.task import Batch, Forward


@task(interface="boxes", fields=("image", "boxes"))
class Detection(ObjectTask):
    """Detection by a model with anchors.

    Args:
        model: images float (B, 3, H, W) in [0, 1] to `Level`s.
        loss: takes them and `Targets`.
        classes: names of the classes.
        conf_threshold: boxes that score no more aren't found.
        iou_threshold: of two boxes of a class that overlap by more, the better one is found.
        max_detections: in an image.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        classes: tuple[str, ...],
        /,
        *,
        conf_threshold: Fraction = 0.001,
        iou_threshold: Fraction = 0.6,
        max_detections: PositiveInt = 100,
    ) -> None:
        super().__init__(model, loss, classes)
        self.conf_threshold, self.iou_threshold, self.max_detections = conf_threshold, iou_threshold, max_detections

    def run(self, model: Forward, batch: Batch) -> tuple[Any, Targets]:
        """The model's `Level`s, and the true boxes but for crowds, which aren't learnt."""
        alone = ~batch["crowd"]
        return model(self.images_of_one_size(batch)), Targets(
            *(batch[name][alone] for name in ("boxes", "labels", "image_index"))
        )

    def find(self, outputs: Any, batch: Batch) -> list[Detections]:
        """Boxes within each image, after non-maximum suppression."""
        return self.clipped(postprocess(outputs, self.conf_threshold, self.iou_threshold, self.max_detections), batch)
