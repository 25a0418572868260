"""Prepares a data set: converts its archives to Parquet files with many small row groups, once.

    <data>/<name>/card.json
    <data>/<name>/train/00000.parquet …
    <data>/<name>/validation/00000.parquet …
    <data>/<name>/test/00000.parquet …         if there is a test split

Preparation is atomic: rows are written to a hidden folder next to it, which is renamed at the end.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trainer.data.archives import locate, locked
from trainer.data.card import CARD, Card, Split, sha256
from trainer.data.parquet import SplitWriter
from trainer.data.roles import MASK, Counts, arrow_schema, check_row
from trainer.data.source import Source
from trainer.errors import UserError
from trainer.signals import STOP

SHOWN = 5  # objects listed in a note, or differences in a message

Log = Callable[[str], None]


def data_dir() -> Path:
    """The folder of prepared sets: `$TRAINER_DATA`, or `data` in the current folder."""
    return Path(os.environ.get("TRAINER_DATA") or "data")


def archives_dir() -> Path | None:
    """The folder in which archives are looked up: `$TRAINER_ARCHIVES`, or None."""
    folder = os.environ.get("TRAINER_ARCHIVES")
    return Path(folder) if folder else None


def ensure_prepared(source: Source, data_dir: Path, archives_dir: Path | None, log: Log = print) -> Card:
    """The card of a set, which is prepared if necessary; otherwise it is only read, without a lock.

    Compares the checksums of files whose size or modification time has changed since the last comparison.

    Raises:
        UserError: a file has changed; or see `prepare`.
        Stopped: see `prepare`.
    """
    folder = data_dir / source.name
    card = _ready(source, folder) or prepare(source, data_dir, archives_dir, log)
    card.verify(folder, everything=False)
    return card


def prepare(source: Source, data_dir: Path, archives_dir: Path | None, log: Log = print) -> Card:
    """Prepares a set in `data_dir / source.name`, or returns its card if that is done.

    Holds a file lock, so any number of processes may call it. Removes what a killed process left behind.

    Raises:
        UserError: an archive is missing or damaged, an image can't be decoded, a mask doesn't fit its image,
            an object is invalid, or the folder can't be written.
        Stopped: a stop was requested; nothing incomplete is left behind.
    """
    folder = data_dir / source.name
    partial, old = (data_dir / f".{source.name}.{end}" for end in ("partial", "old"))
    with _write_errors_reported(source.name, data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        with locked(data_dir / f".{source.name}.lock", f"waiting for another process to prepare {source.name}", log):
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            card = _ready(source, folder, log)
            if card:
                return card
            if folder.exists() and not (folder / CARD).exists():
                raise UserError(
                    f"{folder} exists but isn't a prepared data set; move it elsewhere, or set TRAINER_DATA to another "
                    "folder"
                )
            paths = locate(source.archives, data_dir, archives_dir, log)
            log(f"preparing {source.name} in {folder}")
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


def _ready(source: Source, folder: Path, log: Log = lambda line: None) -> Card | None:
    """The card in `folder` if the set is intact and matches `source`; otherwise None, and logs why."""
    if not (folder / CARD).exists():
        return None
    try:
        card = Card.load(folder)
    except UserError as error:
        log(str(error))
        return None
    made_by, requested = card.command or card.name, source.command or source.name
    # A set made from files is never replaced by one of another kind: only its own command can prepare it again.
    if made_by.split()[0] != requested.split()[0] and (card.version or source.version):
        raise UserError(
            f"{folder} was made by `trainer prepare {made_by}` and would be replaced by `trainer prepare {requested}`; "
            f"choose another name, or delete {folder}"
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
    log(f"{folder} must be prepared again: {reason}")
    return None


def _differences(card: Card, source: Source) -> str:
    """The properties and options that differ between a prepared set and its current source."""

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
    changes = [f"{what} was {old} and is now {new}" for what, (old, new) in pairs.items() if old != new]
    return ", ".join(changes[:SHOWN] + ["…"] * (len(changes) > SHOWN))


@contextmanager
def _write_errors_reported(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free / 2**20
        reason = error.strerror or error
        raise UserError(
            f"{name} can't be written to {folder}: {reason} ({free:.0f} MiB free); free space, or set TRAINER_DATA to "
            "another folder"
        ) from error


def _write(source: Source, paths: Mapping[str, Path], folder: Path) -> Card:
    """Writes all rows and the card into `folder`."""
    splits, class_counts, dropped = _write_rows(source, paths, folder)
    notes = list(source.notes)
    if dropped:
        shown = "; ".join(dropped[:SHOWN]) + "; …" * (len(dropped) > SHOWN)
        notes.append(f"{len(dropped)} invalid objects are left out: {shown}")
    card = Card(
        name=source.name,
        classes=source.info.classes,
        ignore_index=source.info.ignore_index,
        columns=dict(source.columns),
        splits=splits,
        archives={name: sha256(path) for name, path in paths.items()},
        notes=tuple(notes),
        statistics=source.statistics(paths) | {name: counts.tolist() for name, counts in class_counts.items()},
        command=source.command,
        version=source.version,
    )
    card.save(folder)
    card.mark_verified(folder)
    return card


def _write_rows(
    source: Source, paths: Mapping[str, Path], folder: Path
) -> tuple[dict[str, Split], dict[str, Counts], list[str]]:
    """Writes the Parquet files of every split.

    Returns:
        The splits, the class counts of the training split by the name of their statistic, and what is wrong with each
        object left out.
    """
    schema = arrow_schema(source.columns)
    writers = {split: SplitWriter(folder, split, schema) for split in source.splits}
    class_counts: dict[str, Counts] = {}
    dropped: list[str] = []
    try:
        for split, row in source.rows(paths):
            STOP.raise_if_asked()
            writer = writers[split]
            checked = check_row(source, row, f"{source.name}, {split} sample {writer.rows}")
            writer.add(checked.stored)
            dropped += checked.dropped
            if split == "train":
                for statistic, counts in checked.class_counts.items():
                    class_counts[statistic] = class_counts.get(statistic, 0) + counts
        splits = {split: writer.close() for split, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    for split, written in splits.items():
        if not written.rows:
            archives = ", ".join(map(str, paths.values()))
            raise UserError(f"{archives or source.name}: no {split} samples; {source.remedy}")
    return splits, class_counts, dropped
