"""Checks once, when a set is prepared, that boxes and masks are valid for their images."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from trainer.data.source import DataInfo, Instance, Row, Source
from trainer.errors import UserError

ROUNDING = 1.0  # pixels by which a box may extend beyond its image


def run_lengths(counts: bytes) -> list[int]:
    """Run lengths of a compressed mask, down its columns: background and object alternate.

    A byte encodes 6 bits, offset by "0": 5 bits of the number, lowest first, and one that is set if more follow. From
    the fourth run on, the number is the difference to the run two before it. Source: COCO API, maskApi.c, rleFrString,
    which does not validate its input.

    Raises:
        ValueError: the bytes are no such mask.
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


def _checked_object(instance: Instance, info: DataInfo, size: tuple[int, int], has_mask: bool) -> Instance:
    """Checks an object of an image with this width and height; clips its box if it extends beyond by rounding.

    Raises:
        ValueError: the object is invalid.
    """
    width, height = size
    left, top, right, bottom = instance.box
    box = f"its box ({', '.join(f'{side:g}' for side in instance.box)})"
    if not 0 <= instance.label < info.num_classes:
        raise ValueError(f"its label {instance.label} is no class; classes are 0 to {info.num_classes - 1}")
    if not np.isfinite(instance.box).all():
        raise ValueError(f"{box} isn't finite")
    if left >= right or top >= bottom:
        raise ValueError(f"{box} has no area")
    inside = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if inside[0] >= inside[2] or inside[1] >= inside[3] or np.abs(np.subtract(inside, instance.box)).max() > ROUNDING:
        raise ValueError(f"{box} is not within the image, {width} x {height}")
    if has_mask:
        runs = run_lengths(instance.mask)
        if min(runs) < 0 or sum(runs) != width * height:
            raise ValueError(f"its mask is not one of {width} x {height} pixels")
        if not sum(runs[1::2]):
            raise ValueError("its mask has no pixels")
    return instance._replace(box=inside)


def checked_objects(
    source: Source, objects: Sequence[Instance], size: tuple[int, int], place: str, has_masks: bool
) -> tuple[list[Row], list[str]]:
    """The objects of an image of this width and height as stored, and what is wrong with each one dropped.

    Raises:
        UserError: an object is invalid, and the source refuses invalid objects.
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
