"""Stanford Background: outdoor scenes in nine classes (Gould, Fulton & Koller, "Decomposing a Scene into Geometric and
Semantically Consistent Regions", ICCV 2009).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from trainer.components import dataset
from trainer.data.archives import Member, members
from trainer.data.images import encode_png
from trainer.data.source import Archive, DataInfo, Role, Row, Source, in_validation
from trainer.errors import UserError

ARCHIVE = Archive(
    "iccv09Data.tar.gz", tuple(f"{scheme}://dags.stanford.edu/data/iccv09Data.tar.gz" for scheme in ("https", "http"))
)
CLASSES = ("sky", "tree", "road", "grass", "water", "building", "mountain", "foreground", "misc")
UNKNOWN = -1  # in the label files; mapped to the ninth class
VALIDATION_SHARE = 0.2
IMAGE, LABELS = ".jpg", ".regions.txt"
REMEDY = "replace it with the official archive"
NOTES = (
    "Split: fixed, by a hash of the image's name: 80 % train and 20 % validation, give or take; an image stays where",
    "it is whatever others the archive holds. Byte-equal images are on one side.",
)


@dataset(fields=("image", "mask"))
def stanford_background() -> Source:
    """All images in the archive, 715 in the official one. Unlabelled pixels get the class `misc`; none is ignored."""
    columns: dict[str, Role] = {"image": "image", "mask": "mask"}
    return Source("stanford_background", DataInfo(CLASSES), columns, _rows, (ARCHIVE,), notes=NOTES)


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    archive = archives[ARCHIVE.name]
    images: dict[str, Member] = {}
    masks: dict[str, Member] = {}
    for member in members(archive, (IMAGE, LABELS)):
        number = PurePosixPath(member.name).name.partition(".")[0]
        if member.name.endswith(IMAGE):
            images[number] = member
        else:
            masks[number] = _mask(archive, member)
    if images.keys() != masks.keys():
        raise UserError(
            f"{archive} contains images without labels, or labels without images: "
            f"{sorted(images.keys() ^ masks.keys())[:10]}; {REMEDY}"
        )
    first: dict[bytes, str] = {}
    for number in sorted(images):
        first.setdefault(images[number].data, number)
    for number in sorted(images, key=_draw):  # shuffled, since neighbours in a file are similar scenes
        split = "validation" if in_validation(_draw(first[images[number].data]), VALIDATION_SHARE) else "train"
        yield split, {"image": images[number], "mask": masks[number]}


def _mask(archive: Path, labels: Member) -> Member:
    """Encodes a text file, with a line of labels for each row of pixels, as an index image."""
    try:
        indices = np.loadtxt(io.BytesIO(labels.data), np.int64, ndmin=2)
        if not indices.size or indices.min() < UNKNOWN or indices.max() > CLASSES.index("foreground"):
            raise ValueError("labels must be -1 to 7")
    except ValueError as error:
        raise UserError(f"{archive}: {labels.name} can't be read as labels ({error}); {REMEDY}") from error
    return Member(
        labels.name, encode_png(np.where(indices == UNKNOWN, CLASSES.index("misc"), indices).astype(np.uint8))
    )


def _draw(number: str) -> bytes:
    """A pseudo-random key that never changes, on any machine and in any version."""
    return hashlib.sha256(f"stanford_background image {number}".encode()).digest()
