"""The frequency baseline: the frequency of each class at each pixel of the training set, the same for every image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.components import Size, model
from trainer.errors import UserError

FLOOR = 1e-4
"""Added to every frequency, so that a class never seen at a pixel is improbable there, not impossible."""


class _Count(torch.autograd.Function):
    """Logits from counts; backwards, in place of a gradient, minus the number of times each class was true.

    The gradient of a cross entropy with respect to the logits, a positive multiple of softmax - one-hot, is negative at
    the true class and nowhere else; at ignored pixels it is zero. So its signs give the true classes, whatever scales
    it (the mean over pixels, class weights, the number of processes).
    """

    @staticmethod
    def forward(ctx: Any, counts: Tensor, batch_size: int) -> Tensor:
        frequencies = counts / counts.sum(0).clamp(min=torch.finfo(counts.dtype).tiny)
        return (frequencies + FLOOR).log().expand(batch_size, *counts.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -(gradient < 0).sum(0).to(gradient.dtype), None


@model(name="frequency", interface="dense")
class Frequency(nn.Module):
    """Images (B, 3, H, W) of one size to logits (B, C, H, W), which don't depend on the images.

    Its one parameter `counts` (C, H, W) is trained by one epoch of `{name: sgd, lr: 1, momentum: 0}` on `cross_entropy`
    or `focal`: each step adds the batch's classes, pixel by pixel. With N processes, DDP's mean divides all counts by
    N, which does not change the frequencies. Counts are exact up to 2^24 images, under bf16 autocast too, but not with
    fp16, whose scaler may change their unit during training.

    Args:
        num_classes: C.
        size: H and W, the size of the images.

    Raises:
        UserError: an image has another size.
    """

    def __init__(self, num_classes: int, /, *, size: Size) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(num_classes, *size))

    def forward(self, images: Tensor) -> Tensor:
        """The logarithms of the class frequencies; equal for all classes at pixels without counts."""
        expected, size = list(self.counts.shape[1:]), list(images.shape[2:])
        if size != expected:
            raise UserError(
                f"model.size is {expected}, but an image is {size}: make both equal, by data.resize={expected} or "
                f"model.size={size}"
            )
        logits: Tensor = _Count.apply(self.counts, images.shape[0])
        return logits
