"""Preparing a data set: its archives become Parquet files with many small row groups, once.

    <data>/<name>/card.json
    <data>/<name>/train/00000.parquet …
    <data>/<name>/validation/00000.parquet …
    <data>/<name>/test/00000.parquet …         where there is a test split

Rows are written to a hidden folder beside it, which is renamed at the very end: a set is whole or it isn't there.
"""

from __future__ import annotations

import inspect
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.data.archives import Member, locate, locked
from trainer.data.arrays import checked_array, shape_of
from trainer.data.card import CARD, Card, sha256
from trainer.data.images import check_png, checked_image, checked_mask
from trainer.data.object_checks import OBJECTS, checked_objects
from trainer.data.parquet import SplitWriter, arrow_schema
from trainer.data.source import Row, Source
from trainer.errors import UserError
from trainer.signals import STOP

MASK = "mask"  # the column of class indices

IGNORED = 255  # the label that most sets with one ignore

SHOWN = 5  # objects that a note lists, and labels or differences that a message does

Say = Callable[[str], None]

Counts = npt.NDArray[np.int64]


def data_dir() -> Path:
    """Where prepared sets lie: `$TRAINER_DATA`, else `data` in the current folder."""
    return Path(os.environ.get("TRAINER_DATA") or "data")


def archives_dir() -> Path | None:
    """Where archives are looked up: `$TRAINER_ARCHIVES`, or None."""
    folder = os.environ.get("TRAINER_ARCHIVES")
    return Path(folder) if folder else None


def ensure_prepared(source: Source, data_dir: Path, archives_dir: Path | None, say: Say = print) -> Card:
    """The card of a set, which is prepared first where it isn't yet; a ready one is only read, without a lock.

    Files that have changed since their checksums were last compared are compared again.

    Raises:
        UserError: a file isn't what was written; or see `prepare`.
        Stopped: see `prepare`.
    """
    folder = data_dir / source.name
    card = _ready(source, folder) or prepare(source, data_dir, archives_dir, say)
    card.verify(folder, everything=False)
    return card


def prepare(source: Source, data_dir: Path, archives_dir: Path | None, say: Say = print) -> Card:
    """Prepares a set in `data_dir / source.name`, or returns the card of the one that is there.

    Under a file lock, so any number of processes may call it. What a killed one leaves is removed by the next.

    Raises:
        UserError: an archive is missing or damaged, an image can't be decoded, a mask doesn't fit its image,
            an object can't be so, or the folder can't be written.
        Stopped: a signal asked for a stop, and nothing half-done is left.
    """
    folder = data_dir / source.name
    partial, old = (data_dir / f".{source.name}.{end}" for end in ("partial", "old"))
    with _write_errors_reported(source.name, data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir / f".{source.name}.lock", f"waiting for another process that prepares {source.name}", say):
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            card = _ready(source, folder, say)
            if card:
                return card
            if folder.exists() and not (folder / CARD).exists():
                raise UserError(
                    f"{folder} exists but isn't a prepared data set; move it away, or set TRAINER_DATA to another "
                    "folder"
                )
            paths = locate(source.archives, data_dir, archives_dir, say)
            say(f"preparing {source.name} in {folder}")
            try:
                card = _write(source, paths, partial)
                if folder.exists():
                    folder.replace(old)
                partial.replace(folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(old, ignore_errors=True)
            return card


def _ready(source: Source, folder: Path, say: Say = lambda line: None) -> Card | None:
    """The card in `folder` if the set is whole and what `source` describes today; says why where it isn't."""
    if not (folder / CARD).exists():
        return None
    try:
        card = Card.load(folder)
    except UserError as error:
        say(str(error))
        return None
    made, makes = card.command or card.name, source.command or source.name
    # A set of files: nothing else can make it again.
    if made.split()[0] != makes.split()[0] and (card.version or source.version):
        raise UserError(
            f"{folder} was made by `trainer prepare {made}`, which `trainer prepare {makes}` would replace; choose "
            f"another name, or delete {folder}"
        )
    if (card.info, card.columns, {*card.splits}, card.version) != (
        source.info,
        source.columns,
        {*source.splits},
        source.version,
    ):
        reason = _differences(card, source) or "the name, size or time of a file has changed"
    elif MASK in card.columns and "class_pixels" not in card.statistics:
        reason = "its card has no class frequencies"
    else:
        return card
    say(f"{folder} is prepared again: {reason}")
    return None


def _differences(card: Card, source: Source) -> str:
    """In which properties and options a set was prepared otherwise than it is described today."""

    def described(each: Card | Source) -> dict[str, str]:
        words = shlex.split(each.command)[1:]
        return {
            **{f"class {label}": name for label, name in enumerate(each.info.classes)},
            **({} if each.info.ignore_index is None else {"the ignored label": str(each.info.ignore_index)}),
            **{f"column {column}": role for column, role in each.columns.items()},
            **{f"split {split}": "present" for split in each.splits},
            **{
                option: value for option, value in zip(words[::2], words[1::2], strict=False) if option.startswith("--")
            },
        }

    before, after = described(card), described(source)
    pairs = {what: (before.get(what, "absent"), after.get(what, "absent")) for what in before | after}
    found = [f"{what} was {old} and is now {new}" for what, (old, new) in pairs.items() if old != new]
    return ", ".join(found[:SHOWN] + ["…"] * (len(found) > SHOWN))


@contextmanager
def _write_errors_reported(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free / 2**20
        reason = error.strerror or error
        raise UserError(
            f"{name} can't be written to {folder}: {reason} ({free:.0f} MiB free); make room, or set TRAINER_DATA to "
            "another folder"
        ) from error


def _count_classes(indices: npt.NDArray[np.uint8], source: Source) -> Counts:
    """How many pixels of a mask (H, W) each class has, int64 (C,).

    Raises:
        ValueError: there is a label that is no class, and isn't ignored; it says what to do.
    """
    info, remedy = source.info, source.remedy
    counts = np.bincount(indices.ravel(), minlength=256)
    ignored = "none is ignored"
    if info.ignore_index is not None:
        counts[info.ignore_index] = 0
        ignored = f"{info.ignore_index} is ignored"
    unknown = [label for label in np.flatnonzero(counts).tolist() if label >= info.num_classes]
    if unknown:
        if source.ignore_option and info.ignore_index is None and (len(unknown) == 1 or IGNORED in unknown):
            remedy = (
                f"if {unknown[-1]} marks pixels that don't count, pass {source.ignore_option.format(unknown[-1])}; "
                f"otherwise {remedy}"
            )
        labels = ", ".join(map(str, unknown[:SHOWN]))
        raise ValueError(
            f"this mask holds the labels {labels}; classes are 0 to {info.num_classes - 1}, and {ignored}; {remedy}"
        )
    return counts[: info.num_classes]


def _checked_row(source: Source, row: Row, place: str) -> tuple[Row, Counts, list[str]]:
    """A row as it is written: `{"bytes", "path"}` for images and masks, `height` and `width`, and the objects as
    structs.

    Returns:
        The row, the pixels of each class in its `mask` or else its objects of each class, and what is wrong with
        objects that are left out.
    """
    checked: Row = {}
    dropped: list[str] = []
    sizes: dict[str, tuple[int, int]] = {}
    class_counts = np.zeros(source.info.num_classes, np.int64)
    for column, role in source.columns.items():
        value = row[column]
        if role in ("label", "boxes", "instances"):
            checked[column] = value
            continue
        if shape := shape_of(role):
            try:
                checked[column] = checked_array(value, shape)
            except ValueError as error:
                raise UserError(f"{place}: column {column}: {error}; {source.remedy}") from error
            continue
        name, data = value if isinstance(value, Member) else (None, value)
        place = name or place
        try:
            check_png(data)
            if role == "image":
                data, sizes[column] = checked_image(data)
            else:
                data, indices = checked_mask(data)
                sizes[column] = indices.shape[1], indices.shape[0]
        except Exception as error:  # decoders raise all kinds of errors on damaged data
            raise UserError(f"{place}: this {role} can't be decoded ({error}); {source.remedy}") from error
        if column == MASK:
            try:
                class_counts = _count_classes(indices, source)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from error
        checked[column] = {"bytes": data, "path": name}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{column} {width} x {height}" for column, (width, height) in sizes.items())
        raise UserError(f"{place}: sizes differ: {listed}; {source.remedy}")
    for width, height in list(sizes.values())[:1]:
        checked |= {"height": height, "width": width}
    if OBJECTS in source.columns:
        checked[OBJECTS], dropped = checked_objects(source, row[OBJECTS], sizes["image"], place)
        labels = [each["label"] for each in checked[OBJECTS] if not each["crowd"]]
        class_counts = np.bincount(np.array(labels, np.int64), minlength=source.info.num_classes)
    return checked, class_counts, dropped


# ---------------------------------------------------------------- Parquet


def _write(source: Source, paths: Mapping[str, Path], folder: Path) -> Card:
    """Writes all rows and the card into `folder`."""
    schema = arrow_schema(source.columns)
    writers = {split: SplitWriter(folder, split, schema) for split in source.splits}
    class_counts = np.zeros(source.info.num_classes, np.int64)
    dropped: list[str] = []
    try:
        for split, row in source.rows(paths):
            STOP.raise_if_asked()
            writer = writers[split]
            checked, counts, problems = _checked_row(source, row, f"{source.name}, {split} sample {writer.rows}")
            writer.add(checked)
            dropped += problems
            if split == "train":
                class_counts += counts
        splits = {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    for split, written in splits.items():
        if not written.rows:
            raise UserError(
                f"{', '.join(map(str, paths.values())) or source.name}: no {split} samples; {source.remedy}"
            )
    statistics = source.statistics(paths)
    if MASK in source.columns:
        statistics |= {"class_pixels": class_counts.tolist()}
    if OBJECTS in source.columns:
        statistics |= {"class_objects": class_counts.tolist()}
    notes = (inspect.getdoc(source.rows) or "").splitlines()
    if dropped:
        notes.append(
            f"{len(dropped)} objects that can't be so are left out: "
            f"{'; '.join(dropped[:SHOWN])}{'; …' * (len(dropped) > SHOWN)}"
        )
    card = Card(
        name=source.name,
        classes=source.info.classes,
        ignore_index=source.info.ignore_index,
        columns=dict(source.columns),
        splits=splits,
        archives={name: sha256(path) for name, path in paths.items()},
        notes=tuple(notes),
        statistics=statistics,
        command=source.command,
        version=source.version,
    )
    card.save(folder)
    card.note_verified(folder)
    return card
