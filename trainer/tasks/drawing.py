"""Colours of classes, and objects drawn over images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from trainer.detection.boxes import Detections
from trainer.tasks.task import Color

LEGIBLE = 384  # pixels: smaller images are enlarged, so that names fit in
MASK_OPACITY = 0.5


def class_colors(num_classes: int) -> list[Color]:
    """The RGB colours (0 to 255) of the classes, always the same ones: dark blue first, then hues by the golden angle."""
    colors = [(0.62, 0.75, 0.45)] + [((0.10 + 0.618034 * i) % 1, (0.85, 0.6)[i // 5 % 2], (1.0, 0.75)[i // 3 % 2]) for i in range(num_classes - 1)]
    return [(round(r * 255), round(g * 255), round(b * 255)) for r, g, b in (colorsys.hsv_to_rgb(*hsv) for hsv in colors[:num_classes])]


def draw_objects(image: Tensor, found: Detections, classes: Sequence[str], with_scores: bool) -> Tensor:
    """Draws boxes with names, and masks, over an image uint8 (3, H, W), which is enlarged by a whole factor where it is small.

    Boxes have the colours of their classes; masks have one colour for each object, from left to right.
    """
    factor = max(1, LEGIBLE // max(image.shape[1:]))
    canvas = image.cpu().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if not len(found.labels):
        return canvas
    order = found.boxes[:, [0, 2]].mean(dim=1).argsort().cpu()
    found = Detections(*(None if part is None else part.cpu()[order] for part in found))  # type: ignore[arg-type]
    if found.masks is not None:
        masks = found.masks.bool().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        canvas = draw_segmentation_masks(canvas, masks, MASK_OPACITY, class_colors(len(masks) + 1)[1:])
    labels, palette = found.labels.tolist(), class_colors(len(classes) + 1)[1:]
    names = [classes[label] + (f" {score:.2f}" if with_scores else "") for label, score in zip(labels, found.scores.tolist(), strict=True)]
    return draw_bounding_boxes(canvas, factor * found.boxes, names, [palette[label] for label in labels], width=2)
