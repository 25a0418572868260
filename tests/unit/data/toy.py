"""A set of small random images and masks, for tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from trainer.data.card import Card
from trainer.data.images import encode_png
from trainer.data.prepare import prepare
from trainer.data.source import DataInfo, Role, Row, Source

SEGMENTATION: dict[str, Role] = {"image": "image", "mask": "mask"}


def picture(i: int, format: str = "PNG", size: tuple[int, int] = (6, 4), **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def mask(i: int, size: tuple[int, int] = (6, 4)) -> bytes:
    return encode_png(np.full((size[1], size[0]), i % 2, np.uint8))


def rows(train: int = 20, validation: int = 3) -> Iterator[tuple[str, Row]]:
    for i in range(train + validation):
        yield "train" if i < train else "validation", {"image": picture(i), "mask": mask(i)}


def source(make: Callable[[], Iterator[tuple[str, Row]]] = rows, columns: Mapping[str, Role] = SEGMENTATION) -> Source:
    return Source("toy", DataInfo(("no", "yes"), 255), columns, lambda archives: make(), notes=("Split by hand.",))


def one(row: Row, columns: Mapping[str, Role] = SEGMENTATION) -> Source:
    return source(lambda: iter([("train", row), ("validation", row)]), columns)


def read(folder: Path, split: str = "train") -> list[Row]:
    card = Card.load(folder)
    return [row for path in card.files(folder, split) for row in pq.read_table(path).to_pylist()]


def prepared_row(tmp_path: Path, row: Row, columns: Mapping[str, Role] = SEGMENTATION) -> Row:
    prepare(one(row, columns), tmp_path, None)
    return read(tmp_path / "toy")[0]


def masks(*values: list[int]) -> Callable[[], Iterator[tuple[str, Row]]]:
    """Training samples whose masks have one row each, the last one for validation."""

    def make() -> Iterator[tuple[str, Row]]:
        for i, row in enumerate(values):
            size = (len(row), 1)
            yield (
                "train" if i + 1 < len(values) else "validation",
                {"image": picture(i, size=size), "mask": encode_png(np.array([row], np.uint8))},
            )

    return make
