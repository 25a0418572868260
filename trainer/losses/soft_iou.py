"""Soft IoU: the Jaccard index of one class with probabilities in place of decisions."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from trainer.components import loss
from trainer.losses.loss import Loss

EMPTY = 1e-12
"""A union below this many pixels is empty: nothing is there and nothing was predicted."""


@loss(name="soft_iou", interface="dense")
class SoftIoU(Loss):
    """1 - I / U with I = Σ X·Y and U = Σ (X + Y - X·Y) over the valid pixels of the whole micro-batch.

    X is the softmax probability of class `channel` and Y is 1 where that class is true, else 0
    (Rahman & Wang, "Optimizing Intersection-Over-Union in Deep Neural Networks for Image Segmentation", 2016).
    Takes logits (B, C, H, W) and class indices (B, H, W), long or uint8. With an empty union the loss is 0.

    Args:
        num_classes: C.
        ignore_index: the label that counts nowhere, or None.
        channel: the class whose IoU is maximised.

    Raises:
        ValueError: the data set has no class `channel`.
    """

    def __init__(
        self, num_classes: int, ignore_index: int | None, /, *, channel: Annotated[int, Field(ge=0)] = 1
    ) -> None:
        super().__init__()
        if channel >= num_classes:
            raise ValueError(
                f"loss.channel must be 0 to {num_classes - 1}, as the data set has {num_classes} classes (got "
                f"{channel})"
            )
        self.channel = channel
        self.ignore_index = ignore_index

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Local sums, float64 scalars: `intersection` and `union`, in pixels."""
        true = targets == self.channel
        predicted = outputs.softmax(1)[:, self.channel]
        if self.ignore_index is not None:
            predicted = torch.where(targets == self.ignore_index, 0, predicted)
        intersection = torch.where(true, predicted, 0)
        union = torch.where(true, 1, predicted)  # x + y - x·y is 1 where y = 1 and x where y = 0
        return {"intersection": intersection.sum(dtype=torch.float64), "union": union.sum(dtype=torch.float64)}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """1 - I / U, written (U - I) / U so that an empty union gives 0: `loss`."""
        return {"loss": (sums["union"] - sums["intersection"]) / sums["union"].clamp(min=EMPTY)}
