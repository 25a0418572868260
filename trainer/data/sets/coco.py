"""Images and a COCO file of instances of your own: `trainer prepare coco` makes a set of them, and recipes name it.

data: {name: coco, set: my_cells, batch_size: 4}

The format: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014;
https://cocodataset.org/#format-data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from trainer.components import dataset
from trainer.data.archives import Member
from trainer.data.files import File, image_files, refuse, size_of
from trainer.data.options import IMAGES, INVALID, NAME, VALIDATION, FilesCommand, Option, flag
from trainer.data.own_sets import REMEDY_OF_OBJECTS, names_a_set, prepared_set, source_of_files
from trainer.data.source import DataInfo, Instance, Role, Row, Source
from trainer.data.splits import Sample, share_of
from trainer.errors import UserError

COMMAND = FilesCommand(
    "coco",
    "images, and a COCO file of instances",
    {
        "name": NAME,
        "images": IMAGES,
        "annotations": Option("FILE", "a COCO file of instances (JSON)", Path, required=True),
        "validation": Option(
            "SHARE|FILE",
            f"share of the images that validate (default: {VALIDATION}), or a COCO file of those that do",
            default=VALIDATION,
        ),
        "validation_images": Option("DIR", "holds the images of --validation FILE, where --images doesn't", Path),
        "test": Option("FILE", "a COCO file of a third split, which no training reads"),
        "test_images": Option("DIR", "holds the images of --test FILE, where --images doesn't", Path),
        "invalid": INVALID,
    },
    "[--validation SHARE | --validation FILE [--validation-images DIR]] [--test FILE [--test-images DIR]] "
    "[--invalid refuse|drop]",
    "--name my_cells --images photos --annotations instances.json",
)
CORNERS = 3  # a polygon has at least
UNKNOWN = -1  # label of a category that the file doesn't list

Id = int | str


@dataset(fields=("image", "boxes", "masks"))
def coco(*, set: Annotated[str, names_a_set(COMMAND, "objects")]) -> Source:
    """What `trainer prepare coco --name SET` made, as its card describes it; a recipe can't make it again."""
    return prepared_set(set)


# ---------------------------------------------------------------- the file


@dataclass(frozen=True)
class _Image:
    id: Id
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class _Category:
    id: Id
    name: str


@dataclass(frozen=True)
class _Runs:
    size: tuple[int, int]  # height, width
    counts: str | list[Annotated[int, Field(ge=0, lt=2**32)]]


@dataclass(frozen=True)
class _Annotation:
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]  # left, top, width, height
    segmentation: list[list[FiniteFloat]] | _Runs | None = None  # polygons x1, y1, x2, y2, …, or run lengths
    iscrowd: bool = False


@dataclass(frozen=True)
class _Content:
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def _read(file: Path) -> _Content:
    try:
        content = TypeAdapter(_Content).validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{file} is no COCO file of instances: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    unique: dict[str, list[Id]] = {
        "images have the same id": [image.id for image in content.images],
        "categories have the same id": [category.id for category in content.categories],
        "categories have the same name": [category.name for category in content.categories],
    }
    for what, keys in unique.items():
        if len({*keys}) < len(keys):
            raise UserError(f"{file}: two {what}; give each its own")
    return content


# ---------------------------------------------------------------- making it


def from_coco(
    name: str,
    images: Path,
    annotations: Path,
    validation: str = VALIDATION,
    validation_images: Path | None = None,
    test: str | None = None,
    test_images: Path | None = None,
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Source:
    """The set of the images that a COCO file lists, with masks where each of its annotations has one, else with boxes
    only.

    Args:
        name: of the set.
        images: holds them, in this folder and below; a file is one that the COCO file lists where its path ends in
            `file_name`.
        annotations: the COCO file; the order of its categories is that of the classes.
        validation: the share of the images that validate; or a COCO file of those that do, with the same categories.
        validation_images: holds the images of that file, where `images` doesn't.
        test: a COCO file of the test split, with the same categories.
        test_images: holds the images of that file, where `images` doesn't.
        invalid: what becomes of invalid objects.

    Raises:
        UserError: one of these is invalid, an image isn't there, or is in more than one split.
    """
    files, folders = {"train": annotations}, {"train": images}
    for split, value, folder in (("validation", validation, validation_images), ("test", test, test_images)):
        if value is not None and share_of(value, split) is None:
            files[split], folders[split] = Path(value).resolve(), folder or images
        elif folder:
            raise UserError(
                f"{flag(f'{split}_images')} {folder} holds the images of a COCO file; name it by --{split} FILE"
            )
    contents = {split: _read(file) for split, file in files.items()}
    categories = contents["train"].categories
    for split, content in contents.items():
        if content.categories != categories:
            raise UserError(
                f"{annotations} and {files[split]} list other categories; they must be the same, in the same order"
            )
    if not categories:
        raise UserError(f"{annotations} lists no categories")
    labels = {category.id: label for label, category in enumerate(categories)}
    all_annotations = [annotation for content in contents.values() for annotation in content.annotations]
    without_mask = sum(not annotation.segmentation for annotation in all_annotations)
    role: Role = "boxes" if without_mask else "instances"

    def row(image: Member, described: tuple[_Image, list[_Annotation]]) -> Row:
        listed, found = described
        if (size := size_of(image, REMEDY_OF_OBJECTS)) != (listed.width, listed.height):
            raise UserError(
                f"{image.name} is {size[0]} x {size[1]}, but listed with {listed.width} x {listed.height}; correct it "
                "or take it away"
            )
        return {
            "image": image,
            "objects": [_instance(annotation, labels, size, role == "instances") for annotation in found],
        }

    below = {folder: image_files(folder) for folder in dict.fromkeys(folders.values())}
    samples = [
        sample
        for split, content in contents.items()
        for sample in _samples(split, files[split], content, folders[split], below[folders[split]].values())
    ]
    return source_of_files(
        "coco",
        {
            "name": name,
            "images": images,
            "annotations": annotations,
            "validation": files.get("validation", validation),
            "validation_images": validation_images,
            "test": files.get("test"),
            "test_images": test_images,
            "invalid": invalid,
        },
        DataInfo(tuple(category.name for category in categories)),
        {"image": "image", "objects": role},
        samples,
        row,
        read=[*(File(file, split) for split, file in files.items()), *(sample.image for sample in samples)],
        remedy=REMEDY_OF_OBJECTS,
        note=f"Boxes only: {without_mask} of {len(all_annotations)} annotations have no segmentation."
        if without_mask
        else "",
    )


def _samples(
    split: str, file: Path, content: _Content, images: Path, below: Iterable[File]
) -> list[Sample[tuple[_Image, list[_Annotation]]]]:
    """The images that a file lists, each with its annotations."""
    if not content.images:
        raise UserError(f"{file} lists no images")
    annotations: dict[Id, list[_Annotation]] = {image.id: [] for image in content.images}
    for place, annotation in enumerate(content.annotations):
        if annotation.image_id not in annotations:
            raise UserError(
                f"{file}: annotations.{place}.image_id: no image has the id {annotation.image_id!r}; correct it"
            )
        annotations[annotation.image_id].append(annotation)
    by_name: dict[str, list[File]] = {}
    for found in below:
        by_name.setdefault(found.path.name, []).append(found)
    samples, problems = [], []
    for image in content.images:
        path = PurePosixPath(image.file_name.replace("\\", "/"))
        matching = [found for found in by_name.get(path.name, []) if f"/{found.name}".endswith(f"/{path}")]
        if len(matching) == 1:
            samples.append(Sample(split, matching[0], (image, annotations[image.id])))
        else:
            problems.append(
                f"{path} {'matches ' + ' and '.join(found.name for found in matching) if matching else 'is missing'}"
            )
    refuse(f"{file} lists images that {images} must hold, once; of {len(problems)} this is not so:", problems)
    return samples


def _instance(annotation: _Annotation, labels: Mapping[Id, int], size: tuple[int, int], has_mask: bool) -> Instance:
    left, top, width, height = annotation.bbox
    mask = _counts(annotation.segmentation, *size) if has_mask else b""
    return Instance(
        (left, top, left + width, top + height), labels.get(annotation.category_id, UNKNOWN), mask, annotation.iscrowd
    )


def _counts(segmentation: list[list[float]] | _Runs | None, width: int, height: int) -> bytes:
    """The compressed run lengths of a mask; b"" where it has no polygon, or another size."""
    from trainer.detection.rle import codec

    if isinstance(segmentation, _Runs):
        if segmentation.size != (height, width):
            return b""
        if isinstance(segmentation.counts, str):
            return segmentation.counts.encode()
        runs: bytes = codec().frPyObjects({"size": segmentation.size, "counts": segmentation.counts}, height, width)[
            "counts"
        ]
        return runs
    corners = [
        np.reshape(polygon, (-1, 2))
        for polygon in segmentation or []
        if len(polygon) >= 2 * CORNERS and len(polygon) % 2 == 0
    ]
    # The memory that pycocotools takes for a polygon grows with its size, whatever that of the image is.
    polygons = [np.clip(each, 0, (width, height)).ravel().tolist() for each in corners]
    union: bytes = codec().merge(codec().frPyObjects(polygons, height, width))["counts"] if polygons else b""
    return union
