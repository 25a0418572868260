"""The loss of Mask R-CNN, which torchvision's model computes itself."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.components import loss
from trainer.losses.loss import Loss


@loss(name="mask_rcnn", interface="mask_rcnn")
class MaskRCNNLoss(Loss):
    """The sum of torchvision's five terms: objectness and boxes of the proposals; classes, boxes and masks of the
    regions.

    Each is a mean over the anchors or regions that torchvision samples in the images of one process; the mean over
    processes is weighted by the number of images. So N processes compute what one computes, apart from the sampling
    and from the mask loss, which is a mean over a varying number of regions: those that show an object.
    """

    def forward(self, outputs: dict[str, Tensor], targets: int) -> dict[str, Tensor]:
        """Local sums, float64 scalars.

        Args:
            outputs: the means that the model returns in training: `loss_classifier`, `loss_box_reg`, `loss_mask`,
                `loss_objectness`, `loss_rpn_box_reg`.
            targets: number of images.

        Returns:
            Each term times the number of images, as `classifier_loss` …, and `images`.
        """
        sums = {f"{name.removeprefix('loss_')}_loss": value.double() * targets for name, value in outputs.items()}
        device = next(iter(outputs.values())).device
        return sums | {"images": torch.tensor(targets, dtype=torch.float64, device=device)}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each term over the images, and their sum as `loss`."""
        terms = {name: value / sums["images"].clamp(min=1) for name, value in sums.items() if name != "images"}
        return {"loss": torch.stack(list(terms.values())).sum()} | terms
