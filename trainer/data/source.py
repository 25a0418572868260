"""A data set before it is prepared: which archives it comes from and how they become rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

Role = Annotated[str, Field(pattern=r"^(image|mask|label|boxes|instances|array\[\d+(,\d+)*\])$")]
"""What a column holds: an encoded RGB image, an encoded one-channel index image, an integer, a list of `Instance`, one
of those with masks, or numbers in a fixed shape, e.g. `array[4]` or `array[3,8]`.
"""

Row = dict[str, Any]
"""One sample: encoded bytes for images and masks, an int for labels, a list for boxes and instances, numbers in their
shape for arrays; keys are column names.
"""


class Instance(NamedTuple):
    """One object in an image.

    Attributes:
        box: left, top, right, bottom in pixels.
        label: class index.
        mask: its pixels as the counts of COCO's compressed run-length encoding, at the size of the image; b"" where
            none are known.
        crowd: whether it is a group that can't be told apart: such objects aren't trained on, and predictions in them
            count neither way.
    """

    box: tuple[float, float, float, float]
    label: int
    mask: bytes = b""
    crowd: bool = False


@dataclass(frozen=True)
class DataInfo:
    """What tasks and models must know of a data set.

    Attributes:
        classes: names in the order of their index.
        ignore_index: the label that counts nowhere (255), or None.
        statistics: what was measured when the set was prepared (JSON), e.g. colour centres; empty before.
    """

    classes: tuple[str, ...]
    ignore_index: int | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        name: file name, looked up in the archives folder.
        urls: where it is downloaded from if it isn't there; tried in order.
        sha256: its checksum where one is known.
    """

    name: str
    urls: tuple[str, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """What a `@dataset` factory returns.

    Attributes:
        name: folder below `$TRAINER_DATA`.
        info: classes and ignored label.
        columns: role of each column; one called `mask` holds class indices.
        rows: given the local path of each archive, yields `(split, row)` for every sample, always the same
            rows in the same order; splits are those of `splits`.
        archives: what `rows` reads; none for generated sets.
        statistics: measures the set (JSON) for the card, given the path of each archive; `class_pixels` comes by
            itself.
        command: what follows `trainer prepare` to make the set; "" is its name alone.
        version: of the files it is read from where these are no archives; a set that was prepared from another one is
            made again.
        remedy: what to do about a row that can't be used.
        invalid: what becomes of an invalid object: the set is refused, or the object left out, which the card's notes
            say.
        splits: `train` and `validation`, and perhaps `test`, which no training reads.
        notes: lines for people, e.g. how the set is split; its card keeps them, and `trainer prepare` prints them.
        ignore_option: what tells the set to ignore a label, which replaces `{}`, e.g. `--ignore {}`; "" where nothing
            does.
    """

    name: str
    info: DataInfo
    columns: Mapping[str, Role]
    rows: Callable[[Mapping[str, Path]], Iterator[tuple[str, Row]]]
    archives: tuple[Archive, ...] = field(default=())
    statistics: Callable[[Mapping[str, Path]], dict[str, Any]] = field(default=lambda paths: {})
    command: str = ""
    version: str = ""
    remedy: str = "replace the archive it comes from"
    invalid: Literal["refuse", "drop"] = "refuse"
    splits: tuple[str, ...] = ("train", "validation")
    notes: tuple[str, ...] = ()
    ignore_option: str = ""


def in_validation(key: bytes, share: float) -> bool:
    """Whether a sample is one of the `share` that validate: drawn by a hash of `key`, so for ever,
    and whatever else is in the set.
    """
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < share * 2**64
