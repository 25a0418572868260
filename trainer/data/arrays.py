"""Columns of arrays, whose role is e.g. `array[4]` or `array[3,8]`: float32 numbers of that shape."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt


def shape_of(role: str) -> tuple[int, ...] | None:
    """The shape in an array's role; None for other roles."""
    match = re.fullmatch(r"array\[(\d+(?:,\d+)*)\]", role)
    return tuple(map(int, match[1].split(","))) if match else None


def arrow_type(datasets: Any, shape: tuple[int, ...]) -> Any:
    """The `datasets` feature of such a column: lists of a fixed length."""
    return datasets.List(datasets.Value("float32"), length=prod(shape))


def checked_array(value: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The numbers as stored: float32, flattened.

    Raises:
        ValueError: the value isn't numeric, has another shape, or isn't finite in float32.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"is not an array of numbers ({error})") from error
    if array.shape != shape:
        raise ValueError(f"has shape {array.shape} instead of {shape}")
    with np.errstate(over="ignore"):
        stored = array.astype(np.float32).reshape(-1)
    if not np.isfinite(stored).all():
        raise ValueError("contains nan or infinity")
    return stored
