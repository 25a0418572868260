"""Mask R-CNN (He et al., "Mask R-CNN", 2017) from torchvision, and a small one for CPUs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import (
    MaskRCNN,
    MaskRCNN_ResNet50_FPN_V2_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from trainer.components import model, weights_field
from trainer.models.weights import load_published

COCO_CLASSES = 91  # of the published weights, including background
ROI_SIZE = 7  # cells along the side of a region of interest, the input of the box head

Side = Annotated[int, Field(ge=32, le=4096)]


@model(interface="mask_rcnn")
def mask_rcnn(
    num_classes: int,
    /,
    *,
    backbone: Literal["resnet18", "resnet50", "resnet50_v2"] = "resnet50",
    min_size: Side = 800,
    max_size: Side = 1333,
    frozen_norm: bool = False,
    weights: Annotated[str, weights_field("coco")] = "none",
) -> MaskRCNN:
    """Builds a plain torchvision `MaskRCNN`, whose class 0 is the background; the classes of the set follow it.

    It takes a list of images float (3, H, W) in [0, 1], which it normalises and resizes, and in training a list of
    torchvision's targets. In training it returns torchvision's losses, otherwise the detections in each image. Boxes
    are float32 at least, under autocast too. The keys of the state dict are torchvision's; a file made from the
    published weights fits if `roi_heads.box_predictor` and `roi_heads.mask_predictor` are reset (`reset_layers`), with
    `frozen_norm: true` if it is for `resnet50`.

    Args:
        num_classes: of the set, without background.
        backbone: `resnet50` (44 million parameters), `resnet50_v2` (46 million: Li et al., "Benchmarking Detection
            Transfer Learning with Vision Transformers", 2021) or `resnet18` (12 million, and fewer regions; a CPU
            trains it).
        min_size: the shorter side of an image is resized to this many pixels,
        max_size: unless the longer one would then have more than this.
        frozen_norm: whether the batch norms of `resnet50` are frozen, and keep the statistics of the loaded weights.
        weights: `coco` for torchvision's weights, downloaded at first use, with new predictors and, as in torchvision,
            `frozen_norm` and a frozen stem and first group of blocks; `none` for random ones, and trainable batch
            norms. (A file is loaded into the model once it is built.)

    Raises:
        ConnectionError: the weights can't be downloaded, or the downloaded file is damaged.
        ValueError: the backbone has no such weights or norms.
    """
    if frozen_norm and backbone != "resnet50":
        raise ValueError(f"frozen_norm is for backbone resnet50; the batch norms of {backbone} are trainable")
    if backbone == "resnet18":
        if weights == "coco":
            raise ValueError(
                "there are no weights coco for backbone resnet18; set model.weights=none, or model.backbone=resnet50"
            )
        return _with_known_scales(_with_full_precision(_small(num_classes + 1, min_size, max_size)))
    if weights == "none":
        return _with_known_scales(
            _with_full_precision(_large(backbone, num_classes + 1, min_size, max_size, frozen_norm))
        )
    net = _large(backbone, COCO_CLASSES, min_size, max_size, frozen_norm=backbone == "resnet50")
    load_published(
        net, (MaskRCNN_ResNet50_FPN_Weights if backbone == "resnet50" else MaskRCNN_ResNet50_FPN_V2_Weights).COCO_V1
    )
    net.roi_heads.box_predictor = FastRCNNPredictor(1024, num_classes + 1)
    net.roi_heads.mask_predictor = MaskRCNNPredictor(256, 256, num_classes + 1)
    for name in ("conv1", "bn1", "layer1"):
        net.backbone.body[name].requires_grad_(False)
    return _with_known_scales(_with_full_precision(net))


def _large(backbone: str, num_outputs: int, min_size: int, max_size: int, frozen_norm: bool) -> MaskRCNN:
    sizes = {"min_size": min_size, "max_size": max_size}
    if not frozen_norm:
        build = maskrcnn_resnet50_fpn if backbone == "resnet50" else maskrcnn_resnet50_fpn_v2
        return build(weights=None, weights_backbone=None, num_classes=num_outputs, **sizes)
    net = MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5), num_outputs, **sizes
    )
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0  # as the published weights were trained
    return net


def _small(num_outputs: int, min_size: int, max_size: int) -> MaskRCNN:
    """A quarter of the channels above the trunk, anchors for images of about 256 pixels,
    and about a tenth of the regions.
    """
    trunk = resnet18(weights=None)
    del trunk.avgpool, trunk.fc
    levels = {f"layer{level}": str(level - 1) for level in (1, 2, 3, 4)}
    pyramid = BackboneWithFPN(trunk, levels, [64, 128, 256, 512], out_channels=64)
    return MaskRCNN(
        pyramid,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator([(side,) for side in (16, 32, 64, 128, 256)], [(0.5, 1.0, 2.0)] * 5),
        rpn_pre_nms_top_n_train=400,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=128,
        box_head=TwoMLPHead(64 * ROI_SIZE**2, 256),
        box_predictor=FastRCNNPredictor(256, num_outputs),
        box_batch_size_per_image=64,
        mask_head=MaskRCNNHeads(64, (64, 64, 64, 64), dilation=1),
        mask_predictor=MaskRCNNPredictor(64, 64, num_outputs),
    )


def _with_full_precision(net: MaskRCNN) -> MaskRCNN:
    """Keeps boxes and masks out of autocast: between 256 and 512 pixels, neighbouring bfloat16 values are 2 pixels
    apart.

    torchvision takes their dtype from what the heads return and, for anchors, from the feature maps.
    """
    for head in (net.rpn.head, net.roi_heads.box_predictor, net.roi_heads.mask_predictor):
        head.register_forward_hook(_widen_outputs)
    net.rpn.anchor_generator.register_forward_pre_hook(_without_values)
    return net


def _with_known_scales(net: MaskRCNN) -> MaskRCNN:
    """Fixes the scales of the feature maps that regions are read from.

    torchvision infers them from the first image that it sees, and wrongly where padding makes up much of it: what the
    model finds in an image would depend on which one a process saw first.
    """
    side, strides = 256, (4, 8, 16, 32)
    for pool in (net.roi_heads.box_roi_pool, net.roi_heads.mask_roi_pool):
        with torch.device("cpu"):  # also where the network is built without memory
            sides = [side // stride for stride in strides]
            maps = {name: torch.zeros(1, 1, each, each) for name, each in zip(pool.featmap_names, sides, strict=True)}
            pool(maps, [torch.zeros(1, 4)], [(side, side)])
    return net


def _widen_outputs(head: nn.Module, inputs: Any, outputs: Any) -> Any:
    return _widened(outputs)


def _widened(values: Any) -> Any:
    """Tensors, or tuples and lists of them, as float32 at least."""
    if isinstance(values, Tensor):
        return values.to(_wide(values))
    return type(values)(map(_widened, values))


def _without_values(anchor_generator: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Feature maps reduced to all that anchors depend on: the shape, the device and a dtype, float32 at least."""
    images, features = inputs
    return images, [feature.new_empty((), dtype=_wide(feature)).expand_as(feature) for feature in features]


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
