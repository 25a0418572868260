"""Instance segmentation without detection: a watershed cuts a map of classes into instances, along a map of depth."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import nn

from trainer.components import InnerFraction, task
from trainer.detection.boxes import Detections
from trainer.detection.watershed import (
    LIMIT,
    MIN_PIXELS,
    THRESHOLD,
    WatershedOutput,
    WatershedTargets,
    instances,
    watershed_targets,
)
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
        limit: distance in pixels to an instance's boundary at which the depth reaches its maximum.
        threshold: pixels deeper than this mark an instance.
        min_pixels: smaller instances, and smaller markers, are dropped.
    """

    pipeline_tag = "image-segmentation"
    kinds: dict[str, coco.Kind] = {"mask_": "segm"}

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        classes: tuple[str, ...],
        /,
        *,
        limit: PositiveInt = LIMIT,
        threshold: InnerFraction = THRESHOLD,
        min_pixels: PositiveInt = MIN_PIXELS,
    ) -> None:
        super().__init__(model, loss, classes)
        self.limit, self.threshold, self.min_pixels = limit, threshold, min_pixels

    def run(self, model: Forward, batch: Batch) -> tuple[WatershedOutput, WatershedTargets]:
        """The model's two maps, and the true ones."""
        height, width = (batch[name].to(batch["image"].device) for name in ("height", "width"))
        targets = watershed_targets(
            batch["masks"], batch["labels"], batch["crowd"], batch["image_index"], height, width, self.limit
        )
        return self.infer(model, batch), targets

    def infer(self, model: Forward, batch: Batch) -> WatershedOutput:
        """The model's two maps."""
        maps: WatershedOutput = model(self.images_of_one_size(batch))
        return maps

    def decode(self, outputs: WatershedOutput, batch: Batch) -> list[Detections]:
        """The instances of each image."""
        maps = zip(outputs.semantic, outputs.distance, strict=True)
        return self.clipped(
            (
                instances(logits.float().softmax(dim=0), distance, self.threshold, self.min_pixels)
                for logits, distance in maps
            ),
            batch,
        )
