"""Instance segmentation by detection: a box, a class and a mask for each object, by Mask R-CNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.components import task
from trainer.detection.boxes import Detections
from trainer.losses.loss import Loss
from trainer.tasks.objects import ObjectTask
from trainer.tasks.task import ROWS, Batch, Forward

FOREGROUND = 0.5  # probability from which on a pixel belongs to the mask


@task(name="mask_rcnn", interface="mask_rcnn", fields=("image", "boxes", "masks"))
class MaskRcnnTask(ObjectTask):
    """Instance segmentation by a model that computes its losses itself, in training mode alone: so there is no
    validation loss.

    Args:
        model: a `torchvision.models.detection.MaskRCNN`, which counts the background as class 0.
        loss: takes its losses and the number of images.
        classes: names of the classes, without background.
    """

    kinds = {"mask_": "segm", "box_": "bbox"}
    fixed_shapes = False

    def __init__(self, model: nn.Module, loss: Loss, classes: tuple[str, ...], /) -> None:
        super().__init__(model, loss, classes)
        self.metric_names = self.metric_names[1:]

    def run(self, model: Forward, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """The model's losses, means over the images, and the number of images; crowds aren't learnt."""
        images, targets = self._images(batch), []
        for index, image in enumerate(images):
            mine = (batch["image_index"] == index) & ~batch["crowd"]
            masks = batch["masks"][mine][:, : image.shape[1], : image.shape[2]]
            targets.append({"boxes": batch["boxes"][mine], "labels": batch["labels"][mine] + 1, "masks": masks})
        return model(images, targets), len(images)

    def predict(self, model: Forward, batch: Batch) -> list[Detections]:
        """What is found in each image, at its own size."""
        return self.find(self._run_one_by_one(model, batch), batch)

    def find(self, outputs: list[dict[str, Tensor]], batch: Batch) -> list[Detections]:
        """From torchvision's results."""
        found = (
            Detections(each["boxes"], each["scores"], each["labels"] - 1, each["masks"][:, 0] > FOREGROUND)
            for each in outputs
        )
        return self.clipped(found, batch)

    def evaluation_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """`samples` (int64), and `rows` as `rows/…`."""
        rows = {ROWS + name: value for name, value in self.rows(self._run_one_by_one(model, batch), batch).items()}
        return rows | {"samples": torch.tensor(len(batch["image"]), device=batch["image"].device)}

    def _run_one_by_one(self, model: Forward, batch: Batch) -> list[dict[str, Tensor]]:
        """Results of torchvision, image by image: it would pad several to one size, and see the padding."""
        return [each for image in self._images(batch) for each in model([image])]

    def _images(self, batch: Batch) -> list[Tensor]:
        """Each image without its padding, float (3, H, W) in [0, 1]."""
        pixels = self.pixels(batch["image"]) / 255
        sizes = zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)
        return [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]
