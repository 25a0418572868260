"""Your own images with a COCO instance file: `trainer prepare coco` makes a set that recipes can use.

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
from trainer.data.splits import LabelledImage, share_of
from trainer.errors import UserError

COMMAND = FilesCommand(
    "coco",
    "images, and a COCO instance file",
    {
        "name": NAME,
        "images": IMAGES,
        "annotations": Option("FILE", "COCO instance file (JSON)", Path, required=True),
        "validation": Option(
            "SHARE|FILE",
            f"share of the images for validation (default: {VALIDATION}), or a COCO file of the validation images",
            default=VALIDATION,
        ),
        "validation_images": Option("DIR", "folder of the images of --validation FILE, if not --images", Path),
        "test": Option("FILE", "COCO file of a third split, which training never reads"),
        "test_images": Option("DIR", "folder of the images of --test FILE, if not --images", Path),
        "invalid": INVALID,
    },
    "[--validation SHARE | --validation FILE [--validation-images DIR]] [--test FILE [--test-images DIR]] "
    "[--invalid refuse|drop]",
    "trainer prepare coco --name my_cells --images photos --annotations instances.json",
    "data: {name: coco, set: my_cells, batch_size: 4}",
)
UNKNOWN = -1  # label of an annotation whose category isn't listed

Described = tuple[ListedImage, list[Annotation]]
"""An image as listed in the file, and its annotations."""


@dataset(fields=("image", "boxes", "masks"))
def coco(*, set: Annotated[str, names_a_set(COMMAND, "objects")]) -> Source:
    """The set made by `trainer prepare coco --name SET`; a recipe can't prepare it again.

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
    """The set of the images in a COCO file, with masks if all annotations have one, otherwise with boxes only.

    Args:
        name: of the set.
        images: folder of the images, including subfolders; an image is the file whose path ends in its `file_name`.
        annotations: the COCO file; its categories are the classes, in the same order.
        validation: the share of the images for validation, or a COCO file of them with the same categories.
        validation_images: folder of the images of that file, if not `images`.
        test: a COCO file of the test split, with the same categories.
        test_images: folder of the images of that file, if not `images`.
        invalid: how to handle invalid objects.

    Raises:
        UserError: an argument is invalid, or an image is missing or in more than one split.
    """
    files, folders = {"train": annotations}, {"train": images}
    for split, value, folder in (("validation", validation, validation_images), ("test", test, test_images)):
        if value is not None and share_of(value, split) is None:
            files[split], folders[split] = Path(value).resolve(), folder or images
        elif folder:
            raise UserError(f"{flag(f'{split}_images')} {folder} requires the COCO file of its images: --{split} FILE")
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
    """The categories, which must be the same in every split."""
    categories = contents["train"].categories
    for split, content in contents.items():
        if content.categories != categories:
            raise UserError(
                f"{files['train']} and {files[split]} list different categories; make them equal, order included"
            )
    if not categories:
        raise UserError(f"{files['train']} lists no categories")
    return categories


def _row(labels: Mapping[Id, int], has_masks: bool, image: Member, described: Described) -> Row:
    listed, annotations = described
    if (size := size_of(image, REMEDY_OF_OBJECTS)) != (listed.width, listed.height):
        raise UserError(
            f"{image.name} is {size[0]} x {size[1]}, but listed as {listed.width} x {listed.height}; correct or "
            "remove it"
        )
    return {"image": image, "objects": [_instance(each, labels, size, has_masks) for each in annotations]}


def _samples(
    split: str, file: Path, content: Content, images: Path, below: Iterable[File]
) -> list[LabelledImage[Described]]:
    """The images listed in a file, each with its annotations."""
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
    for candidate in below:
        by_name.setdefault(candidate.path.name, []).append(candidate)
    samples, problems = [], []
    for image in content.images:
        path = PurePosixPath(image.file_name.replace("\\", "/"))
        matching = [each for each in by_name.get(path.name, []) if f"/{each.name}".endswith(f"/{path}")]
        if len(matching) == 1:
            samples.append(LabelledImage(split, matching[0], (image, annotations[image.id])))
        else:
            problems.append(
                f"{path} {'matches ' + ' and '.join(each.name for each in matching) if matching else 'is missing'}"
            )
    refuse(
        f"{images} must contain each image listed in {file} exactly once; {len(problems)} are missing or ambiguous:",
        problems,
    )
    return samples


def _instance(annotation: Annotation, labels: Mapping[Id, int], size: tuple[int, int], has_mask: bool) -> Instance:
    left, top, width, height = annotation.bbox
    mask = compressed_mask(annotation.segmentation, *size) if has_mask else b""
    return Instance(
        (left, top, left + width, top + height), labels.get(annotation.category_id, UNKNOWN), mask, annotation.iscrowd
    )
