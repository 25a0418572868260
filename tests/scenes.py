"""A data set of a few generated images with boxes and masks, of different sizes, for tests;
a recipe lists `tests.scenes` under `plugins`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from trainer.components import dataset
from trainer.data.images import encode_png
from trainer.data.source import DataInfo, Instance, Row, Source
from trainer.detection.rle import encode_masks

TRAIN, VALIDATION = 24, 7  # 7: no number of processes divides it
CLASSES = ("square", "disc", "nothing")
COLORS = ((230, 60, 40), (40, 90, 230))
_COMMON = """
plugins: [tests.scenes]
optimizer: {name: adamw, lr: 2e-3}
train: {duration: 9 steps, threads: 1, precision: fp32, log_every: 1 steps, clip_norm: 5}
checkpoint: {every: 4 steps}
"""
RECIPES = {
    "detection": """
task: {name: detection, conf_threshold: 1e-5}
data: {name: scenes, batch_size: 4, window: 3, workers: 0, resize: [64, 64], resize_mode: letterbox,
       augment: [mosaic, horizontal_flip]}
model: {name: yolo, size: n}
loss: yolo
evaluate: {every: 4 steps, best: map, batch_size: 4, pictures: 2}
"""
    + _COMMON,
    "watershed": """
task: watershed
data: {name: scenes, batch_size: 4, window: 3, workers: 0, resize: [56, 64], augment: [horizontal_flip]}
model: {name: watershed_unet, width: 8, depth: 3}
loss: watershed
evaluate: {every: 4 steps, best: mask_map, batch_size: 4, pictures: 2}
"""
    + _COMMON,
    "mask_rcnn": """
task: mask_rcnn
data: {name: scenes, batch_size: 4, window: 3, workers: 0, augment: [horizontal_flip]}
model: {name: mask_rcnn, backbone: resnet18, min_size: 32, max_size: 48}
loss: mask_rcnn
evaluate: {every: 4 steps, best: mask_map, batch_size: 4, pictures: 2}
"""
    + _COMMON,
}
"""A recipe for each task that looks for objects."""


def scene(index: int) -> tuple[np.ndarray, list[np.ndarray], list[int], list[bool]]:
    """The image, and the masks, classes and crowds of its objects; one image has none, and one has a crowd."""
    random = np.random.default_rng(index)
    height, width = random.integers(48, 72, 2).tolist()
    image = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    masks: list[np.ndarray] = []
    labels: list[int] = []
    for left in (2, 2 + width // 2) if index % 8 else ():
        side = int(random.integers(12, width // 2 - 2))
        top = int(random.integers(0, height - side))
        label = int(random.integers(2))
        mask = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        if label == 1:
            mask &= (rows - top - side / 2 + 0.5) ** 2 + (columns - left - side / 2 + 0.5) ** 2 <= side**2 / 4
        image[mask] = COLORS[label]
        masks.append(mask)
        labels.append(label)
    return image, masks, labels, [bool(index == TRAIN + 3 and number) for number in range(len(masks))]


def box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a mask (H, W)."""
    rows, columns = np.nonzero(mask)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    """Squares and discs on noise."""
    for index in range(TRAIN + VALIDATION):
        image, masks, labels, crowds = scene(index)
        counts = encode_masks(torch.from_numpy(np.stack(masks))) if masks else []
        objects = [
            Instance(box(mask), label, rle, crowd)
            for mask, label, rle, crowd in zip(masks, labels, counts, crowds, strict=True)
        ]
        yield "train" if index < TRAIN else "validation", {"image": encode_png(image), "objects": objects}


@dataset(fields=("image", "boxes", "masks"))
def scenes() -> Source:
    """Three classes, of which one is never there; 24 + 7 images."""
    return Source("scenes", DataInfo(CLASSES), {"image": "image", "objects": "instances"}, _rows)
