"""A few noisy images with two classes: stands in for a recipe's data set in tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from trainer.components import dataset
from trainer.data.images import encode_png
from trainer.data.source import DataInfo, Row, Source


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    for index in range(11):
        random = np.random.default_rng(index)
        mask = random.integers(0, 2, (64, 64), dtype=np.uint8)
        yield (
            "train" if index < 8 else "validation",
            {"image": encode_png(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "mask": encode_png(mask)},
        )


@dataset(fields=("image", "mask", "colour_centres"))
def stand_in() -> Source:
    """Two classes, 8 + 3 images of 64 x 64."""
    centres = {"colour_centres": [[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]]}
    return Source(
        "stand_in",
        DataInfo(("background", "flower"), 255),
        {"image": "image", "mask": "mask"},
        _rows,
        statistics=lambda paths: centres,
    )
