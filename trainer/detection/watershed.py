"""Deep watershed: instances as basins of a map of each pixel's distance to its instance's boundary.

After Bai & Urtasun, "Deep Watershed Transform for Instance Segmentation", 2017, without their network of directions:
one network outputs the class of each pixel and the distance. Where two instances touch, the distance drops to nearly 0,
so a watershed from the places deep inside separates them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes

from trainer.detection.boxes import Detections
from trainer.errors import UserError

IGNORE = 255  # the class of ignored pixels: padding and crowds
# With these values, the true maps of Penn-Fudan reproduce the true instances with a mask AP50 of 0.97, at 256 x 256
# pixels and at full size.
LIMIT = 8
"""Distance in pixels to the boundary at which the depth reaches its maximum."""
THRESHOLD = 0.3
"""Pixels deeper than this mark an instance."""
MIN_PIXELS = 64
"""The smallest instance, and the smallest marker."""


class WatershedOutput(NamedTuple):
    """The output of the network.

    Attributes:
        semantic: logits (B, C + 1, H, W), the background first.
        distance: (B, H, W), an estimate of `boundary_distance`, which may lie outside 0 to 1.
    """

    semantic: Tensor
    distance: Tensor


class WatershedTargets(NamedTuple):
    """The ground truth for it.

    Attributes:
        semantic: int64 (B, H, W): 0 for background, 1 + class index in an instance, `IGNORE` at ignored pixels.
        distance: float (B, H, W) in [0, 1], 0 in the background: see `boundary_distance`.
    """

    semantic: Tensor
    distance: Tensor


def boundary_distance(masks: Tensor, limit: int = LIMIT) -> Tensor:
    """The depth of each pixel inside its instance: 0 outside, 1 / limit at the boundary, 1 from `limit` pixels on.

    A pixel's depth is the number of erosions by a square of 3 x 3 pixels that removes it (chessboard distance to the
    nearest pixel outside). The border of the image is no boundary: an instance may continue beyond it.

    Args:
        masks: bool or uint8 (M, H, W).
        limit: pixels, above 0.

    Returns:
        float32 (M, H, W).
    """
    inside = masks[:, None].float()
    depth = inside.clone()
    for _ in range(limit - 1):
        inside = -F.max_pool2d(-inside, 3, stride=1, padding=1)
        depth += inside
    return depth[:, 0] / limit


def watershed_targets(
    masks: Tensor, labels: Tensor, crowd: Tensor, image_index: Tensor, height: Tensor, width: Tensor, limit: int = LIMIT
) -> WatershedTargets:
    """The targets of a batch of B padded images with M instances in all. If instances overlap, the last one is on
    top.

    Args:
        masks: uint8 (M, H, W), at the padded size.
        labels: int64 (M,), class indices without background.
        crowd: bool (M,), instances whose pixels are ignored.
        image_index: int64 (M,), the index of its image.
        height: int64 (B,), of the images without padding.
        width: int64 (B,), likewise.
        limit: see `boundary_distance`.
    """
    rows, columns = (torch.arange(size, device=masks.device) for size in masks.shape[1:])
    padding = (rows[:, None] >= height.view(-1, 1, 1)) | (columns >= width.view(-1, 1, 1))
    semantic = torch.where(padding, IGNORE, 0)
    distance = torch.zeros(semantic.shape, device=masks.device)
    values = torch.where(crowd, IGNORE, labels + 1)
    for mask, value, depth, image in zip(
        masks.bool(), values, boundary_distance(masks, limit), image_index.tolist(), strict=True
    ):
        semantic[image] = torch.where(mask, value, semantic[image])
        distance[image] = torch.where(mask, depth, distance[image])
    return WatershedTargets(semantic, distance)


@torch.no_grad()
def instances(
    probabilities: Tensor, distance: Tensor, threshold: float = THRESHOLD, min_pixels: int = MIN_PIXELS
) -> Detections:
    """The instances of one image, by a watershed from markers (Meyer, 1991).

    In the foreground some class is more likely than the background. Each connected part of it that is deeper than
    `threshold` is a marker, unless it is small: an arm or a leg is deep in places, but no instance of its own. Markers
    grow to the watersheds of the distance. A part of the foreground without a marker, small or thin, is one instance.
    An instance has the class of most of its pixels, and its score is the mean probability that these are foreground.

    Args:
        probabilities: float (C + 1, H, W), of background and the C classes.
        distance: float (H, W), about 0 to 1: see `boundary_distance`.
        threshold: between 0 and 1; a lower one joins touching instances, a higher one splits instances with narrow
            places.
        min_pixels: smaller parts of an instance are no markers, and smaller instances are dropped.

    Returns:
        The instances on the CPU, with masks; boxes end after the last pixel.

    Raises:
        UserError: scikit-image isn't installed.
    """
    try:
        from skimage.measure import label
        from skimage.segmentation import watershed
    except ImportError:
        raise UserError("deep watershed needs scikit-image: pip install 'recipe-trainer[detection]'") from None

    classes = probabilities.max(dim=0).indices.cpu().numpy()
    depth = distance.float().cpu().numpy()
    foreground = classes > 0
    markers, parts = label(foreground & (depth > threshold)), label(foreground)
    markers[np.bincount(markers.ravel())[markers] < min_pixels] = 0
    unmarked = foreground & ~np.isin(parts, parts[markers > 0])
    regions = watershed(-depth, np.where(unmarked, markers.max() + parts, markers), mask=foreground, connectivity=2)

    numbers, pixels = np.unique(regions[foreground], return_counts=True)
    masks = torch.from_numpy(regions == numbers[pixels >= min_pixels, None, None])
    certainty = 1 - probabilities[0].float().cpu()
    scores = torch.tensor([certainty[mask].mean() for mask in masks])
    labels = torch.tensor([np.bincount(classes[mask]).argmax() - 1 for mask in masks.numpy()], dtype=torch.int64)
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    order = scores.argsort(descending=True, stable=True)
    return Detections(boxes[order], scores[order], labels[order], masks[order])
