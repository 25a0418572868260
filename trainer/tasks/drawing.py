"""Colours of classes, and objects drawn over images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from trainer.detection.boxes import Detections
from trainer.tasks.task import Color

LEGIBLE = 384  # pixels: smaller images are enlarged to make room for names
MASK_OPACITY = 0.5
CLASS_OPACITY = 0.65  # of the colours of classes over the image
STRIPES = ((70, 70, 70), (200, 200, 200))  # of ignored pixels
STRIPE_WIDTH = 4  # pixels along a row
MIN_TEXT, TEXT_SHARE = 12, 48  # height of a name in pixels: at least the first, or the longer side over the second
MARGIN = 2  # pixels around a name
BACKGROUND, BLACK, WHITE = (52, 56, 70), (0, 0, 0), (255, 255, 255)
LEVELS = 16  # of red, green and blue among the candidate colours
MIN_CHROMA = 0.08  # in OKLab: ignored pixels are grey
DARK = 0.18  # up to this luminance white stands out more than black


def class_colors(num_classes: int) -> list[Color]:
    """The RGB colours (0 to 255) of the classes, always the same: a dark grey first, then each as far as possible from
    those before it.
    """
    return list(_palette(num_classes))


@cache
def _palette(num_colors: int) -> tuple[Color, ...]:
    """Farthest-point selection in OKLab (Ottosson, "A perceptual color space for image processing", 2020)."""
    steps = torch.linspace(0, 255, LEVELS, dtype=torch.float64)
    candidates = torch.cartesian_prod(steps, steps, steps)
    places = _oklab(candidates)
    colorful = places[:, 1:].norm(dim=1) > MIN_CHROMA
    candidates, places = candidates[colorful], places[colorful]
    taken = _oklab(torch.tensor([BACKGROUND, BLACK, WHITE], dtype=torch.float64))
    distances = (places[:, None] - taken).norm(dim=2).amin(dim=1)
    colors: list[Color] = [BACKGROUND]
    while len(colors) < num_colors:
        farthest = int(distances.argmax())
        red, green, blue = candidates[farthest].round().int().tolist()
        colors.append((red, green, blue))
        distances = torch.minimum(distances, (places - places[farthest]).norm(dim=1))
    return tuple(colors[:num_colors])


def _linear(rgb: Tensor) -> Tensor:
    """Intensities of sRGB colours float64 (…, 3), 0 to 255."""
    share = rgb / 255
    return torch.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def _oklab(rgb: Tensor) -> Tensor:
    """Lightness, green to red, and blue to yellow, of sRGB colours float64 (N, 3)."""
    cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    opponents = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return (_linear(rgb) @ rgb.new_tensor(cones).T) ** (1 / 3) @ rgb.new_tensor(opponents).T


def paint_classes(image: Tensor, labels: Tensor, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """Blends the colours of the classes over images; ignored pixels are striped.

    Args:
        image: uint8 (B, 3, H, W).
        labels: class indices (B, H, W).
        num_classes: how many classes there are.
        ignore_index: the label of ignored pixels, or None.

    Returns:
        uint8 (B, 3, H, W).
    """
    palette = torch.tensor(class_colors(num_classes), dtype=torch.float32, device=image.device)
    ignored = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    colors = palette[torch.where(ignored, 0, labels).long()]
    rows, columns = (torch.arange(size, device=image.device) for size in labels.shape[-2:])
    stripe = (rows[:, None] + columns) // STRIPE_WIDTH % len(STRIPES)
    stripes = torch.tensor(STRIPES, dtype=torch.float32, device=image.device)[stripe]
    colors = torch.where(ignored[..., None], stripes, colors).movedim(-1, 1)
    return (CLASS_OPACITY * colors + (1 - CLASS_OPACITY) * image).round().to(torch.uint8)


def draw_objects(image: Tensor, objects: Detections, classes: Sequence[str], with_scores: bool) -> Tensor:
    """Draws boxes with names, and masks, over an image uint8 (3, H, W), which is enlarged by a whole factor where it is
    small.

    Boxes have the colours of their classes; masks have one colour for each object, from left to right.
    """
    factor = max(1, LEGIBLE // max(image.shape[1:]))
    canvas = image.cpu().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    if not len(objects.labels):
        return canvas
    order = objects.boxes[:, [0, 2]].mean(dim=1).argsort().cpu()
    objects = Detections(*(None if part is None else part.cpu()[order] for part in objects))  # type: ignore[arg-type]
    if objects.masks is not None:
        masks = objects.masks.bool().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        canvas = draw_segmentation_masks(canvas, masks, MASK_OPACITY, class_colors(len(masks) + 1)[1:])
    labels, palette = objects.labels.tolist(), class_colors(len(classes) + 1)[1:]
    names = [
        classes[label] + (f" {score:.2f}" if with_scores else "")
        for label, score in zip(labels, objects.scores.tolist(), strict=True)
    ]
    colors = [palette[label] for label in labels]
    boxes = factor * objects.boxes
    drawing = to_pil_image(draw_bounding_boxes(canvas, boxes, colors=colors, width=2))
    for name, color, (left, top, *_) in zip(names, colors, boxes.int().tolist(), strict=True):
        _write(drawing, name, color, left, top)
    drawn: Tensor = pil_to_tensor(drawing)
    return drawn


def _write(drawing: Image.Image, text: str, background: Color, x: int, y: int) -> None:
    """Writes on a filled rectangle whose lower left corner is (x, y), or as close to it as the image permits."""
    draw, font = ImageDraw.Draw(drawing), ImageFont.load_default(max(MIN_TEXT, max(drawing.size) // TEXT_SHARE))
    width, height = (int(side) + 2 * MARGIN for side in draw.textbbox((0, 0), text, font=font)[2:])
    x, y = max(0, min(x, drawing.width - width)), max(0, y - height)
    is_dark = (
        _linear(torch.tensor(background, dtype=torch.float64))
        @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
        < DARK
    )
    draw.rectangle((x, y, x + width - 1, y + height - 1), background)
    draw.text((x + MARGIN, y + MARGIN), text, WHITE if is_dark else BLACK, font)
