"""Semantic segmentation: one class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from trainer.components import task
from trainer.losses.loss import Loss
from trainer.metrics import average_precision as ap
from trainer.metrics.confusion import (
    accuracy,
    class_accuracy,
    confusion_matrix,
    jaccard,
    mean_over_present,
    most_likely,
)
from trainer.recipe.file import nearest
from trainer.tasks.drawing import class_colors, paint_classes
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Batch, Forward, Task

# Mean and standard deviation of ImageNet's pixels in [0, 1], which pretrained backbones were trained with.
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
# The name of each metric's mean over the classes.
MEANS = {"iou": "miou", "class_accuracy": "class_accuracy", "ap": "map"}
# Shares of the pixels: a model that predicts one class for more than the first has not learned the others, if less than
# the second are of that class.
EVERYWHERE, NEARLY_ALL = 0.999, 0.99


@task(interface="dense", fields=("image", "mask"))
class Segmentation(Task[Tensor]):
    """Semantic segmentation of `image` uint8 (B, 3, H, W) into the classes of `mask` uint8 (B, 1, H, W).

    Args:
        model: images float (B, 3, H, W) to logits (B, C, H, W).
        loss: takes the logits and class indices uint8 (B, H, W).
        num_classes: C.
        ignore_index: the label of ignored pixels, or None.
        classes: names of the classes.
        mean: of each colour channel, for pixels in [0, 1].
        std: standard deviation of each.
        average_precision: whether to compute it, too: about 20 ns for each pixel and class on a CPU core.
        exclude: names of classes; means are also taken over the others, and are called e.g. `miou_without_misc`.

    Raises:
        ValueError: `exclude` names no class.
    """

    pipeline_tag = "image-segmentation"
    panels = ("image", "ground truth", "prediction")

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
        std: Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)] = IMAGENET_STD,
        average_precision: bool = False,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(model, loss)
        for name in exclude:
            if name not in classes:
                raise ValueError(f"exclude: the data set has no class {name!r}; {nearest(name, classes)}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.classes = classes
        self.mean = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1) * 255
        self.std = torch.tensor(std, dtype=torch.float64).view(3, 1, 1) * 255
        self.average_precision = average_precision
        # The classes that means are taken over, by the suffix of the means' names.
        self.subsets = {"": list(range(num_classes))}
        if exclude:
            self.subsets["_without_" + "_".join(exclude)] = [
                index for index, name in enumerate(classes) if name not in exclude
            ]
        means = [name for metric, name in MEANS.items() if metric != "ap" or average_precision]
        first, *others = (name + ending for ending in self.subsets for name in means)
        self.metric_names = ("loss", first, "pixel_accuracy", *others)
        self.legend = dict(zip(classes, class_colors(num_classes), strict=True))

    def run(self, model: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C, H, W) and the true classes uint8 (B, H, W)."""
        return self.infer(model, batch), batch["mask"][:, 0]

    def infer(self, model: Forward, batch: Batch) -> Tensor:
        """Logits (B, C, H, W)."""
        logits: Tensor = model(self.inputs(batch["image"]))
        return logits

    def decode(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The most likely class of each pixel, int64 (B, H, W)."""
        return most_likely(outputs)

    def sums(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`confusion` int64 (C, C), and `scores` int64 (C, 2, 65536) for average precision."""
        targets = batch["mask"][:, 0]
        sums = {"confusion": confusion_matrix(most_likely(outputs), targets, self.num_classes, self.ignore_index)}
        if self.average_precision:
            sums["scores"] = ap.score_counts(outputs, targets, self.ignore_index)
        return sums

    def measure(self, sums: EvaluationSums) -> dict[str, Any]:
        """The confusion matrix, and the metrics that follow from it and from the scores.

        `iou/<class>`, `class_accuracy/<class>` and `ap/<class>`, where they are defined: a class that is absent from
        ground truth and predictions has no IoU, and one that is absent from the ground truth has no other metric.
        `miou`, `class_accuracy` and `map` are means over the classes that have the metric, over all of these and
        without the excluded ones; `num_classes_present` counts the classes that have an IoU.
        """
        matrix = sums.metrics["confusion"]
        by_class = {"iou": jaccard(matrix), "class_accuracy": class_accuracy(matrix)}
        if self.average_precision:
            by_class["ap"] = ap.average_precision(sums.metrics["scores"])
        values: dict[str, Any] = {
            "pixel_accuracy": float(accuracy(matrix)),
            "num_classes_present": float((~by_class["iou"].isnan()).sum()),
        }
        for name, each in by_class.items():
            values |= {
                MEANS[name] + ending: float(mean_over_present(each[subset])) for ending, subset in self.subsets.items()
            }
            values |= {f"{name}/{label}": value for label, value in zip(self.classes, each.tolist(), strict=True)}
        return values | {"confusion": dict(zip(self.classes, matrix.tolist(), strict=True))}

    def advice(self, metrics: Mapping[str, Any]) -> str | None:
        """Against a model that predicts one class everywhere although there are others."""
        counts = torch.tensor(list(metrics["confusion"].values()), dtype=torch.float64)
        predicted, true = (counts.sum(dim) / counts.sum() for dim in (0, 1))
        share, index = predicted.max(0)
        name, true_share = self.classes[index], true[index]
        if not (share >= EVERYWHERE and true_share < NEARLY_ALL):
            return None
        return (
            f"the model predicts {name} for {share:.1%} of the validation pixels, of which {true_share:.1%} are "
            f"{name}: lower optimizer.lr, train more "
            "layers (model.train_only), or begin with loss=cross_entropy, and loss.class_weights=inverse_frequency "
            "where classes are rare"
        )

    def pictures(self, model: Forward, batch: Batch) -> Tensor:
        """The image, and the colours of the true and of the predicted classes over it; ignored pixels of the ground
        truth are striped.
        """
        image, predicted = batch["image"], self.predict(model, batch)
        painted = (
            paint_classes(image, labels, self.num_classes, self.ignore_index)
            for labels in (batch["mask"][:, 0], predicted)
        )
        return torch.stack([image, *painted], dim=1)

    def inputs(self, image: Tensor) -> Tensor:
        """Normalises uint8 (B, 3, H, W) on its device, to the dtype and memory format of the model's weights."""
        # Kept on the device: copying them for every batch would make the host wait for the GPU.
        self.mean, self.std = self.mean.to(image.device), self.std.to(image.device)
        pixels = self.pixels(image)
        return (pixels - self.mean.to(pixels.dtype)) / self.std.to(pixels.dtype)
