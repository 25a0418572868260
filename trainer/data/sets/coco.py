"""Images and a COCO file of instances of your own: `trainer prepare coco` makes a set of them, and recipes name it.

data: {name: coco, set: my_cells, batch_size: 4}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from trainer.components import dataset
from trainer.data.archives import Member
from trainer.data.coco_file import Annotation, Category, Content, Id, ListedImage, compressed_mask, read_coco
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
    "trainer prepare coco --name my_cells --images photos --annotations instances.json",
    "data: {name: coco, set: my_cells, batch_size: 4}",
)
UNKNOWN = -1  # label of a category that the file doesn't list

Described = tuple[ListedImage, list[Annotation]]
"""An image as the file lists it, and its annotations."""


@dataset(fields=("image", "boxes", "masks"))
def coco(*, set: Annotated[str, names_a_set(COMMAND, "objects")]) -> Source:
    """What `trainer prepare coco --name SET` made, as its card describes it; a recipe can't make it again.

    Args:
        set: its name, the SET of that command.
    """
    return prepared_set(set)


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
    contents = {split: read_coco(file) for split, file in files.items()}
    categories = _categories(files, contents)
    has_mask = [bool(each.segmentation) for content in contents.values() for each in content.annotations]
    role: Role = "instances" if all(has_mask) else "boxes"
    note = f"Boxes only: {has_mask.count(False)} of {len(has_mask)} annotations have no segmentation."
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
        partial(_row, {category.id: label for label, category in enumerate(categories)}, role == "instances"),
        read=[*(File(file, split) for split, file in files.items()), *(sample.image for sample in samples)],
        remedy=REMEDY_OF_OBJECTS,
        note="" if all(has_mask) else note,
    )


def _categories(files: Mapping[str, Path], contents: Mapping[str, Content]) -> list[Category]:
    """The categories, which are those of every split."""
    categories = contents["train"].categories
    for split, content in contents.items():
        if content.categories != categories:
            raise UserError(
                f"{files['train']} and {files[split]} list other categories; they must be the same, in the same order"
            )
    if not categories:
        raise UserError(f"{files['train']} lists no categories")
    return categories


def _row(labels: Mapping[Id, int], has_masks: bool, image: Member, described: Described) -> Row:
    listed, annotations = described
    if (size := size_of(image, REMEDY_OF_OBJECTS)) != (listed.width, listed.height):
        raise UserError(
            f"{image.name} is {size[0]} x {size[1]}, but listed with {listed.width} x {listed.height}; correct it or "
            "take it away"
        )
    return {"image": image, "objects": [_instance(each, labels, size, has_masks) for each in annotations]}


def _samples(split: str, file: Path, content: Content, images: Path, below: Iterable[File]) -> list[Sample[Described]]:
    """The images that a file lists, each with its annotations."""
    if not content.images:
        raise UserError(f"{file} lists no images")
    annotations: dict[Id, list[Annotation]] = {image.id: [] for image in content.images}
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


def _instance(annotation: Annotation, labels: Mapping[Id, int], size: tuple[int, int], has_mask: bool) -> Instance:
    left, top, width, height = annotation.bbox
    mask = compressed_mask(annotation.segmentation, *size) if has_mask else b""
    return Instance(
        (left, top, left + width, top + height), labels.get(annotation.category_id, UNKNOWN), mask, annotation.iscrowd
    )
