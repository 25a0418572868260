"""Files of the user's own that become a set: what `trainer prepare folder`, `yolo` and `coco` have in common,
and recipes that name such sets.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from PIL import Image
from pydantic import AfterValidator

from trainer.components import catalogue
from trainer.data.archives import Member
from trainer.data.card import Card, sha256
from trainer.data.images import image_size
from trainer.data.prepare import data_dir
from trainer.data.source import DataInfo, Role, Row, Source, in_validation
from trainer.errors import UserError

NAME = re.compile(r"\w[\w.-]{0,63}")
DOWNLOADS = "downloads"  # another folder in $TRAINER_DATA
VALIDATION = "0.2"
SHOWN = 5  # files that a message lists
REMEDY_OF_OBJECTS = "correct it or take it away; `--invalid drop` leaves out objects that can't be so"

Labels = TypeVar("Labels")

# ---------------------------------------------------------------- in a recipe


def names_a_set(usage: str, column: str) -> AfterValidator:
    """Checks the key `set` of a recipe: a prepared set with that column, made by the command `usage`."""

    def check(name: str) -> str:
        try:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"{name!r} is no name of a set: it is made of letters, digits and . _ -, and names a folder in "
                    f"{data_dir()}"
                )
            card = Card.load(data_dir() / name, usage.partition(" [")[0].replace("NAME", name))
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


class File(NamedTuple):
    """A file and its path from the folder that was given, that one's name first: what a message says."""

    path: Path
    name: str

    def read(self) -> Member:
        """Its name and bytes.

        Raises:
            UserError: it can't be read.
        """
        with self._errors_reported():
            return Member(self.name, self.path.read_bytes())

    def digest(self) -> str:
        """SHA-256 of its bytes, in hex, without holding them in memory.

        Raises:
            UserError: it can't be read.
        """
        with self._errors_reported():
            return sha256(self.path)

    @contextmanager
    def _errors_reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} can't be read: {error.strerror}") from error


class Sample(NamedTuple, Generic[Labels]):
    """An image and what belongs to it; `split` is `train` also for one that a share may yet draw to validate."""

    split: str
    image: File
    labels: Labels


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
    name, invalid = options["name"], options.get("invalid", "refuse")
    if not NAME.fullmatch(name) or name == DOWNLOADS:
        raise UserError(
            f"--name {name}: a set's name is made of letters, digits and . _ -, and names a folder in {data_dir()}"
        )
    if name in catalogue("dataset"):
        raise UserError(f"--name {name}: there is a data set of that name already; choose another")
    given = {
        option: value.resolve() if isinstance(value, Path) else value
        for option, value in options.items()
        if value is not None
    }
    validation, test = (given.get(split, given.get(f"{split}_images")) for split in ("validation", "test"))
    share = share_of(str(validation))
    _refuse_leaks(samples)

    def rows(archives: Mapping[str, Path]) -> Iterator[tuple[str, Row]]:
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
                f"--validation {validation}: of {drawn_from} images all or none were drawn; give another share, or "
                "what validates"
            )

    drawn = (
        f"Split: {share:.0%} validate, drawn by a hash of the image's bytes."
        if share
        else f"Split: {validation} validates."
    )
    kept = f"{test} is the test split, which no training reads." if test else ""
    states = [(file.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in read]
    return Source(
        name,
        info,
        columns,
        rows,
        command=shlex.join([kind, *(str(word) for option, value in given.items() for word in (flag(option), value))]),
        # Names, sizes and times; over all bytes, to see that nothing changed would take as long as preparing.
        version=hashlib.sha256(
            json.dumps([share, invalid, [sample.split for sample in samples], states]).encode()
        ).hexdigest(),
        remedy=remedy,
        invalid=invalid,
        splits=("train", "validation", "test") if test else ("train", "validation"),
        notes=tuple(line for line in (drawn, kept, note) if line),
        ignore_option=ignore_option,
    )


def flag(option: str) -> str:
    """How the command line spells an option."""
    return f"--{option.replace('_', '-')}"


def _refuse_leaks(samples: Sequence[Sample[Any]]) -> None:
    """Raises `UserError` where an image is in more than one split, byte for byte;
    reads only files whose size occurs in another split too.
    """
    by_size: dict[int, list[Sample[Any]]] = {}
    for sample in samples:
        by_size.setdefault(sample.image.path.stat().st_size, []).append(sample)
    by_digest: dict[str, dict[str, File]] = {}
    for alike in by_size.values():
        if len({sample.split for sample in alike}) > 1:
            for sample in alike:
                by_digest.setdefault(sample.image.digest(), {}).setdefault(sample.split, sample.image)
    leaks = [
        ", ".join(f"{file.path} ({split})" for split, file in found.items())
        for found in by_digest.values()
        if len(found) > 1
    ]
    refuse(
        f"{len(leaks)} images are in more than one split, so metrics would be measured on images used in training; "
        "leave each in one split only:",
        leaks,
    )


def share_of(value: str, split: str = "validation") -> float | None:
    """The share that `--validation` says, or None where it names a folder or a file, as `--test` always does.

    Raises:
        UserError: the share is invalid.
    """
    try:
        share = float(value)
    except ValueError:
        return None
    if split != "validation":
        raise UserError(
            f"--{split} {value}: only the validation split can be a share; name the files of the {split} split"
        )
    if not 0 < share < 1:
        raise UserError(f"--validation {value}: a share is between 0 and 1, e.g. {VALIDATION}")
    return share


def split_folders(options: Mapping[str, Any], *kinds: str) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """The folders of each split, as options of the command give them, each of which holds one of `kinds`, e.g. `images`
    and `masks`.

    Options of these names give the training split. Another split is given by `validation_images`, `validation_masks`
    and so on, or by `validation` alone: the folder whose subfolders are called like those that train; or, where these
    are called alike, the name of the folders beside them, e.g. `val` beside `images/train` and `labels/train`. Where
    nothing says what validates, it is a share.

    Returns:
        The options, so that they mean the same wherever the command is called, and the folders, by split.

    Raises:
        UserError: options exclude each other, or one lacks its companion.
    """
    options = dict(options)
    folders = {"train": [options[kind] for kind in kinds]}
    for split in ("validation", "test"):
        value, own = options[split], {flag(f"{split}_{kind}"): options[f"{split}_{kind}"] for kind in kinds}
        given = [option for option, folder in own.items() if folder]
        if given and value is not None:
            raise UserError(f"--{split} {value} and {given[0]} exclude each other; give one of them")
        if given and len(given) < len(own):
            raise UserError(f"{given[0]} needs {next(option for option in own if option not in given)} beside it")
        if given:
            folders[split] = [*own.values()]
        elif value is not None and share_of(value, split) is None:
            options[split], folders[split] = _folders_named(value, folders["train"])
        elif split == "validation" and value is None:
            options[split] = VALIDATION
    return options, folders


def _folders_named(value: str, train: Sequence[Path]) -> tuple[str, list[Path]]:
    whole = [folder.resolve() for folder in train]
    if len({folder.name for folder in whole}) < len(whole):
        return value, [folder.parent / value for folder in whole]
    return str(Path(value).resolve()), [Path(value, folder.name) for folder in whole]


def class_names(file: Path, at_least: int, at_most: int) -> tuple[str, ...]:
    """The names that a text file has in its lines, in the order of their index.

    Raises:
        UserError: it can't be read, there are too few or too many, an empty one or two alike.
    """
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {file} can't be read: {error}") from error
    if not at_least <= len(names) <= at_most or len(set(names)) < len(names) or "" in names:
        raise UserError(
            f"--classes {file}: a line for each class, with its name, all different; between {at_least} and {at_most} "
            "of them"
        )
    return names


def image_files(folder: Path) -> dict[str, File]:
    """The images in a folder and all below it, in any format that Pillow reads; see `files_below`."""
    Image.init()
    return files_below(
        folder, "images", {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    )


def files_below(folder: Path, what: str, suffixes: set[str]) -> dict[str, File]:
    """The files with one of these suffixes in a folder and all below it, by their path from there without suffix.

    Raises:
        UserError: there is no such folder or no such file in it, or two differ in their suffix alone.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}, which should hold {what}")
    found: dict[str, File] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or not path.is_file():
            continue
        inside = path.relative_to(folder)
        key = str(inside.with_suffix(""))
        if key in found:
            raise UserError(
                f"{found[key].path} and {path} are called alike, so what belongs to one can't be told from the "
                "other's; take one away"
            )
        name = (folder.resolve().name / inside).as_posix()
        found[key] = File(path, name.encode("utf-8", "backslashreplace").decode())  # Parquet holds Unicode only
    if not found:
        raise UserError(f"{folder} holds no {what}")
    return found


def refuse(headline: str, problems: Sequence[str]) -> None:
    """Raises `UserError` with the first of the problems, where there are any."""
    if problems:
        raise UserError("\n  ".join([headline, *sorted(problems)[:SHOWN], *(["…"] if len(problems) > SHOWN else [])]))


def size_of(image: Member, remedy: str) -> tuple[int, int]:
    """Width and height that an image will have when it is stored.

    Raises:
        UserError: it can't be decoded.
    """
    try:
        return image_size(image.data)
    except Exception as error:  # decoders raise all kinds of errors on damaged data
        raise UserError(f"{image.name}: this image can't be decoded ({error}); {remedy}") from error


def _draw(sample: Sample[Any]) -> bytes:
    """A random key that is the same for ever, on any machine and version."""
    return hashlib.sha256(sample.image.name.encode()).digest()
