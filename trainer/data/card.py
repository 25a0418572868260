"""The card of a prepared data set: what its folder holds, and how to see that it still holds it."""

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
    """SHA-256 of a file, in hex; a stop that was asked for ends it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            STOP.raise_if_asked()
    return digest.hexdigest()


@dataclass(frozen=True)
class Shard:
    """One Parquet file.

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
    """One split: its number of rows and the files that hold them, in order."""

    rows: int
    files: tuple[Shard, ...]


@dataclass(frozen=True)
class Card:
    """What `card.json` says.

    Attributes:
        name: of the data set; its folder is called the same.
        classes: names in the order of their index.
        ignore_index: the label that counts nowhere, or None.
        columns: role of each column that the source describes; `height` and `width` come on top.
        splits: `train` and `validation`, and perhaps `test`, which no training reads.
        archives: SHA-256 of each archive the rows were read from.
        notes: lines for people, e.g. how the set was split.
        statistics: what was measured when it was prepared: `class_pixels` (list of int, the pixels of each class in the
            training split; ignored ones left out) where there is a column `mask`, `class_objects` (list of int, the
            objects of each class in the training split; crowds left out) where there is a column `objects`, and what
            the set adds, e.g. colour centres.
        command: what follows `trainer prepare` to make it again; "" is the name alone.
        version: of the files it was made from, where these are no archives.
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
        """SHA-256 in hex over everything but how it came about: two sets that share it hold the same rows."""
        content = asdict(self) | dict.fromkeys(("notes", "command", "version"))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> str:
        """SHA-256 in hex of the rows that train and validate, and of what their labels mean.

        Runs record it, so no later version may compute another one of the same set.
        """
        rows = [
            (shard.sha256, shard.row_groups) for split in ("train", "validation") for shard in self.splits[split].files
        ]
        return hashlib.sha256(
            json.dumps([self.classes, self.ignore_index, self.columns, rows], sort_keys=True).encode()
        ).hexdigest()

    @property
    def again(self) -> str:
        """What to do about a damaged set."""
        return f"`trainer prepare {self.command or self.name}` makes it again"

    def of_first(self, count: int) -> Card:
        """The card of a set that trains and validates on the first `count` training samples (all,
        where there are fewer), in the same files.
        """
        shards, left = [], count
        for shard in self.splits["train"].files:
            groups = []
            for rows in shard.row_groups:
                groups.append(min(rows, left))
                left -= groups[-1]
            shards.append(replace(shard, row_groups=tuple(rows for rows in groups if rows)))
        split = Split(min(count, self.splits["train"].rows), tuple(shard for shard in shards if shard.row_groups))
        return replace(self, splits={"train": split, "validation": split})

    def row_groups(self, split: str) -> list[int]:
        """Rows in each row group of a split, over all its files in order."""
        return [rows for shard in self.splits[split].files for rows in shard.row_groups]

    def files(self, folder: Path, split: str) -> list[Path]:
        """The files of a split, in order."""
        return [folder / shard.name for shard in self.splits[split].files]

    @classmethod
    def load(cls, folder: Path, command: str = "") -> Card:
        """Reads the card in `folder` and checks that every file is there in its full size.

        Args:
            folder: of the set.
            command: what follows `trainer prepare` to make it, where there is no card to say so; "" is the folder's
                name.

        Raises:
            UserError: there is no card, it is damaged or of another format, or a file is missing or cut short.
        """
        makes = f"`trainer prepare {command or folder.name}` makes it"
        try:
            text = (folder / CARD).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} holds no prepared data set; {makes}") from None
        except OSError as error:
            raise UserError(f"{folder / CARD} can't be read: {error.strerror}") from error
        try:
            version = json.loads(text).get("format")
            if version != FORMAT:
                raise UserError(
                    f"{folder / CARD} has format {version}, this version reads format {FORMAT}; {makes} again"
                )
            card = _reader.validate_json(text)
            if not card._is_sound():
                raise ValueError
        except (ValueError, AttributeError, RecursionError, ValidationError) as error:
            raise UserError(f"{folder / CARD} is damaged; {makes} again") from error
        for shard in card._shards():
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"{path} {state}; {card.again}")
        return card

    def save(self, folder: Path) -> None:
        """Writes `card.json`."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def verify(self, folder: Path, everything: bool = True) -> None:
        """Compares files with their checksums, and notes in `verified.json` the state in which each was right.

        Args:
            folder: of the set; where it can't be written, nothing is noted and the next one compares again.
            everything: False leaves out files whose size and time of change are still the noted ones.

        Raises:
            UserError: names the first file that isn't what was written.
        """
        noted = {} if everything else _read_noted(folder)
        states: dict[str, Any] = {}
        for shard in self._shards():
            path = folder / shard.name
            try:
                states[shard.name] = state = _state(path, shard)  # taken before the file is read
                same = noted.get(shard.name) == state or sha256(path) == shard.sha256
            except OSError as error:
                raise UserError(f"{path} can't be read: {error.strerror or error}") from error
            if not same:
                raise UserError(f"{path} has changed since it was prepared; delete {folder}, then {self.again}")
        if states != noted:
            with suppress(OSError):
                _write_noted(folder, states)

    def note_verified(self, folder: Path) -> None:
        """Notes that every file is right: they have just been written."""
        _write_noted(folder, {shard.name: _state(folder / shard.name, shard) for shard in self._shards()})

    def _is_sound(self) -> bool:
        """Whether what it says fits together: files of this folder that can hold as many
        rows as their row groups have.
        """
        return self.splits.keys() - {"test"} == {"train", "validation"} and all(
            re.fullmatch(rf"{name}/\d{{5}}\.parquet", shard.name)
            and min(shard.row_groups, default=0) > 0
            and sum(shard.row_groups) <= shard.bytes
            for name, split in self.splits.items()
            for shard in split.files
        )

    def _shards(self) -> list[Shard]:
        return [shard for split in self.splits.values() for shard in split.files]


_reader = TypeAdapter(Card)


def _state(path: Path, shard: Shard) -> list[Any]:
    """What a file whose checksum was right looks like from outside."""
    status = path.stat()
    return [shard.sha256, status.st_size, status.st_mtime_ns]


def _read_noted(folder: Path) -> dict[str, Any]:
    try:
        noted = json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError, RecursionError):  # none, or half of one: as if nothing had ever been verified
        return {}
    return noted if isinstance(noted, dict) else {}


def _write_noted(folder: Path, states: dict[str, Any]) -> None:
    (folder / VERIFIED).write_text(json.dumps(states, indent=1) + "\n", encoding="utf-8")
