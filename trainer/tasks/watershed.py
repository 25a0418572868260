"""Instance segmentation without detection: a map of classes and one of depth, which a watershed cuts into instances."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import nn

from trainer.components import task
from trainer.detection.boxes import Detections
from trainer.detection.watershed import LIMIT, WatershedTargets, instances, watershed_targets
from trainer.losses.loss import Loss
from trainer.metrics import coco
from trainer.tasks.objects import ObjectTask
from trainer.tasks.task import Batch, Forward


@task(name="watershed", interface="watershed", fields=("image", "boxes", "masks"))
class Watershed(ObjectTask):
    """Instance segmentation by a deep watershed, see `trainer.detection.watershed`.

    Args:
        model: images float (B, 3, H, W) in [0, 1] to a `WatershedOutput`.
        loss: takes it and `WatershedTargets`.
        classes: names of the classes, without background.
        limit: pixels from an instance's boundary from which on a pixel counts as deep inside.
        threshold: depth from which on a pixel marks an instance.
        min_pixels: smaller instances aren't found.
    """

    kinds: dict[str, coco.Kind] = {"mask_": "segm"}

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        classes: tuple[str, ...],
        /,
        *,
        limit: PositiveInt = LIMIT,
        threshold: Annotated[float, Field(gt=0, lt=1)] = 0.2,
        min_pixels: PositiveInt = 32,
    ) -> None:
        super().__init__(model, loss, classes)
        self.limit, self.threshold, self.min_pixels = limit, threshold, min_pixels

    def run(self, model: Forward, batch: Batch) -> tuple[Any, WatershedTargets]:
        """The model's two maps, and the true ones."""
        names = ("masks", "labels", "crowd", "image_index")
        sizes = (batch[name].to(batch["image"].device) for name in ("height", "width"))
        return model(self.pixels(batch["image"]) / 255), watershed_targets(*(batch[name] for name in names), *sizes, self.limit)

    def find(self, outputs: Any, batch: Batch) -> list[Detections]:
        """The instances of each image, without its padding."""
        found = []
        for index, (logits, distance) in enumerate(zip(outputs.semantic, outputs.distance, strict=True)):
            height, width = int(batch["height"][index]), int(batch["width"][index])
            probabilities = logits.float().softmax(dim=0)[:, :height, :width]
            found.append(instances(probabilities, distance[:height, :width], self.threshold, self.min_pixels))
        return found
