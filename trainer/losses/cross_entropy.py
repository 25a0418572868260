"""Cross entropy: the mean of -log p(true class) over all labels that are not ignored, weighted by class or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trainer.components import loss
from trainer.errors import UserError
from trainer.losses.loss import Loss

ClassWeights = Literal["none", "inverse_frequency"]
MaxWeight = Annotated[float, Field(ge=1)]


def weigh_classes(kind: ClassWeights, max_weight: float, num_classes: int, statistics: Mapping[str, Any]) -> Tensor:
    """Weights of the classes.

    Args:
        kind: `none` for equal ones, or `inverse_frequency`: inverse to the number of pixels of the class in the
            training set.
        max_weight: the largest weight, as a multiple of the median over the classes that occur. A class that never
            occurs gets it.
        num_classes: C.
        statistics: of the data set: `class_pixels` (C,), pixels of the training set.

    Returns:
        float64 (C,), 1 for the median class; nan before the data set is prepared.

    Raises:
        UserError: the data set has no pixel counts.
    """
    if kind == "none":
        return torch.ones(num_classes, dtype=torch.float64)
    if not statistics:
        return torch.full((num_classes,), torch.nan, dtype=torch.float64)
    if "class_pixels" not in statistics:
        raise UserError(
            f"loss.class_weights: {kind} needs a data set with class masks, whose pixels are counted when it is "
            "prepared; set it to none"
        )
    pixels = torch.tensor(statistics["class_pixels"], dtype=torch.float64)
    weights = 1 / pixels
    return (weights / weights[pixels > 0].quantile(0.5)).clamp(max=max_weight)


@loss(name="cross_entropy", interface=("dense", "labels"))
class CrossEntropy(Loss):
    """Cross entropy of logits against class indices, long or uint8: (B, C, H, W) against (B, H, W), or (B, C) against
    (B,).

    The mean is taken over all valid labels (those that are not ignored) of the micro-batch, not image by image; without
    one, the loss is 0. With weights of the classes (see `weigh_classes`) it is the sum of weight · nll, divided by the
    sum of the weights of the valid labels.

    Args:
        num_classes: C.
        ignore_index: the label that counts nowhere, or None.
        statistics: of the data set.
        class_weights: whether classes count alike, or inversely to the number of their pixels in the training set.
        max_weight: the largest weight of a class, as a multiple of the median.

    Raises:
        UserError: the data set lacks the pixel counts that the weights follow from.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None,
        statistics: Mapping[str, Any],
        /,
        *,
        class_weights: ClassWeights = "none",
        max_weight: MaxWeight = 10.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.weights: Tensor  # of the classes, followed by the 0 of ignored labels
        self.register_buffer(
            "weights", F.pad(weigh_classes(class_weights, max_weight, num_classes, statistics), (0, 1))
        )

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Local sums, float64 scalars: weighted `nll` in nats over valid labels, and their `weight`."""
        labels = self.labels(targets)
        if outputs.is_cuda and torch.are_deterministic_algorithms_enabled():
            nll = self._nll_without_scatter(outputs, labels)
        else:
            weights = self.weights[:-1].to(outputs.dtype)
            nll = F.cross_entropy(outputs, labels, weights, ignore_index=self.num_classes, reduction="sum").double()
        return {"nll": nll, "weight": self.label_weights(labels).sum()}

    def labels(self, targets: Tensor) -> Tensor:
        """Class indices as long, C for ignored labels."""
        labels = targets.long()
        return (
            labels if self.ignore_index is None else torch.where(targets == self.ignore_index, self.num_classes, labels)
        )

    def label_weights(self, labels: Tensor) -> Tensor:
        """The weight of each label: float64, 0 for ignored ones."""
        return self.weights.index_select(0, labels.flatten()).view_as(labels)

    def _nll_without_scatter(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The same sum by a mask; torch's own kernel for images is faster, but adds with atomics on GPUs."""
        axes = range(2, outputs.dim())  # of the pixels
        classes = torch.arange(self.num_classes, device=labels.device).view(1, -1, *(1 for _ in axes))
        nll = -torch.where(labels[:, None] == classes, outputs.log_softmax(1), 0).sum((0, *axes), dtype=torch.float64)
        return (nll * self.weights[:-1]).sum()

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean: `loss`."""
        return {"loss": sums["nll"] / torch.where(sums["weight"] > 0, sums["weight"], 1)}
