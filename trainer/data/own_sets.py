"""Sets made of the user's own files: what `trainer prepare folder`, `yolo` and `coco` have in common, and recipes that
name such sets.
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
from trainer.data.splits import Labels, Sample, refuse_leaks, share_of
from trainer.errors import UserError

NAME = re.compile(r"\w[\w.-]{0,63}")
DOWNLOADS = "downloads"  # another folder in $TRAINER_DATA
REMEDY_OF_OBJECTS = "correct it or take it away; `--invalid drop` leaves out invalid objects"

# ---------------------------------------------------------------- in a recipe


def names_a_set(command: FilesCommand, column: str) -> AfterValidator:
    """Checks the key `set` of a recipe: a prepared set with that column, made by `command`."""

    def check(name: str) -> str:
        """The name of a prepared set."""
        try:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"{name!r} is no name of a set: it is made of letters, digits and . _ -, and names a folder in "
                    f"{data_dir()}"
                )
            card = Card.load(data_dir() / name, command.required.replace("NAME", name))
            if column not in card.columns:
                raise UserError(
                    f"{data_dir() / name} has no {column}: `trainer prepare {card.command or name}` made it"
                )
        except UserError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


def prepared_set(name: str) -> Source:
    """A set as its card describes it; a recipe can't make it again."""
    card = Card.load(data_dir() / name)

    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
        raise UserError(f"{data_dir() / name} is damaged; {card.again}")

    return Source(
        name, card.info, card.columns, rows, command=card.command, version=card.version, splits=tuple(card.splits)
    )


# ---------------------------------------------------------------- making it


def source_of_files(
    kind: str,
    options: Mapping[str, Any],
    info: DataInfo,
    columns: Mapping[str, Role],
    samples: Sequence[Sample[Labels]],
    row: Callable[[Member, Labels], Row],
    read: Sequence[File],
    remedy: str,
    note: str = "",
    ignore_option: str = "",
) -> Source:
    """The set that `trainer prepare KIND` makes of files.

    Args:
        kind: name of the data set in the catalogue.
        options: of the command, by their names: `name`, `validation`, `validation_images`, `test`, `test_images`,
            perhaps `invalid`, and what else it has; those that are None don't count.
        info: classes and ignored label.
        columns: role of each column.
        samples: an image each, and what belongs to it.
        row: makes a row of an image and what belongs to it.
        read: the files whose change makes the set another.
        remedy: what to do about a row that can't be used.
        note: what the card says, after how the set was split.
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
            f"--name {name}: a set's name is made of letters, digits and . _ -, and names a folder in {data_dir()}"
        )
    if name in catalogue("dataset"):
        raise UserError(f"--name {name}: there is a data set of that name already; choose another")


def _rows(
    samples: Sequence[Sample[Labels]],
    row: Callable[[Member, Labels], Row],
    validation: object,
    share: float | None,
    archives: Mapping[str, Path],
) -> Iterator[tuple[str, Row]]:
    """Split and row of each sample; `share`, which is what `--validation` says, draws those that validate."""
    splits = set()
    for split, file, labels in sorted(samples, key=_draw):  # mixed, so that neighbours in a folder are not alike
        image = file.read()
        if share and split == "train" and in_validation(image.data, share):
            split = "validation"
        splits.add(split)
        yield split, row(image, labels)
    if not {"train", "validation"} <= splits:
        drawn_from = sum(sample.split == "train" for sample in samples)
        raise UserError(
            f"--validation {validation}: of {drawn_from} images all or none were drawn; give another share, or what "
            "validates"
        )


def _draw(sample: Sample[Any]) -> bytes:
    """A random key that is the same for ever, on any machine and version."""
    return hashlib.sha256(sample.image.name.encode()).digest()


def _version(share: float | None, invalid: str, samples: Sequence[Sample[Any]], read: Sequence[File]) -> str:
    """Names, sizes and times of the files; over all bytes, to see that nothing changed would take as long as
    preparing.
    """
    states = [(file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in read]
    content = [share, invalid, [sample.split for sample in samples], states]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
