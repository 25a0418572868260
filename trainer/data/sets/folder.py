"""Your own image and mask files: `trainer prepare folder` makes a set that recipes can use.

data: {name: folder, set: my_streets, batch_size: 16}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from trainer.components import dataset
from trainer.data.files import File, class_names, files_below, image_files, refuse
from trainer.data.options import CLASSES, IMAGES, NAME, FilesCommand, Option, split_options
from trainer.data.own_sets import names_a_set, prepared_set, source_of_files
from trainer.data.source import DataInfo, Source
from trainer.data.splits import LabelledImage, split_folders
from trainer.errors import UserError

COMMAND = FilesCommand(
    "folder",
    "images with a mask each",
    {
        "name": NAME,
        "images": IMAGES,
        "masks": Option(
            "DIR", "folder with an index or palette PNG for each image, of the same name", Path, required=True
        ),
        "classes": CLASSES,
        "ignore": Option("LABEL", "label ignored in loss and metrics (default: none)", int),
        **split_options("masks"),
    },
    "[--ignore LABEL] [--validation SHARE|DIR | --validation-images DIR --validation-masks DIR] "
    "[--test DIR | --test-images DIR --test-masks DIR]",
    "trainer prepare folder --name my_streets --images photos --masks labels --classes classes.txt --ignore 255",
    "data: {name: folder, set: my_streets, batch_size: 16}",
)
MAX_LABELS = 256  # a mask has 8 bits


@dataset(fields=("image", "mask"))
def folder(*, set: Annotated[str, names_a_set(COMMAND, "mask")]) -> Source:
    """The set made by `trainer prepare folder --name SET`; a recipe can't prepare it again.

    Args:
        set: its name, the SET of that command.
    """
    return prepared_set(set)


def from_files(
    name: str,
    images: Path,
    masks: Path,
    classes: Path,
    ignore: int | None = None,
    validation: str | None = None,
    validation_images: Path | None = None,
    validation_masks: Path | None = None,
    test: str | None = None,
    test_images: Path | None = None,
    test_masks: Path | None = None,
) -> Source:
    """The set of the images in a folder and its subfolders, with the masks of the same names in another folder.

    Args:
        name: of the set.
        images: folder of images in any format that Pillow reads, e.g. `a/b.jpg`.
        masks: folder with an index or palette PNG for each, e.g. `a/b.png`.
        classes: a text file with one class name per line, in the order of their index.
        ignore: the label ignored in loss and metrics, or None.
        validation: the share of the images for validation, 0.2 by default, or their folders, see `split_folders`.
        validation_images: folder of the validation images.
        validation_masks: folder of their masks.
        test: the folders of the test split, see `split_folders`.
        test_images: folder of the test images.
        test_masks: folder of their masks.

    Raises:
        UserError: an argument is invalid, an image has no mask, a mask no image, or an image is in more than one split.
    """
    if ignore is not None and not 0 <= ignore < MAX_LABELS:
        raise UserError(f"--ignore {ignore}: labels are 0 to {MAX_LABELS - 1}")
    info = DataInfo(class_names(classes, 2, MAX_LABELS), ignore)
    given = {"name": name, "images": images, "masks": masks, "classes": classes, "ignore": ignore}
    given |= {"validation": validation, "validation_images": validation_images, "validation_masks": validation_masks}
    given |= {"test": test, "test_images": test_images, "test_masks": test_masks}
    options, folders = split_folders(given, "images", "masks")
    samples = [sample for split, both in folders.items() for sample in _pairs(split, *both)]
    return source_of_files(
        "folder",
        options,
        info,
        {"image": "image", "mask": "mask"},
        samples,
        lambda image, mask: {"image": image, "mask": mask.read()},
        read=[file for sample in samples for file in (sample.image, sample.labels)],
        remedy="correct it, or remove image and mask",
        ignore_option="--ignore {}",
    )


def _pairs(split: str, images: Path, masks: Path) -> list[LabelledImage[File]]:
    of_images, of_masks = image_files(images), files_below(masks, "masks (index or palette PNG)", {".png"})
    alone = [f"{of_images[key].path} has no mask {masks / key}.png" for key in of_images.keys() - of_masks.keys()]
    alone += [f"{of_masks[key].path} has no image {images / key}" for key in of_masks.keys() - of_images.keys()]
    refuse(
        f"an image and its mask must have the same name, except for the suffix; {len(alone)} files have no match:",
        alone,
    )
    return [LabelledImage(split, image, of_masks[key]) for key, image in of_images.items()]
