"""The loss of a deep watershed: the class of each pixel, and its depth inside its instance."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from trainer.components import loss
from trainer.detection.watershed import IGNORE, WatershedOutput, WatershedTargets
from trainer.losses.cross_entropy import CrossEntropy
from trainer.losses.loss import Loss


@loss(name="watershed", interface="watershed")
class WatershedLoss(Loss):
    """The weighted sum of two terms, each a mean over the pixels that are not ignored.

    - `semantic_loss`: cross entropy of background and the classes.
    - `distance_loss`: the absolute difference of the distances. (The squared one penalises too little if a model
      misses the narrow valleys between touching instances.)

    Takes a `WatershedOutput` and `WatershedTargets`. If all pixels are ignored, the loss is 0.

    Args:
        num_classes: C, without background.
        distance_weight: weight of the second term.
    """

    def __init__(self, num_classes: int, /, *, distance_weight: Annotated[float, Field(ge=0)] = 1.0) -> None:
        super().__init__()
        self.cross_entropy = CrossEntropy(num_classes + 1, IGNORE, {})
        self.distance_weight = distance_weight

    def forward(self, outputs: WatershedOutput, targets: WatershedTargets) -> dict[str, Tensor]:
        """Local sums, float64 scalars: `nll` in nats, `error` of the distances, and the number of pixels, `weight`."""
        sums: dict[str, Tensor] = self.cross_entropy(outputs.semantic, targets.semantic)
        error = torch.where(targets.semantic != IGNORE, (outputs.distance - targets.distance).abs(), 0)
        # Image by image first: summing in float64 alone takes several times as long.
        return sums | {"error": error.sum((1, 2)).double().sum()}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The two means and `loss`."""
        semantic = self.cross_entropy.combine(sums)["loss"]
        distance = sums["error"] / sums["weight"].clamp(min=1)
        return {
            "loss": semantic + self.distance_weight * distance,
            "semantic_loss": semantic,
            "distance_loss": distance,
        }
