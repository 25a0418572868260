"""Instance segmentation by detection: a box, a class and a mask for each object, by Mask R-CNN."""

from __future__ import annotations

from torch import Tensor

from trainer.components import task
from trainer.detection.boxes import Detections
from trainer.tasks.objects import ObjectTask
from trainer.tasks.task import Batch, Forward

FOREGROUND = 0.5  # pixels of a higher probability belong to the mask


@task(name="mask_rcnn", interface="mask_rcnn", fields=("image", "boxes", "masks"))
class MaskRcnnTask(ObjectTask):
    """Instance segmentation by a model that computes its losses itself, but only in training mode: so there is no
    validation loss.

    Args:
        model: a `torchvision.models.detection.MaskRCNN`, whose class 0 is the background.
        loss: takes the model's losses and the number of images.
        classes: names of the classes, without background.
    """

    pipeline_tag = "image-segmentation"
    kinds = {"mask_": "segm", "box_": "bbox"}
    fixed_shapes = False
    has_validation_loss = False

    def run(self, model: Forward, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """The model's losses, means over the images, and the number of images; crowds are not trained on."""
        images, targets = self._images(batch), []
        for index, image in enumerate(images):
            mine = (batch["image_index"] == index) & ~batch["crowd"]
            masks = batch["masks"][mine][:, : image.shape[1], : image.shape[2]]
            targets.append({"boxes": batch["boxes"][mine], "labels": batch["labels"][mine] + 1, "masks": masks})
        return model(images, targets), len(images)

    def infer(self, model: Forward, batch: Batch) -> list[dict[str, Tensor]]:
        """The results of torchvision, image by image: it would pad several to one size, and the model would see the
        padding.
        """
        return [each for image in self._images(batch) for each in model([image])]

    def decode(self, outputs: list[dict[str, Tensor]], batch: Batch) -> list[Detections]:
        """The instances in each image, at its own size."""
        detections = (
            Detections(each["boxes"], each["scores"], each["labels"] - 1, each["masks"][:, 0] > FOREGROUND)
            for each in outputs
        )
        return self.clipped(detections, batch)

    def _images(self, batch: Batch) -> list[Tensor]:
        """Each image without its padding, float (3, H, W) in [0, 1]."""
        images = self.inputs(batch["image"])
        sizes = zip(batch["height"].tolist(), batch["width"].tolist(), strict=True)
        return [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]
