"""Penn-Fudan: pedestrians in the street, each with a mask (Wang, Shi, Song & Shen,
"Object Detection Combining Recognition and Segmentation", ACCV 2007).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from trainer.components import dataset
from trainer.data.archives import Member, members
from trainer.data.images import read_indices
from trainer.data.source import Archive, DataInfo, Instance, Row, Source
from trainer.errors import UserError

ARCHIVE = Archive("PennFudanPed.zip", ("https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip",))
NUM_VALIDATION = 50
# PNGImages/FudanPed00001.png, PedMasks/FudanPed00001_mask.png.
IMAGES, MASKS, OF_MASK = "PNGImages", "PedMasks", "_mask"
REMEDY = "replace it with the official archive"


@dataset(fields=("image", "boxes", "masks"))
def penn_fudan() -> Source:
    """All 170 images; boxes are the bounding boxes of the masks."""
    return Source(
        "penn_fudan",
        DataInfo(("pedestrian",)),
        {"image": "image", "objects": "instances"},
        _rows,
        (ARCHIVE,),
        notes=("Split: fixed, 50 images validate, drawn by a hash of the image's name, and 120 train.",),
    )


def _rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    archive = archives[ARCHIVE.name]
    images: dict[str, Member] = {}
    masks: dict[str, Member] = {}
    for member in members(archive, (".png",)):
        path = PurePosixPath(member.name)
        if path.parent.name == IMAGES:
            images[path.stem] = member
        elif path.parent.name == MASKS:
            masks[path.stem.removesuffix(OF_MASK)] = member
    if images.keys() != masks.keys():
        raise UserError(
            f"{archive} contains images without masks, or masks without images: "
            f"{sorted(images.keys() ^ masks.keys())[:10]}; {REMEDY}"
        )
    for place, name in enumerate(sorted(images, key=_draw)):
        yield (
            "validation" if place < NUM_VALIDATION else "train",
            {"image": images[name], "objects": _pedestrians(archive, masks[name])},
        )


def _pedestrians(archive: Path, mask: Member) -> list[Instance]:
    """One object for each of the values 1, 2, … in an index image."""
    import torch

    from trainer.detection.rle import encode_masks

    try:
        indices = read_indices(mask.data)
    except Exception as error:  # decoders raise all kinds of errors on damaged data
        raise UserError(f"{archive}: {mask.name} can't be read as a mask ({error}); {REMEDY}") from error
    values = np.unique(indices[indices > 0])
    pixels = indices == values[:, None, None]
    return [
        Instance(_box(each), 0, counts)
        for each, counts in zip(pixels, encode_masks(torch.from_numpy(pixels)), strict=True)
    ]


def _box(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the pixels of a mask (H, W)."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _draw(name: str) -> bytes:
    """A pseudo-random key that never changes, on any machine and in any version."""
    return hashlib.sha256(f"penn_fudan image {name}".encode()).digest()
