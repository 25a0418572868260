"""A data set of a few generated 24 x 24 images, for tests; a recipe lists this file under `plugins`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from trainer.components import dataset
from trainer.data.images import encode_png
from trainer.data.source import DataInfo, Row, Source

TRAIN, VALIDATION = 52, 13  # 13: no number of processes divides it
SIDE = 24


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    """Bright squares on noise."""
    for index in range(TRAIN + VALIDATION):
        random = np.random.default_rng(index)
        image = random.integers(0, 128, (SIDE, SIDE, 3), dtype=np.uint8)
        mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
        top, left = random.integers(0, SIDE - 10, 2)
        image[top : top + 10, left : left + 10] += 100
        mask[top : top + 10, left : left + 10] = 1
        mask[:, 0] = 255
        yield "train" if index < TRAIN else "validation", {"image": encode_png(image), "mask": encode_png(mask)}


@dataset(fields=("image", "mask"))
def tiny() -> Source:
    """Two classes, 52 + 13 images."""
    return Source("tiny", DataInfo(("background", "square"), 255), {"image": "image", "mask": "mask"}, _rows)
