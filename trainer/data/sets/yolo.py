"""Your own images with YOLO label files: `trainer prepare yolo` makes a set that recipes can use.

data: {name: yolo, set: my_cars, batch_size: 16}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from trainer.components import dataset
from trainer.data.archives import Member
from trainer.data.files import File, class_names, files_below, image_files, refuse, size_of
from trainer.data.options import CLASSES, IMAGES, INVALID, NAME, FilesCommand, Option, split_options
from trainer.data.own_sets import REMEDY_OF_OBJECTS, names_a_set, prepared_set, source_of_files
from trainer.data.source import DataInfo, Instance, Source
from trainer.data.splits import LabelledImage, split_folders
from trainer.errors import UserError

COMMAND = FilesCommand(
    "yolo",
    "images with a YOLO label file each",
    {
        "name": NAME,
        "images": IMAGES,
        "labels": Option(
            "DIR", "folder of text files of the same names; an image without one has no objects", Path, required=True
        ),
        "classes": CLASSES,
        **split_options("labels"),
        "invalid": INVALID,
    },
    "[--validation SHARE|DIR | --validation-images DIR --validation-labels DIR] "
    "[--test DIR | --test-images DIR --test-labels DIR] [--invalid refuse|drop]",
    "trainer prepare yolo --name my_cars --images photos --labels texts --classes classes.txt",
    "data: {name: yolo, set: my_cars, batch_size: 16}",
)
MAX_CLASSES = 65_536
NOT_LABELS = "classes"  # classes.txt, which labelling tools write next to the labels


@dataset(fields=("image", "boxes"))
def yolo(*, set: Annotated[str, names_a_set(COMMAND, "objects")]) -> Source:
    """The set made by `trainer prepare yolo --name SET`; a recipe can't prepare it again.

    Args:
        set: its name, the SET of that command.
    """
    return prepared_set(set)


def from_yolo(
    name: str,
    images: Path,
    labels: Path,
    classes: Path,
    validation: str | None = None,
    validation_images: Path | None = None,
    validation_labels: Path | None = None,
    test: str | None = None,
    test_images: Path | None = None,
    test_labels: Path | None = None,
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Source:
    """The set of the images in a folder and its subfolders, with the label files of the same names in another folder.

    Args:
        name: of the set.
        images: folder of images in any format that Pillow reads, e.g. `a/b.jpg`.
        labels: folder with a text file for each image with objects, e.g. `a/b.txt`; see `read_objects`.
        classes: a text file with one class name per line, in the order of their index.
        validation: the share of the images for validation, 0.2 by default, or their folders, see `split_folders`.
        validation_images: folder of the validation images.
        validation_labels: folder of their label files.
        test: the folders of the test split, see `split_folders`.
        test_images: folder of the test images.
        test_labels: folder of their label files.
        invalid: how to handle invalid objects.

    Raises:
        UserError: an argument is invalid, a label file has no image, or an image is in more than one split.
    """
    info = DataInfo(class_names(classes, 1, MAX_CLASSES))
    given = {"name": name, "images": images, "labels": labels, "classes": classes}
    given |= {"validation": validation, "validation_images": validation_images, "validation_labels": validation_labels}
    given |= {"test": test, "test_images": test_images, "test_labels": test_labels, "invalid": invalid}
    options, folders = split_folders(given, "images", "labels")
    samples = [sample for split, both in folders.items() for sample in _pairs(split, *both)]
    return source_of_files(
        "yolo",
        options,
        info,
        {"image": "image", "objects": "boxes"},
        samples,
        lambda image, label_file: {
            "image": image,
            "objects": read_objects(label_file and label_file.read(), image, REMEDY_OF_OBJECTS),
        },
        read=[file for sample in samples for file in (sample.image, sample.labels) if file],
        remedy=REMEDY_OF_OBJECTS,
    )


def _pairs(split: str, images: Path, labels: Path) -> list[LabelledImage[File | None]]:
    of_images, of_labels = image_files(images), files_below(labels, "label files (.txt)", {".txt"})
    of_labels.pop(NOT_LABELS, None)
    alone = [f"{of_labels[key].path} has no image {images / key}" for key in of_labels.keys() - of_images.keys()]
    refuse(
        f"an image and its labels must have the same name, except for the suffix; {len(alone)} files have no match:",
        alone,
    )
    return [LabelledImage(split, image, of_labels.get(key)) for key, image in of_images.items()]


def read_objects(labels: Member | None, image: Member, remedy: str) -> list[Instance]:
    """The objects of an image in YOLO's text format; none if there is no file.

    A line has a class and the centre, width and height of a box, or a class and the corners of a polygon, which is
    reduced to its box; all relative to the width and height of the image.

    Args:
        labels: the text file, or None.
        image: the image it describes.
        remedy: advice on a file that can't be read.

    Raises:
        UserError: a line is invalid, or the image can't be decoded.
    """
    if labels is None:
        return []
    width, height = size_of(image, remedy)
    objects = []
    for number, line in enumerate(labels.data.decode("utf-8-sig", "replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), np.array([float(word) for word in words[1:]])
            if len(values) != 4 and (len(values) < 6 or len(values) % 2):
                raise ValueError(f"it has {len(words)} words")
        except ValueError as error:
            raise UserError(
                f"{labels.name}:{number}: a line must be `class x y width height` or `class x1 y1 x2 y2 x3 y3 …` "
                f"({error}); {remedy}"
            ) from error
        if len(values) == 4:
            centre, size = values[:2], values[2:]
            low, high = centre - size / 2, centre + size / 2
        else:
            low, high = values.reshape(-1, 2).min(0), values.reshape(-1, 2).max(0)
        left, top, right, bottom = (np.concatenate([low, high]) * [width, height, width, height]).tolist()
        objects.append(Instance((left, top, right, bottom), label))
    return objects
