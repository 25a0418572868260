"""The output of an anchor-based detector, the boxes that it decodes to, and the selection of detections.

Model, loss and task share these definitions: the model outputs `Level`s, the loss compares the boxes that they decode
to with `Targets`, and evaluation turns them into `Detections`.
Boxes are (left, top, right, bottom) in pixels of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

MAX_CANDIDATES = 5_000  # boxes of an image that enter the non-maximum suppression, whose cost is quadratic


class Level(NamedTuple):
    """One scale of a detector's output: a grid of H x W cells with A boxes each.

    Attributes:
        logits: (B, A, H, W, 5 + C): x, y, width, height, objectness, then the classes.
        anchors: (A, 2), width and height in pixels; sizes of boxes are relative to them.
        stride: pixels along the side of a cell.
    """

    logits: Tensor
    anchors: Tensor
    stride: int


class Targets(NamedTuple):
    """The true boxes of a whole batch, M in all.

    Attributes:
        boxes: float (M, 4).
        labels: int64 (M,), class indices.
        image_index: int64 (M,), the index of its image in the batch.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor


class Detections(NamedTuple):
    """The objects detected in one image, the best first.

    Attributes:
        boxes: float (D, 4); they may reach beyond the image.
        scores: float (D,) in [0, 1].
        labels: int64 (D,), class indices.
        masks: bool (D, H, W) at the size of the image, or None if only boxes are detected.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


def clip(detections: Detections, content: Tensor) -> Detections:
    """Clips boxes and masks at the borders of the image.

    Args:
        detections: in one image.
        content: float (4,), left, top, right and bottom of the image, which may be surrounded by padding.
    """
    low, high = content.view(2, 2).repeat(1, 2)
    masks = detections.masks
    if masks is not None:
        left, top, right, bottom = content.int().tolist()
        inside = torch.zeros_like(masks)
        inside[:, top:bottom, left:right] = masks[:, top:bottom, left:right]
        masks = inside
    return detections._replace(boxes=detections.boxes.clamp(low, high), masks=masks)


def decode(logits: Tensor, cells: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Decodes logits to boxes, as (centre x, centre y, width, height) in pixels.

    xy = (2 · sigmoid - 0.5 + cell) · stride, wh = (2 · sigmoid)² · anchor: a centre can lie up to half a cell outside
    its own cell, and a side is at most four times its anchor's. Leading dimensions are broadcast.

    Args:
        logits: (..., 4 or more): x, y, width, height, then others.
        cells: (..., 2): column and row.
        anchors: (..., 2): width and height in pixels.
        stride: pixels along the side of a cell.

    Returns:
        (..., 4).
    """
    centres = (2 * logits[..., :2].sigmoid() - 0.5 + cells) * stride
    sizes = (2 * logits[..., 2:4].sigmoid()) ** 2 * anchors
    return torch.cat([centres, sizes], dim=-1)


def decode_levels(levels: Sequence[Level]) -> tuple[Tensor, Tensor]:
    """All boxes (B, N, 4) and their scores (B, N, C): objectness times the probability of the class.

    With a single class the score is the objectness alone.
    """
    boxes, scores = [], []
    for logits, anchors, stride in levels:
        rows, columns = torch.meshgrid(
            *(torch.arange(size, device=logits.device) for size in logits.shape[2:4]), indexing="ij"
        )
        cells = torch.stack([columns, rows], dim=-1)
        decoded = decode(logits, cells, anchors[:, None, None], stride)
        objectness, classes = logits[..., 4:].sigmoid().tensor_split([1], dim=-1)
        boxes.append(box_convert(decoded, "cxcywh", "xyxy").flatten(1, 3))
        scores.append((objectness * classes if classes.shape[-1] > 1 else objectness).flatten(1, 3))
    return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)


@torch.no_grad()
def postprocess(
    levels: Sequence[Level], conf_threshold: float, iou_threshold: float, max_detections: int
) -> list[Detections]:
    """The detections in each image.

    A box is a candidate for each class whose score is above `conf_threshold`. Of boxes of one class that overlap, the
    best is kept (non-maximum suppression).

    Args:
        levels: a detector's output.
        conf_threshold: scores up to this one are dropped.
        iou_threshold: a box whose IoU with a better one of its class is above this is dropped.
        max_detections: at most this many are kept for an image.
    """
    detections = []
    # One by one: the result for an image must not depend on its neighbours.
    for boxes, scores in zip(*decode_levels(levels), strict=True):
        index, labels = (scores > conf_threshold).nonzero(as_tuple=True)
        values, order = scores[index, labels].sort(descending=True, stable=True)
        values, order = values[:MAX_CANDIDATES], order[:MAX_CANDIDATES]
        boxes, labels = boxes[index[order]], labels[order]
        kept = batched_nms(boxes, values, labels, iou_threshold)[:max_detections]
        detections.append(Detections(boxes[kept], values[kept], labels[kept]))
    return detections
