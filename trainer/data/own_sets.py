"""Sets made from the user's own files: the common part of `trainer prepare folder`, `yolo` and `coco`, and recipes that
use such sets.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import AfterValidator

from trainer.components import catalogue
from trainer.data.archives import Member
from trainer.data.card import Card
from trainer.data.files import File
from trainer.data.options import FilesCommand, flag
from trainer.data.prepare import data_dir
from trainer.data.source import DataInfo, Role, Row, Source, in_validation
from trainer.data.splits import LabelledImage, Labels, refuse_leaks, share_of
from trainer.errors import UserError

NAME = re.compile(r"\w[\w.-]{0,63}")
DOWNLOADS = "downloads"  # another folder in $TRAINER_DATA
REMEDY_OF_OBJECTS = "correct or remove it, or drop invalid objects with `--invalid drop`"

# ---------------------------------------------------------------- in a recipe


def names_a_set(command: FilesCommand, column: str) -> AfterValidator:
    """Validates the key `set` of a recipe: a prepared set with this column, made by `command`."""

    def check(name: str) -> str:
        """The name of a prepared set"""
        try:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"{name!r} is not a valid name of a set: it must consist of letters, digits and . _ -, and name a "
                    f"folder in {data_dir()}"
                )
            card = Card.load(data_dir() / name, command.required.replace("NAME", name))
            if column not in card.columns:
                raise UserError(
                    f"{data_dir() / name} has no {column}: it was made by `trainer prepare {card.command or name}`"
                )
        except UserError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


def prepared_set(name: str) -> Source:
    """A set as described by its card; a recipe can't prepare it again."""
    card = Card.load(data_dir() / name)

    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        raise UserError(f"{data_dir() / name} is damaged; {card.how_to_prepare}")

    return Source(
        name, card.info, card.columns, rows, command=card.command, version=card.version, splits=tuple(card.splits)
    )


# ---------------------------------------------------------------- making it


def source_of_files(
    kind: str,
    options: Mapping[str, Any],
    info: DataInfo,
    columns: Mapping[str, Role],
    samples: Sequence[LabelledImage[Labels]],
    row: Callable[[Member, Labels], Row],
    read: Sequence[File],
    remedy: str,
    note: str = "",
    ignore_option: str = "",
) -> Source:
    """The set that `trainer prepare KIND` makes from files.

    Args:
        kind: name of the data set in the catalogue.
        options: of the command, by name: `name`, `validation`, `validation_images`, `test`, `test_images`, optionally
            `invalid`, and its own; None stands for an option that isn't given.
        info: classes and ignored label.
        columns: role of each column.
        samples: the images with their labels.
        row: makes a row from an image and its labels.
        read: the files read; the set is prepared again when one of them changes.
        remedy: advice on a row that can't be used.
        note: for the card, in addition to the split.
        ignore_option: see `Source`.

    Raises:
        UserError: the name is invalid, or an image is in more than one split.
    """
    _check_name(options["name"])
    refuse_leaks(samples)
    given = {
        option: value.resolve() if isinstance(value, Path) else value
        for option, value in options.items()
        if value is not None
    }
    invalid = options.get("invalid", "refuse")
    validation, test = (given.get(split, given.get(f"{split}_images")) for split in ("validation", "test"))
    share = share_of(str(validation))
    drawn = f"{share:.0%} validate, drawn by a hash of the image's bytes" if share else f"{validation} validates"
    notes = [f"Split: {drawn}."]
    if test:
        notes.append(f"{test} is the test split, which no training reads.")
    if note:
        notes.append(note)
    return Source(
        options["name"],
        info,
        columns,
        partial(_rows, samples, row, validation, share),
        command=shlex.join([kind, *(str(word) for option, value in given.items() for word in (flag(option), value))]),
        version=_version(share, invalid, samples, read),
        remedy=remedy,
        invalid=invalid,
        splits=("train", "validation", "test") if test else ("train", "validation"),
        notes=tuple(notes),
        ignore_option=ignore_option,
    )


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or name == DOWNLOADS:
        raise UserError(
            f"--name {name}: must consist of letters, digits and . _ -, and not be {DOWNLOADS}; it names a folder "
            f"in {data_dir()}"
        )
    if name in catalogue("dataset"):
        raise UserError(f"--name {name}: the catalogue has a data set of this name; choose another")


def _rows(
    samples: Sequence[LabelledImage[Labels]],
    row: Callable[[Member, Labels], Row],
    validation: object,
    share: float | None,
    archives: Mapping[str, Path],
) -> Iterator[tuple[str, Row]]:
    """Split and row of each sample; `share` is the share drawn for validation, if `validation` gives one."""
    splits = set()
    for split, file, labels in sorted(samples, key=_draw):  # shuffled, since neighbours in a folder are similar
        image = file.read()
        if share and split == "train" and in_validation(image.data, share):
            split = "validation"
        splits.add(split)
        yield split, row(image, labels)
    if not {"train", "validation"} <= splits:
        candidates = sum(sample.split == "train" for sample in samples)
        raise UserError(
            f"--validation {validation}: all or none of {candidates} images were drawn; give another share, or the "
            "validation files"
        )


def _draw(sample: LabelledImage[Any]) -> bytes:
    """A pseudo-random key that never changes, on any machine and in any version."""
    return hashlib.sha256(sample.image.name.encode()).digest()


def _version(share: float | None, invalid: str, samples: Sequence[LabelledImage[Any]], read: Sequence[File]) -> str:
    """Hash of names, sizes and modification times of the files; hashing content would take as long as preparing."""
    states = [(file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in read]
    content = [share, invalid, [sample.split for sample in samples], states]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
