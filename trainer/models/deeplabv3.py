"""DeepLabV3 (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017) from torchvision."""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor, nn
from torchvision.models import segmentation

from trainer.components import model, weights_field
from trainer.models.weights import load_published

BACKBONES = {
    "resnet50": (segmentation.deeplabv3_resnet50, segmentation.DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1),
    "resnet101": (segmentation.deeplabv3_resnet101, segmentation.DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1),
    "mobilenet_v3_large": (
        segmentation.deeplabv3_mobilenet_v3_large,
        segmentation.DeepLabV3_MobileNet_V3_Large_Weights.COCO_WITH_VOC_LABELS_V1,
    ),
}
COCO_CLASSES = 21  # of the published weights: the 20 classes of Pascal VOC and background


class DeepLabV3(segmentation.DeepLabV3):  # type: ignore[misc]  # torchvision has no types
    """torchvision's DeepLabV3 without its auxiliary classifier; images (B, 3, H, W) to logits (B, C, H, W).

    The keys of the state dict are torchvision's: `backbone.…` and `classifier.…`; the last layer is `classifier.4`.
    """

    unused_layers = ("aux_classifier",)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits at the resolution of the images."""
        logits: Tensor = super().forward(images)["out"]
        return logits


@model(interface="dense")
def deeplabv3(
    num_classes: int,
    /,
    *,
    backbone: Literal["resnet50", "resnet101", "mobilenet_v3_large"] = "resnet101",
    weights: Annotated[str, weights_field("coco")] = "coco",
) -> nn.Module:
    """Builds DeepLabV3.

    Args:
        num_classes: channels of the logits.
        backbone: the trunk.
        weights: `coco` for torchvision's weights, downloaded at first use, with a new last layer `classifier.4`;
            `none` for random ones. (A file is loaded into the model once it is built.)

    Raises:
        ConnectionError: the weights can't be downloaded, or the downloaded file is damaged.
    """
    build, published = BACKBONES[backbone]
    if weights == "coco":
        net = build(weights=None, weights_backbone=None, num_classes=COCO_CLASSES, aux_loss=False)
        load_published(net, published, DeepLabV3.unused_layers)
        net.classifier[4] = nn.Conv2d(256, num_classes, kernel_size=1)
    else:
        net = build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False)
        for module in net.modules():
            # MobileNetV3's momentum of 0.01 is meant for very long trainings: within a few hundred steps the running
            # statistics don't converge, and a net that fits its training set predicts background in evaluation.
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
    return DeepLabV3(net.backbone, net.classifier)
