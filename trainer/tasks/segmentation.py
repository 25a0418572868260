"""Semantic segmentation: one class for each pixel."""

from __future__ import annotations

import colorsys
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.components import task
from trainer.losses.loss import Loss
from trainer.metrics.confusion import class_accuracy, confusion_matrix, jaccard, mean_over_present, pixel_accuracy
from trainer.tasks.task import Batch, Forward, Task

# Mean and standard deviation of ImageNet's pixels in [0, 1], which pretrained backbones were trained with.
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
OPACITY = 0.65  # of the class colours over the image
STRIPES = ((70, 70, 70), (200, 200, 200))  # of ignored pixels
STRIPE_WIDTH = 4  # pixels along a row


@task(interface="dense", fields=("image", "mask"))
class Segmentation(Task):
    """Semantic segmentation of `image` uint8 (B, 3, H, W) into the classes of `mask` uint8 (B, 1, H, W).

    Args:
        model: images float (B, 3, H, W) to logits (B, C, H, W).
        loss: takes the logits and class indices uint8 (B, H, W).
        num_classes: C.
        ignore_index: the label that counts nowhere, or None.
        classes: names of the classes.
        mean: of each colour channel, for pixels in [0, 1].
        std: standard deviation of each.
    """

    metric_names = ("loss", "miou", "pixel_accuracy", "class_accuracy")

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        num_classes: int,
        ignore_index: int | None,
        classes: tuple[str, ...],
        /,
        *,
        mean: Annotated[list[float], Field(min_length=3, max_length=3)] = IMAGENET_MEAN,
        std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] = IMAGENET_STD,
    ) -> None:
        super().__init__(model, loss)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.classes = classes
        self.mean = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1) * 255
        self.std = torch.tensor(std, dtype=torch.float64).view(3, 1, 1) * 255

    def loss_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """The sums of `loss` on a batch."""
        return self.loss(model(self.inputs(batch["image"])), batch["mask"][:, 0])

    def evaluation_sums(self, model: Forward, batch: Batch) -> dict[str, Tensor]:
        """`confusion` int64 (C, C), `samples` int64, and the sums of the loss as `loss/…`."""
        targets = batch["mask"][:, 0]
        logits = model(self.inputs(batch["image"]))
        sums = {
            "confusion": confusion_matrix(_decide(logits), targets, self.num_classes, self.ignore_index),
            "samples": torch.tensor(len(targets), device=targets.device),
        }
        return sums | {f"loss/{name}": value for name, value in self.loss(logits, targets).items()}

    def metrics(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The loss and its terms, `miou`, `pixel_accuracy`, `class_accuracy`, `num_classes_present` and `iou/<class>`.

        The loss is that of the whole set taken as one batch. Means are over the classes that occur; what has no
        value, such as the IoU of a class that is neither there nor predicted, is left out.
        """
        matrix = sums["confusion"]
        iou = jaccard(matrix)
        terms = self.loss.combine({name.removeprefix("loss/"): value for name, value in sums.items() if name.startswith("loss/")})
        values = {
            "miou": mean_over_present(iou),
            "pixel_accuracy": pixel_accuracy(matrix),
            "class_accuracy": mean_over_present(class_accuracy(matrix)),
            "num_classes_present": (~iou.isnan()).sum(),
            **{f"iou/{name}": value for name, value in zip(self.classes, iou, strict=True)},
        }
        return {name: float(value) for name, value in terms.items()} | {name: float(value) for name, value in values.items() if not value.isnan()}

    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """Rows of image | truth | prediction: uint8 (N, 3, H, 3W); ignored pixels of the truth are striped."""
        image = batch["image"]
        truth = self._paint(image, batch["mask"][:, 0])
        prediction = self._paint(image, _decide(model(self.inputs(image))))
        for panel in (truth, prediction):
            panel[..., :2] = 255  # a thin line between the panels
        return torch.cat([image, truth, prediction], dim=-1)

    def inputs(self, image: Tensor) -> Tensor:
        """Normalises uint8 (B, 3, H, W) on its device, to the dtype and memory format of the model's weights."""
        weights = list(self.model.parameters())
        dtype = weights[0].dtype
        # Kept where they are needed: copying them for every batch would make the host wait for the GPU.
        self.mean, self.std = self.mean.to(image.device), self.std.to(image.device)
        channels_last = any(w.dim() == 4 and not w.is_contiguous() for w in weights)
        pixels = image.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return (pixels - self.mean.to(dtype)) / self.std.to(dtype)

    def _paint(self, image: Tensor, labels: Tensor) -> Tensor:
        """Blends the colours of `labels` (B, H, W) over `image` (B, 3, H, W)."""
        palette = torch.tensor(class_colors(self.num_classes), dtype=torch.float32, device=image.device)
        ignored = torch.zeros_like(labels, dtype=torch.bool) if self.ignore_index is None else labels == self.ignore_index
        colors = palette[torch.where(ignored, 0, labels).long()]
        rows, columns = (torch.arange(size, device=image.device) for size in labels.shape[-2:])
        stripe = (rows[:, None] + columns) // STRIPE_WIDTH % len(STRIPES)
        stripes = torch.tensor(STRIPES, dtype=torch.float32, device=image.device)[stripe]
        colors = torch.where(ignored[..., None], stripes, colors).movedim(-1, 1)
        return (OPACITY * colors + (1 - OPACITY) * image).round().to(torch.uint8)


def class_colors(num_classes: int) -> list[tuple[int, int, int]]:
    """The RGB colours (0 to 255) of the classes, always the same ones: dark blue first, then hues by the golden angle."""
    colors = [(0.62, 0.75, 0.45)] + [((0.10 + 0.618034 * i) % 1, (0.85, 0.6)[i // 5 % 2], (1.0, 0.75)[i // 3 % 2]) for i in range(num_classes - 1)]
    return [(round(r * 255), round(g * 255), round(b * 255)) for r, g, b in (colorsys.hsv_to_rgb(*hsv) for hsv in colors[:num_classes])]


def _decide(logits: Tensor) -> Tensor:
    return logits.max(1).indices  # max(1), as argmax(1) is several times slower on CPUs
