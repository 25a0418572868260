"""A data set before it is prepared: its archives, and how to read rows from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

Role = Annotated[str, Field(pattern=r"^(image|mask|label|boxes|instances|array\[\d+(,\d+)*\])$")]
"""The content of a column: an encoded RGB image, an encoded one-channel index image, an integer, a list of `Instance`
without or with masks, or numbers of a fixed shape, e.g. `array[4]` or `array[3,8]`.
"""

Row = dict[str, Any]
"""One sample, by column name: encoded bytes for images and masks, an int for labels, a list for boxes and instances,
numbers of the given shape for arrays.
"""


class Instance(NamedTuple):
    """One object in an image.

    Attributes:
        box: left, top, right, bottom in pixels.
        label: class index.
        mask: its pixels as the counts of COCO's compressed run-length encoding, at the size of the image; b"" if
            unknown.
        crowd: whether it is a group of indistinguishable objects: it is excluded from training, and predictions
            inside it count as neither right nor wrong.
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
        ignore_index: the label excluded from loss and metrics (usually 255), or None.
        statistics: measured when the set was prepared (JSON), e.g. colour centres; empty before.
    """

    classes: tuple[str, ...]
    ignore_index: int | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        name: file name, looked up in the archives folder.
        urls: where it is downloaded from if it isn't in the folder; tried in order.
        sha256: its checksum, if known.
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
        rows: takes the local path of each archive; yields `(split, row)` for every sample, always the same rows in
            the same order, with the splits in `splits`.
        archives: what `rows` reads; none for generated sets.
        statistics: takes the path of each archive; returns measurements for the card (JSON). `class_pixels` and
            `class_objects` are added automatically.
        command: the arguments of `trainer prepare` that make the set; "" stands for its name alone.
        version: of the files it is read from if these aren't archives; the set is prepared again when it changes.
        remedy: advice on a row that can't be used.
        invalid: how to handle invalid objects: refuse the set, or drop them and note it on the card.
        splits: `train` and `validation`, and optionally `test`, which training never reads.
        notes: lines for people, e.g. how the set is split; stored on its card and printed by `trainer prepare`.
        ignore_option: the option that makes the set ignore a label, with `{}` for the label, e.g. `--ignore {}`; ""
            if it has none.
    """

    name: str
    info: DataInfo
    columns: Mapping[str, Role]
    rows: Callable[[Mapping[str, Path]], Iterator[tuple[str, Row]]]
    archives: tuple[Archive, ...] = field(default=())
    statistics: Callable[[Mapping[str, Path]], dict[str, Any]] = field(default=lambda paths: {})
    command: str = ""
    version: str = ""
    remedy: str = "replace the archive that contains it"
    invalid: Literal["refuse", "drop"] = "refuse"
    splits: tuple[str, ...] = ("train", "validation")
    notes: tuple[str, ...] = ()
    ignore_option: str = ""


def in_validation(key: bytes, share: float) -> bool:
    """Whether a sample belongs to the `share` for validation: drawn by a hash of `key`, hence independent of the other
    samples and the same forever.
    """
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < share * 2**64
