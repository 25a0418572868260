"""Generated shapes: a small segmentation set that needs neither an archive nor a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from trainer.components import dataset
from trainer.data.images import encode_png
from trainer.data.source import DataInfo, Row, Source

CLASSES = ("background", "circle", "square", "triangle")
IGNORE = 255
SIZE = 64
SPLITS = {"train": 1500, "validation": 151}  # a prime: no number of processes divides the validation set


@dataset(fields=("image", "mask"))
def shapes() -> Source:
    """Circles, squares and triangles of any colour on a noisy gradient; their outlines are ignored."""
    notes = ("Generated: sample i of a split is drawn from a seed of its own.",)
    return Source("shapes", DataInfo(CLASSES, IGNORE), {"image": "image", "mask": "mask"}, _rows, notes=notes)


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    for seed, (split, count) in enumerate(SPLITS.items()):
        for i in range(count):
            image, mask = draw(np.random.default_rng((seed, i)))
            yield split, {"image": encode_png(image), "mask": encode_png(mask)}


def draw(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws one sample: image uint8 (64, 64, 3) and mask uint8 (64, 64) of class indices and 255.

    Colours are independent of classes, and later shapes cover earlier ones.
    """
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    direction = generator.uniform(0, 2 * np.pi)
    ramp = (x * np.cos(direction) + y * np.sin(direction)) / SIZE
    ground = generator.uniform(60, 195, 3)
    image = ground + ramp[..., None] * generator.uniform(-60, 60, 3)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(generator.integers(1, 4)):
        index = int(generator.integers(1, len(CLASSES)))
        distance = _distance(index, x, y, generator)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # smooth edges
        image = image * (1 - coverage) + _contrasting(ground, generator) * coverage
        mask[distance < 0] = index
        mask[np.abs(distance) < 1] = IGNORE
    noise = generator.normal(0, 12, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), mask


def _distance(index: int, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Signed distance of every pixel to a shape of random size, place and angle; negative inside."""
    radius = generator.uniform(12, 20)
    centre = generator.uniform(radius, SIZE - radius, 2)
    angle = generator.uniform(0, 2 * np.pi)
    dx, dy = x - centre[0], y - centre[1]
    if CLASSES[index] == "circle":
        distance: np.ndarray = np.hypot(dx, dy) - 0.8 * radius
        return distance
    # A regular polygon is the intersection of the half-planes inside its sides.
    sides = {"square": 4, "triangle": 3}[CLASSES[index]]
    normals = angle + 2 * np.pi * np.arange(sides) / sides
    along = dx[..., None] * np.cos(normals) + dy[..., None] * np.sin(normals)
    distance = along.max(axis=-1) - radius * np.cos(np.pi / sides)
    return distance


def _contrasting(ground: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random colour that stands out from the background's."""
    while True:
        colour = generator.uniform(0, 255, 3)
        if np.abs(colour - ground).max() > 70:
            return colour
