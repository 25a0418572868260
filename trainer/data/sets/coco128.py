"""The first 128 and the first 8 images of COCO with their boxes, as packaged by Ultralytics to try out a detector.

T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from trainer.components import dataset
from trainer.data.archives import Member, members
from trainer.data.sets.yolo import read_objects
from trainer.data.source import Archive, DataInfo, Role, Row, Source

HOST = "https://github.com/ultralytics/assets/releases/download/v0.0.0/"
COCO128, COCO8 = (Archive(name, (HOST + name,)) for name in ("coco128.zip", "coco8.zip"))
NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""
CLASSES = tuple(name.strip() for name in NAMES.split(","))
NOTES_OF_128 = (
    "Split: none. The set's own description, coco128.yaml, has all 128 images train and validate: what is measured is",
    "how well they are memorised. An image without a label file has no objects.",
)
COLUMNS: dict[str, Role] = {"image": "image", "objects": "boxes"}


@dataset(fields=("image", "boxes"))
def coco128() -> Source:
    """The first 128 images of COCO's training set, in its 80 classes."""
    return Source("coco128", DataInfo(CLASSES), COLUMNS, _rows_of_128, (COCO128,), notes=NOTES_OF_128)


@dataset(fields=("image", "boxes"))
def coco8() -> Source:
    """The first 8 images of COCO's training set, in its 80 classes."""
    notes = ("Split: the set's own, 4 images train and 4 validate.",)
    return Source("coco8", DataInfo(CLASSES), COLUMNS, _rows_of_8, (COCO8,), notes=notes)


def _rows_of_128(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    for split in ("train", "validation"):
        for _, row in _samples(archives[COCO128.name]):
            yield split, row


def _rows_of_8(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
    for folder, row in _samples(archives[COCO8.name]):
        yield {"train": "train", "val": "validation"}[folder], row


def _samples(archive: Path) -> Iterator[tuple[str, Row]]:
    """Folder and row of each image, such as coco8/images/val/000000000036.jpg, in the order of their names."""
    images: dict[tuple[str, str], Member] = {}
    labels: dict[tuple[str, str], Member] = {}
    for member in members(archive, (".jpg", ".txt")):
        path = PurePosixPath(member.name)
        kind = {"images": images, "labels": labels}.get(path.parts[-3] if len(path.parts) > 2 else "")
        if kind is not None:  # not a readme
            kind[path.parent.name, path.stem] = member
    for key in sorted(images):
        yield (
            key[0],
            {
                "image": images[key],
                "objects": read_objects(labels.get(key), images[key], f"replace {archive} with the official archive"),
            },
        )
