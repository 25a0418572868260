"""Cross entropy: the mean over valid pixels of -log p(true class)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.components import loss
from trainer.losses.loss import Loss


@loss(name="cross_entropy", interface="dense")
class CrossEntropy(Loss):
    """Cross entropy of logits (B, C, H, W) against class indices (B, H, W), long or uint8.

    The mean is taken over all valid pixels of the micro-batch, not image by image; without one, the loss is 0.
    """

    def __init__(self, num_classes: int, ignore_index: int | None, /) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Local sums, float64 scalars: `nll` in nats over valid pixels, and their number, `pixels`."""
        classes = torch.arange(self.num_classes, dtype=targets.dtype, device=targets.device).view(1, -1, 1, 1)
        is_true = targets[:, None] == classes
        if self.ignore_index is not None:
            is_true &= (targets != self.ignore_index)[:, None]
        # A mask rather than nll_loss or gather: those scatter with atomics on GPUs, which isn't deterministic.
        nll = -torch.where(is_true, outputs.log_softmax(1), 0)
        return {"nll": nll.sum(dtype=torch.float64), "pixels": is_true.sum(dtype=torch.float64)}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean: `loss`."""
        return {"loss": sums["nll"] / sums["pixels"].clamp(min=1)}
