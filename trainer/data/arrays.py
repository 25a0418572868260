"""The role `array[4]` or `array[3,8]` of a column: float32 numbers in this shape, for samples that are no images."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt


def shape_of(role: str) -> tuple[int, ...] | None:
    """The shape that an array's role states; None for other roles."""
    match = re.fullmatch(r"array\[(\d+(?:,\d+)*)\]", role)
    return tuple(map(int, match[1].split(","))) if match else None


def arrow_type(datasets: Any, shape: tuple[int, ...]) -> Any:
    """The feature that the module `datasets` has for such a column: lists of one length."""
    return datasets.List(datasets.Value("float32"), length=prod(shape))


def checked_array(value: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The numbers as they are stored: float32, in a row.

    Raises:
        ValueError: these are no numbers, have another shape, or aren't finite in float32.
    """
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"no array of numbers ({error})") from error
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape} instead of {shape}")
    with np.errstate(over="ignore"):
        stored = array.astype(np.float32).reshape(-1)
    if not np.isfinite(stored).all():
        raise ValueError("an array that holds nan or infinity")
    return stored
