"""COCO instance files, and their masks as compressed run lengths.

The format: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014;
https://cocodataset.org/#format-data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from trainer.errors import UserError

CORNERS = 3  # minimum of a polygon

Id = int | str


@dataclass(frozen=True)
class ListedImage:
    """An image listed in the file."""

    id: Id
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class Category:
    """A class."""

    id: Id
    name: str


@dataclass(frozen=True)
class RunLengths:
    """A mask as run lengths: compressed (str) or plain numbers."""

    size: tuple[int, int]  # height, width
    counts: str | list[Annotated[int, Field(ge=0, lt=2**32)]]


@dataclass(frozen=True)
class Annotation:
    """An object in an image."""

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]  # left, top, width, height
    segmentation: list[list[FiniteFloat]] | RunLengths | None = None  # polygons x1, y1, x2, y2, …, or run lengths
    iscrowd: bool = False


@dataclass(frozen=True)
class Content:
    """The content of a COCO instance file."""

    images: list[ListedImage]
    annotations: list[Annotation]
    categories: list[Category]


def read_coco(file: Path) -> Content:
    """Reads a COCO instance file.

    Raises:
        UserError: the file can't be read or is invalid.
    """
    try:
        content = TypeAdapter(Content).validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{file} is not a COCO instance file: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    unique: dict[str, list[Id]] = {
        "images have the same id": [image.id for image in content.images],
        "categories have the same id": [category.id for category in content.categories],
        "categories have the same name": [category.name for category in content.categories],
    }
    for what, keys in unique.items():
        if len({*keys}) < len(keys):
            raise UserError(f"{file}: two {what}; make them unique")
    return content


def compressed_mask(segmentation: list[list[float]] | RunLengths | None, width: int, height: int) -> bytes:
    """The compressed run lengths of a mask; b"" if it has no polygon, or another size."""
    from trainer.detection.rle import codec

    if isinstance(segmentation, RunLengths):
        if segmentation.size != (height, width):
            return b""
        if isinstance(segmentation.counts, str):
            return segmentation.counts.encode()
        runs: bytes = codec().frPyObjects({"size": segmentation.size, "counts": segmentation.counts}, height, width)[
            "counts"
        ]
        return runs
    corners = [
        np.reshape(polygon, (-1, 2))
        for polygon in segmentation or []
        if len(polygon) >= 2 * CORNERS and len(polygon) % 2 == 0
    ]
    # Clipped to the image, since the memory pycocotools needs grows with the size of the polygon.
    polygons = [np.clip(each, 0, (width, height)).ravel().tolist() for each in corners]
    union: bytes = codec().merge(codec().frPyObjects(polygons, height, width))["counts"] if polygons else b""
    return union
