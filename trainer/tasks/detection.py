"""Object detection: the box and the class of each object."""

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
        conf_threshold: boxes up to this score are dropped.
        iou_threshold: of two boxes of a class that overlap by more, the one with the lower score is dropped.
        max_detections: at most this many are kept for an image.
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
        """The model's `Level`s, and the true boxes without crowds, which are not trained on."""
        alone = ~batch["crowd"]
        targets = Targets(*(batch[name][alone] for name in ("boxes", "labels", "image_index")))
        return self.infer(model, batch), targets

    def infer(self, model: Forward, batch: Batch) -> Any:
        """The model's `Level`s."""
        return model(self.images_of_one_size(batch))

    def decode(self, outputs: Any, batch: Batch) -> list[Detections]:
        """Boxes within each image, after non-maximum suppression."""
        return self.clipped(postprocess(outputs, self.conf_threshold, self.iou_threshold, self.max_detections), batch)
