"""Dice loss: one minus the overlap of predicted and true areas, averaged over the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.components import loss
from trainer.losses.loss import Loss


@loss(name="dice", interface="dense")
class Dice(Loss):
    """The mean over classes of 1 - 2 Σ X·Y / Σ (X + Y), over the valid pixels of the whole micro-batch.

    X is the softmax probability of the class and Y is 1 where it is true, else 0 (Milletari et al., "V-Net", 2016; they
    square X and Y in the denominator, which is here that of Sudre et al., "Generalised Dice Overlap", 2017). The mean
    is over the classes that occur in the micro-batch: one that does not occur has nothing to overlap with, and
    predicting it reduces the overlap of those that do. Takes logits (B, C, H, W) and class indices (B, H, W), long or
    uint8. Without a valid pixel the loss is 0.
    """

    def __init__(self, num_classes: int, ignore_index: int | None, /) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Local sums in pixels, float64 (C,): `overlap` Σ X·Y, `predicted` Σ X and `true` Σ Y of each class."""
        classes = torch.arange(self.num_classes, dtype=targets.dtype, device=targets.device).view(1, -1, 1, 1)
        predicted = outputs.softmax(1)
        true = (targets[:, None] == classes).to(predicted.dtype)
        if self.ignore_index is not None:
            valid = (targets != self.ignore_index)[:, None]
            predicted, true = predicted * valid, true * valid
        areas = {"overlap": predicted * true, "predicted": predicted, "true": true}
        # Image by image first: summing in float64 alone takes several times as long.
        return {name: area.sum((2, 3)).double().sum(0) for name, area in areas.items()}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over classes with a true pixel: `loss`."""
        occurs = sums["true"] > 0
        terms = 1 - 2 * sums["overlap"] / torch.where(occurs, sums["predicted"] + sums["true"], 1)
        return {"loss": torch.where(occurs, terms, 0).sum() / occurs.sum().clamp(min=1)}
