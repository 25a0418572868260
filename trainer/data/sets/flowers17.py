"""Oxford Flowers-17: flowers against background (Nilsback & Zisserman,
"A Visual Vocabulary for Flower Classification", CVPR 2006).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from trainer.components import dataset
from trainer.data.archives import Member, members
from trainer.data.images import encode_png, read_indices
from trainer.data.source import Archive, DataInfo, Row, Source
from trainer.errors import UserError

IMAGES, TRIMAPS = "17flowers.tgz", "trimaps.tgz"
HOST = "https://www.robots.ox.ac.uk/~vgg/data/flowers/17/"
IGNORE = 255
NOTES = (
    "Split: fixed and seeded, 80 % train and 20 % validation of each of the 17 species.",
    "Photographs that are in the set twice (found by a perceptual hash) are on one side.",
)
IMAGES_A_SPECIES = 80  # images are numbered species by species
VALIDATION_SHARE = 0.2
# Pairs of one photograph (the hash finds these too): kept in one split, so that validation measures generalisation.
DUPLICATES = ((1214, 1245), (1226, 1248))
HASH_SIDE = 16
# Of 256 bits, how many two hashes of one photograph may differ in. Measured: 48 pairs of re-encoded photographs differ
# in 0 to 24 bits, all other pairs in at least 62.
HASH_DISTANCE = 32

# Trimap index -> class: 1 flower; 2 leaves and grass, 3 background, 4 sky are background; 0 (unlabelled) and strays are
# ignored.
CLASS_OF_INDEX = np.full(256, IGNORE, np.uint8)
CLASS_OF_INDEX[[2, 3, 4]] = 0
CLASS_OF_INDEX[1] = 1


@dataset(fields=("image", "mask"))
def flowers17() -> Source:
    """The photographs that have a trimap, flower against background; the border bands of the trimaps are ignored."""
    archives = tuple(Archive(name, (HOST + name,)) for name in (IMAGES, TRIMAPS))
    info = DataInfo(("background", "flower"), IGNORE)
    return Source("flowers17", info, {"image": "image", "mask": "mask"}, _rows, archives, notes=NOTES)


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    trimaps = _trimaps(archives[TRIMAPS])
    images = {number: member for number, member in _numbered(members(archives[IMAGES], (".jpg",))) if number in trimaps}
    absent = sorted(set(trimaps) - set(images))
    if absent:
        raise UserError(
            f"{archives[IMAGES]} lacks images that have a trimap: {absent[:10]}; replace it with the official archive"
        )
    hashes = {number: _perceptual_hash(images[number]) for number in sorted(images)}
    validation = choose_validation(group_duplicates(hashes))
    for number in sorted(images, key=_draw):  # shuffled, since neighbours in a file are of one species
        name, data = trimaps[number]
        try:
            mask = CLASS_OF_INDEX[read_indices(data)]
        except Exception as error:  # decoders raise all kinds of errors on damaged data
            raise UserError(
                f"{archives[TRIMAPS]}: {name} can't be read as a trimap ({error}); replace it with the official archive"
            ) from error
        yield (
            "validation" if number in validation else "train",
            {"image": images[number], "mask": Member(name, encode_png(mask))},
        )


def _trimaps(archive: Path) -> dict[int, Member]:
    """The trimaps by image number: those listed in `imlist.txt`, or all if it is missing."""
    files = list(members(archive, (".png", "imlist.txt")))
    trimaps = dict(_numbered(files))
    listed = [member for member in files if member.name.endswith(".txt")]
    if not listed:
        return trimaps
    try:
        numbers = [int(word) for word in listed[0].data.split()]
        return {number: trimaps[number] for number in numbers}
    except ValueError as error:
        raise UserError(
            f"{archive}: {listed[0].name} must contain image numbers ({error}); replace it with the official archive"
        ) from error
    except KeyError as error:
        raise UserError(
            f"{archive}: {listed[0].name} lists image {error}, which has no trimap; replace it with the official "
            "archive"
        ) from error


def _numbered(files: Iterable[Member]) -> Iterator[tuple[int, Member]]:
    """Image numbers from names such as `jpg/image_0001.jpg`; skips other files."""
    for member in files:
        match = re.fullmatch(r"image_(\d{4})\.\w+", PurePosixPath(member.name).name)
        if match:
            yield int(match[1]), member


def _perceptual_hash(image: Member) -> np.ndarray:
    """Whether brightness increases from each pixel of a 17 x 16 thumbnail to its right neighbour: bool (256,), robust
    to re-encoding.

    Source: N. Krawetz, "Kind of Like That" (difference hash), 2013.
    """
    try:
        with Image.open(io.BytesIO(image.data)) as picture:
            # Decoding a JPEG at reduced size takes a fraction of the time.
            picture.draft("L", (4 * HASH_SIDE, 4 * HASH_SIDE))
            small = picture.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    except Exception as error:  # decoders raise all kinds of errors on damaged data
        raise UserError(
            f"{image.name} can't be decoded ({error}); replace {IMAGES} with the official archive"
        ) from error
    brightness = np.asarray(small, np.int16)
    return (np.diff(brightness, axis=1) > 0).ravel()


def group_duplicates(hashes: Mapping[int, np.ndarray]) -> list[list[int]]:
    """Groups the numbers of images of the same photograph; other images are groups of one. Groups are sorted."""
    group_of = {number: [number] for number in hashes}

    def join(first: int, second: int) -> None:
        if group_of[first] is not group_of[second]:
            group_of[first].extend(group_of[second])
            for number in group_of[second]:
                group_of[number] = group_of[first]

    numbers = np.array(list(hashes))
    bits = np.stack(list(hashes.values()))
    for number, own in hashes.items():
        distances = (bits != own).sum(axis=1)
        for other in numbers[distances <= HASH_DISTANCE]:
            join(number, int(other))
    for first, second in DUPLICATES:
        if first in group_of and second in group_of:
            join(first, second)
    return [sorted(group) for number, group in group_of.items() if number == min(group)]


def choose_validation(groups: Iterable[list[int]]) -> set[int]:
    """About a fifth of each species: groups in a fixed pseudo-random order, as long as they fit."""
    species: dict[int, list[list[int]]] = {}
    for group in groups:
        species.setdefault((group[0] - 1) // IMAGES_A_SPECIES, []).append(group)
    chosen: set[int] = set()
    for members_ in species.values():
        room = round(VALIDATION_SHARE * sum(map(len, members_)))
        for group in sorted(members_, key=lambda group: _draw(group[0])):
            if len(group) <= room:
                chosen.update(group)
                room -= len(group)
    return chosen


def _draw(number: int) -> bytes:
    """A pseudo-random key that never changes, on any machine and in any version."""
    return hashlib.sha256(f"flowers17 image {number}".encode()).digest()
