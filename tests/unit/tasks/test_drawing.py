"""Pictures that people can read: colours that differ, and names of boxes that stand out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.detection.boxes import Detections
from trainer.tasks.drawing import class_colors, draw_objects


def oklab(colors: list[tuple[int, int, int]]) -> Tensor:
    """Colours of sRGB in OKLab (Ottosson, "A perceptual color space for image processing", 2020), float64 (N, 3)."""
    rgb = torch.tensor(colors, dtype=torch.float64) / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
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
    found: Tensor = (linear @ torch.tensor(cones, dtype=torch.float64).T) ** (1 / 3) @ torch.tensor(
        opponents, dtype=torch.float64
    ).T
    return found


def luminance(color: tuple[int, ...]) -> float:
    """Relative, as WCAG 2 defines it."""
    rgb = torch.tensor(color, dtype=torch.float64) / 255
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))


@pytest.mark.parametrize(("num_classes", "bound"), [(12, 0.2), (21, 0.15), (40, 0.11)])
def test_colours_of_classes_differ_for_people(num_classes: int, bound: float) -> None:
    """Distances in OKLab; black and white are 1 apart."""
    colors = oklab(class_colors(num_classes))
    distances = torch.cdist(colors, colors) + torch.eye(num_classes)
    assert distances.min() > bound


def test_colours_are_always_the_same_and_the_first_is_a_dark_grey() -> None:
    assert class_colors(12) == class_colors(40)[:12]
    assert len(set(class_colors(255))) == 255
    (lightness, a, b), *others = oklab(class_colors(40)).tolist()
    assert lightness < 0.4 and (a**2 + b**2) ** 0.5 < 0.03
    assert all((a**2 + b**2) ** 0.5 > 0.05 for _, a, b in others), "greys are what is ignored"


def one_object(box: list[float], label: int = 0) -> Detections:
    return Detections(torch.tensor([box], dtype=torch.float32), torch.tensor([0.87]), torch.tensor([label]))


@pytest.mark.parametrize("label", range(12))
def test_names_of_boxes_contrast_with_their_background(label: int) -> None:
    classes = [f"class {number}" for number in range(12)]
    image = torch.full((3, 400, 600), 128, dtype=torch.uint8)
    drawn = draw_objects(image, one_object([100.0, 100, 300, 300], label), classes, with_scores=True)
    above = drawn[:, :99]
    changed = (above != 128).any(dim=0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    filled = above[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].flatten(1).T
    assert len(filled) == changed.sum(), "a rectangle without gaps"
    assert 12 <= rows.max() - rows.min() <= 40 and columns.min() >= 98
    colors, counts = filled.unique(dim=0, return_counts=True)
    background = tuple(colors[counts.argmax()].tolist())
    assert background == class_colors(13)[1 + label]
    text = max(
        (tuple(color) for color in colors.tolist()), key=lambda color: abs(luminance(color) - luminance(background))
    )
    dark, light = sorted((luminance(text), luminance(background)))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize(
    "box", [[0.0, 0, 40, 40], [560, 0, 600, 30], [590, 390, 600, 400], [0, 100, 3, 103], [0, 0, 600, 400]]
)
def test_names_stay_within_the_image(box: list[float]) -> None:
    """As many pixels of the background's colour as where there is room, but for those of the box."""
    image = torch.zeros(3, 400, 600, dtype=torch.uint8)
    names = ["a long name of a class"]
    color = torch.tensor(class_colors(2)[1], dtype=torch.uint8)[:, None, None]
    counts = []
    for corners in (box, [250.0, 250, 350, 350]):
        drawn = draw_objects(image, one_object(corners), names, with_scores=True)
        without_name = draw_objects(image, one_object(corners), [""], with_scores=False)
        counts.append(int(((drawn == color).all(0) & ~(without_name == color).all(0)).sum()))
    assert counts[0] >= 0.8 * counts[1] > 500
