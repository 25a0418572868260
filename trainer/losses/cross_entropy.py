"""Cross entropy: the mean over valid pixels of -log p(true class)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        valid = torch.ones_like(targets, dtype=torch.bool) if self.ignore_index is None else targets != self.ignore_index
        if outputs.is_cuda and torch.are_deterministic_algorithms_enabled():
            nll = self._nll_without_scatter(outputs, targets, valid)
        else:
            ignored = -100 if self.ignore_index is None else self.ignore_index
            nll = F.cross_entropy(outputs, targets.long(), ignore_index=ignored, reduction="sum").double()
        return {"nll": nll, "pixels": valid.sum(dtype=torch.float64)}

    def _nll_without_scatter(self, outputs: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """The same sum by a mask; torch's own kernel for images is faster, but adds with atomics on GPUs."""
        classes = torch.arange(self.num_classes, dtype=targets.dtype, device=targets.device).view(1, -1, 1, 1)
        is_true = (targets[:, None] == classes) & valid[:, None]
        return -torch.where(is_true, outputs.log_softmax(1), 0).sum(dtype=torch.float64)

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean: `loss`."""
        return {"loss": sums["nll"] / sums["pixels"].clamp(min=1)}
