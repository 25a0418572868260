"""Focal loss: cross entropy that looks away from pixels it already gets right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from trainer.components import loss
from trainer.losses.cross_entropy import ClassWeights, CrossEntropy, MaxWeight


@loss(name="focal", interface="dense")
class Focal(CrossEntropy):
    """-(1 - p)^gamma · log p, with p the softmax probability of the true class (Lin et al., "Focal Loss for Dense
    Object Detection", 2017, eq. 5).

    The mean is that of `cross_entropy`, weights of the classes (the paper's alpha) included; with `gamma: 0` so is the
    loss. Takes logits (B, C, H, W) and class indices (B, H, W), long or uint8.

    Raises:
        UserError: the weights can't be known.
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
        """Local sums, float64 scalars: weighted `nll` times (1 - p)^gamma over valid pixels, and their `weight`."""
        labels = self.labels(targets)
        weights = self.pixel_weights(labels)
        # Adds nothing, so no atomics on GPUs.
        nll = F.cross_entropy(outputs, labels, ignore_index=self.num_classes, reduction="none")
        # 1 - p; not 0, where a root has an infinite slope.
        error = (-torch.expm1(-nll)).clamp(min=torch.finfo(nll.dtype).tiny)
        return {"nll": (weights * error**self.gamma * nll).sum(), "weight": weights.sum()}
