"""Focal loss: cross entropy that down-weights labels which are already predicted well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from trainer.components import loss
from trainer.losses.cross_entropy import ClassWeights, CrossEntropy, MaxWeight


@loss(name="focal", interface=("dense", "labels"))
class Focal(CrossEntropy):
    """-(1 - p)^gamma · log p, with p the softmax probability of the true class (Lin et al., "Focal Loss for Dense
    Object Detection", 2017, eq. 5).

    The mean is that of `cross_entropy`, including class weights (the paper's alpha); with `gamma: 0` so is the loss.
    Takes the same logits and class indices.

    Args:
        num_classes: C.
        ignore_index: the label that counts nowhere, or None.
        statistics: of the data set.
        gamma: how much less pixels count that are classified well.
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
        gamma: NonNegativeFloat = 2.0,
        class_weights: ClassWeights = "none",
        max_weight: MaxWeight = 10.0,
    ) -> None:
        super().__init__(num_classes, ignore_index, statistics, class_weights=class_weights, max_weight=max_weight)
        self.gamma = gamma

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Local sums, float64 scalars: weighted `nll` times (1 - p)^gamma over valid labels, and their `weight`."""
        labels = self.labels(targets)
        weights = self.label_weights(labels)
        # Without a reduction, so without atomics on GPUs.
        nll = F.cross_entropy(outputs, labels, ignore_index=self.num_classes, reduction="none")
        # 1 - p; above 0, where a root has an infinite slope.
        error = (-torch.expm1(-nll)).clamp(min=torch.finfo(nll.dtype).tiny)
        return {"nll": (weights * error**self.gamma * nll).sum(), "weight": weights.sum()}
