"""The card of a prepared data set: what its folder contains, and checks that the files are unchanged."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.data.source import DataInfo, Role
from trainer.errors import UserError
from trainer.signals import STOP

FORMAT = 1
CARD = "card.json"
VERIFIED = "verified.json"
CHUNK_BYTES = 2**20


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; a stop request interrupts it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            STOP.raise_if_asked()
    return digest.hexdigest()


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a split.

    Attributes:
        name: path relative to the set's folder, e.g. `train/00000.parquet`.
        sha256: checksum in hex.
        bytes: file size.
        row_groups: rows in each of its row groups, in order.
    """

    name: str
    sha256: str
    bytes: int
    row_groups: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """One split: its number of rows, and its files in order."""

    rows: int
    files: tuple[DataFile, ...]


@dataclass(frozen=True)
class Card:
    """The content of `card.json`.

    Attributes:
        name: of the data set and its folder.
        classes: names in the order of their index.
        ignore_index: the label excluded from loss and metrics, or None.
        columns: role of each column of the source; the files have `height` and `width` in addition.
        splits: `train` and `validation`, and optionally `test`, which training never reads.
        archives: SHA-256 of each archive the rows were read from.
        notes: lines for people, e.g. how the set was split.
        statistics: measured when the set was prepared: `class_pixels` if there is a column `mask` (list of int: pixels
            of each class in the training split, without ignored ones), `class_objects` if there are objects (list of
            int: objects of each class in the training split, without crowds), and those of the source, e.g. colour
            centres.
        command: the arguments of `trainer prepare` that make the set; "" stands for its name alone.
        version: of the files it was made from, if these aren't archives.
        format: version of this layout.
    """

    name: str
    classes: tuple[str, ...]
    ignore_index: int | None
    columns: dict[str, Role]
    splits: dict[str, Split]
    archives: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    version: str = ""
    format: int = FORMAT

    @property
    def info(self) -> DataInfo:
        """What tasks and models must know of the set."""
        return DataInfo(self.classes, self.ignore_index, self.statistics)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything but its origin: sets with equal fingerprints contain the same rows."""
        content = asdict(self) | dict.fromkeys(("notes", "command", "version"))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """SHA-256, in hex, of the training and validation rows and of what their labels mean.

        Runs record it, so every later version must compute the same value for the same set.
        """
        rows = [
            (file.sha256, file.row_groups) for split in ("train", "validation") for file in self.splits[split].files
        ]
        return hashlib.sha256(
            json.dumps([self.classes, self.ignore_index, self.columns, rows], sort_keys=True).encode()
        ).hexdigest()

    @property
    def how_to_prepare(self) -> str:
        """Advice on a damaged set."""
        return f"run `trainer prepare {self.command or self.name}` to prepare it again"

    def of_first(self, count: int) -> Card:
        """The card of a set in the same files whose splits are both the first `count` training samples, or all if there
        are fewer.
        """
        files, left = [], count
        for file in self.splits["train"].files:
            groups = []
            for rows in file.row_groups:
                groups.append(min(rows, left))
                left -= groups[-1]
            files.append(replace(file, row_groups=tuple(rows for rows in groups if rows)))
        split = Split(min(count, self.splits["train"].rows), tuple(file for file in files if file.row_groups))
        return replace(self, splits={"train": split, "validation": split})

    def row_groups(self, split: str) -> list[int]:
        """Rows in each row group of a split, over all its files in order."""
        return [rows for file in self.splits[split].files for rows in file.row_groups]

    def files(self, folder: Path, split: str) -> list[Path]:
        """The files of a split, in order."""
        return [folder / file.name for file in self.splits[split].files]

    @classmethod
    def load(cls, folder: Path, command: str = "") -> Card:
        """Reads the card in `folder` and checks that every file exists with its full size.

        Args:
            folder: of the set.
            command: the arguments of `trainer prepare` that make the set, for messages if there is no card; "" stands
                for the folder's name.

        Raises:
            UserError: the card is missing, damaged or of another format, or a file is missing or truncated.
        """
        advice = f"run `trainer prepare {command or folder.name}` to prepare it"
        try:
            text = (folder / CARD).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} contains no prepared data set; {advice}") from None
        except OSError as error:
            raise UserError(f"{folder / CARD} can't be read: {error.strerror}") from error
        try:
            version = json.loads(text).get("format")
            if version != FORMAT:
                raise UserError(
                    f"{folder / CARD} has format {version}, but this version reads format {FORMAT}; {advice} again"
                )
            card = _reader.validate_json(text)
            if not card._is_sound():
                raise ValueError
        except (ValueError, AttributeError, RecursionError, ValidationError) as error:
            raise UserError(f"{folder / CARD} is damaged; {advice} again") from error
        for file in card._files():
            path = folder / file.name
            size = path.stat().st_size if path.is_file() else None
            if size != file.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
                raise UserError(f"{path} {state}; {card.how_to_prepare}")
        return card

    def save(self, folder: Path) -> None:
        """Writes `card.json`."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def verify(self, folder: Path, everything: bool = True) -> None:
        """Compares files with their checksums, and records the size and time of each intact one in `verified.json`.

        Args:
            folder: of the set; if it is read-only, nothing is recorded and the next call compares again.
            everything: False skips files whose size and modification time are still the recorded ones.

        Raises:
            UserError: a file has changed or can't be read; the message names the first.
        """
        verified = {} if everything else _read_verified(folder)
        states: dict[str, Any] = {}
        for file in self._files():
            path = folder / file.name
            try:
                states[file.name] = state = _state(path, file)  # before the file is read
                intact = verified.get(file.name) == state or sha256(path) == file.sha256
            except OSError as error:
                raise UserError(f"{path} can't be read: {error.strerror or error}") from error
            if not intact:
                raise UserError(
                    f"{path} has changed since it was prepared; delete {folder}, then {self.how_to_prepare}"
                )
        if states != verified:
            with suppress(OSError):
                _write_verified(folder, states)

    def mark_verified(self, folder: Path) -> None:
        """Records every file as intact, just after it was written."""
        _write_verified(folder, {file.name: _state(folder / file.name, file) for file in self._files()})

    def _is_sound(self) -> bool:
        """Whether the content is consistent: files of this folder, large enough for their rows."""
        return self.splits.keys() - {"test"} == {"train", "validation"} and all(
            re.fullmatch(rf"{name}/\d{{5}}\.parquet", file.name)
            and min(file.row_groups, default=0) > 0
            and sum(file.row_groups) <= file.bytes
            for name, split in self.splits.items()
            for file in split.files
        )

    def _files(self) -> list[DataFile]:
        return [file for split in self.splits.values() for file in split.files]


_reader = TypeAdapter(Card)


def _state(path: Path, file: DataFile) -> list[Any]:
    """Identifies a file without reading it: the checksum on the card, its size and modification time."""
    status = path.stat()
    return [file.sha256, status.st_size, status.st_mtime_ns]


def _read_verified(folder: Path) -> dict[str, Any]:
    try:
        verified = json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError, RecursionError):  # missing or damaged: everything is compared again
        return {}
    return verified if isinstance(verified, dict) else {}


def _write_verified(folder: Path, states: dict[str, Any]) -> None:
    (folder / VERIFIED).write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
