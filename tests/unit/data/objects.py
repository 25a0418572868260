"""Small images with boxes and masks, for tests."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from trainer.data.card import Card
from trainer.data.prepare import data_dir

SIZE = (12, 8)  # width and height


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Options as words; those that are None are left out."""
    return [
        str(word)
        for option, value in options.items()
        if value is not None
        for word in (f"--{option.replace('_', '-')}", value)
    ]


def picture(seed: int, format: str = "JPEG", size: tuple[int, int] = SIZE, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
        file, format, **options
    )
    return file.getvalue()


def save(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def stored(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of a prepared set."""
    card = Card.load(data_dir() / name)
    return [row for file in card.files(data_dir() / name, split) for row in pq.read_table(file).to_pylist()]


def by_image(name: str, split: str) -> dict[str, list[dict[str, Any]]]:
    """The objects of each image of a prepared set, by the name of its file without suffix."""
    return {Path(row["image"]["path"]).stem: row["objects"] for row in stored(name, split)}
