"""What tasks that detect objects have in common: average precision and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.detection.boxes import Detections, clip
from trainer.errors import UserError
from trainer.losses.loss import Loss
from trainer.metrics import coco
from trainer.tasks.drawing import draw_objects
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch, Forward, Task

SHOWN_SCORE = 0.3  # pictures show detections from this score on


class ObjectTask(Task[list[Detections]]):
    """Detects objects, by boxes and maybe masks, in `image` uint8 (B, 3, H, W), which is padded; each has its own
    `height` and `width`.

    Args:
        model: the network.
        loss: its loss.
        classes: names of the classes.
    """

    pipeline_tag = "object-detection"
    panels = ("image", "ground truth", "prediction")
    kinds: dict[str, coco.Kind] = {"": "bbox"}
    """Whether boxes or masks are compared, by the prefix of the metrics' names."""

    def __init__(self, model: nn.Module, loss: Loss, classes: tuple[str, ...], /) -> None:
        super().__init__(model, loss)
        self.classes = classes
        names = (prefix + name for prefix in self.kinds for name in ("map", "map_50", "map_75"))
        self.metric_names = (*(("loss",) if self.has_validation_loss else ()), *names)

    def images_of_one_size(self, batch: Batch) -> Tensor:
        """The images of a batch, float (B, 3, H, W) in [0, 1], for a model that takes them all at once.

        Raises:
            UserError: they differ in size. Padding changes a model's output, so the output for an image would depend
                on the other images of its batch, and thus on the number of processes.
        """
        for name in ("height", "width"):
            sizes = batch[name].tolist()
            if len(set(sizes)) > 1:
                advice = "set data.resize=[H,W], and data.resize_mode=letterbox to keep their aspect"
                raise UserError(f"images of a batch differ in {name} ({min(sizes)} to {max(sizes)}): {advice}")
        return self.inputs(batch["image"])

    def inputs(self, image: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W), in [0, 1] and in the dtype and memory format of the model's weights."""
        return self.pixels(image) / 255

    def clipped(self, detections: Iterable[Detections], batch: Batch) -> list[Detections]:
        """The detections in each image of a batch, without those parts that lie in the padding of a letterbox."""
        return [clip(each, content) for each, content in zip(detections, batch["content"], strict=True)]

    def rows(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Ground truth and detections, see `trainer.metrics.coco.rows`."""
        return coco.rows(batch, self.decode(outputs, batch))

    def measure(self, sums: EvaluationSums) -> dict[str, Any]:
        """Average precision as COCO defines it, in pixels of the images as the model gets them.

        `map` is the mean over IoU thresholds from 0.50 to 0.95 and over the classes that have objects, `map_50` and
        `map_75` are those at a single threshold, and `ap/<class>` is the mean over thresholds. A task that predicts
        masks has the prefix `mask_` for those of masks, and `box_` for those of boxes.
        """
        values: dict[str, Any] = {}
        annotations, results = coco.as_coco(sums.rows, self.classes)
        for prefix, kind in self.kinds.items():
            precision = coco.average_precision(annotations, results, kind)
            values |= {
                f"{prefix}map": precision.mean,
                f"{prefix}map_50": precision.at_50,
                f"{prefix}map_75": precision.at_75,
            }
            values |= {
                f"{prefix}ap/{name}": value
                for name, value in zip(self.classes, precision.by_class.tolist(), strict=True)
            }
            curves = {
                name: curve.round(4).tolist()
                for name, curve in zip(self.classes, precision.curves, strict=True)
                if curve[0] >= 0
            }
            values.setdefault("precision_recall", curves)
        return values

    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """The image, the true objects over it, and the detected ones."""
        drawn = []
        for index, detections in enumerate(self.predict(model, batch)):
            height, width = int(batch["height"][index]), int(batch["width"][index])
            image = batch["image"][index, :, :height, :width]
            mine = batch["image_index"] == index
            masks = batch["masks"][mine][:, :height, :width] if "masks" in batch else None
            true = Detections(batch["boxes"][mine], torch.ones(int(mine.sum())), batch["labels"][mine], masks)
            sure = detections.scores >= SHOWN_SCORE
            shown = Detections(*(None if part is None else part[sure] for part in detections))  # type: ignore[arg-type]
            nothing = Detections(*(part[:0] for part in true[:3]))
            panels = [(nothing, False), (true, False), (shown, True)]
            drawn.append(
                torch.stack([draw_objects(image, objects, self.classes, scores) for objects, scores in panels])
            )
        return torch.stack(drawn)
