"""Whether the boxes and masks of a set can be those of their images; looked at once, when it is prepared."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trainer.data.source import DataInfo, Instance, Row, Source
from trainer.errors import UserError

ROUNDING = 1.0  # pixels by which a box may stick out of its image


def run_lengths(counts: bytes) -> list[int]:
    """Lengths of the runs of a compressed mask, down its columns: background and object in turn.

    A byte has 6 bits, counted from "0" on: 5 of the number, whose lowest come first, and one that says that more
    follow. From the fourth run on, the number is the difference to the run before the last. Source: COCO API,
    maskApi.c, rleFrString, which trusts what it reads.

    Raises:
        ValueError: these aren't such bytes.
    """
    if not re.fullmatch(rb"[0-o]*[0-O]", counts):
        raise ValueError("its mask is damaged, or there is none")
    runs: list[int] = []
    number = shift = 0
    for byte in counts:
        bits = byte - ord("0")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # the sign
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return runs


def _checked_object(given: Instance, info: DataInfo, size: tuple[int, int], has_mask: bool) -> Instance:
    """An object of an image with this width and height; what sticks out of it by rounding is cut off its box.

    Raises:
        ValueError: the object is invalid.
    """
    width, height = size
    left, top, right, bottom = given.box
    box = f"its box ({', '.join(f'{side:g}' for side in given.box)})"
    if not 0 <= given.label < info.num_classes:
        raise ValueError(f"its label {given.label} is no class; classes are 0 to {info.num_classes - 1}")
    if not np.isfinite(given.box).all():
        raise ValueError(f"{box} isn't finite")
    if left >= right or top >= bottom:
        raise ValueError(f"{box} has no area")
    inside = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if inside[0] >= inside[2] or inside[1] >= inside[3] or np.abs(np.subtract(inside, given.box)).max() > ROUNDING:
        raise ValueError(f"{box} is not within the image, {width} x {height}")
    if has_mask:
        runs = run_lengths(given.mask)
        if min(runs) < 0 or sum(runs) != width * height:
            raise ValueError(f"its mask is not one of {width} x {height} pixels")
        if not sum(runs[1::2]):
            raise ValueError("its mask has no pixels")
    return given._replace(box=inside)


def checked_objects(
    source: Source, objects: Sequence[Instance], size: tuple[int, int], place: str, has_masks: bool
) -> tuple[list[Row], list[str]]:
    """The objects of an image of this width and height as they are written, and what is wrong with those left out.

    Raises:
        UserError: an object is invalid, and the source refuses those.
    """
    checked: list[Row] = []
    dropped: list[str] = []
    for number, each in enumerate(objects, start=1):
        try:
            checked.append(_checked_object(each, source.info, size, has_masks)._asdict())
        except ValueError as error:
            if source.invalid == "refuse":
                raise UserError(f"{place}, object {number}: {error}; {source.remedy}") from error
            dropped.append(f"{place}, object {number}: {error}")
    return checked, dropped
