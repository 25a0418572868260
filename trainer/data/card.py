"""The card of a prepared data set: what its folder holds, and how to see that it still holds it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from trainer.data.source import DataInfo, Role
from trainer.errors import UserError

FORMAT = 1
CARD = "card.json"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        splits: `train` and `validation`.
        archives: SHA-256 of each archive the rows were read from.
        notes: sentences for people, e.g. how the set was split.
        format: version of this layout.
    """

    name: str
    classes: tuple[str, ...]
    ignore_index: int | None
    columns: dict[str, Role]
    splits: dict[str, Split]
    archives: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def info(self) -> DataInfo:
        """What tasks and models must know of the set."""
        return DataInfo(self.classes, self.ignore_index)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over everything but the notes: two sets that share it hold the same rows."""
        content = asdict(self) | {"notes": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def row_groups(self, split: str) -> list[int]:
        """Rows in each row group of a split, over all its files in order."""
        return [rows for shard in self.splits[split].files for rows in shard.row_groups]

    def files(self, folder: Path, split: str) -> list[Path]:
        """The files of a split, in order."""
        return [folder / shard.name for shard in self.splits[split].files]

    @classmethod
    def load(cls, folder: Path) -> Card:
        """Reads the card in `folder` and checks that every file is there in its full size.

        Raises:
            UserError: there is no card, it is damaged or of another format, or a file is missing or cut short.
        """
        again = f"`trainer prepare {folder.name}` makes it again"
        try:
            text = (folder / CARD).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{folder} holds no prepared data set; `trainer prepare {folder.name}` makes it") from None
        except OSError as error:
            raise UserError(f"{folder / CARD} can't be read: {error.strerror}") from error
        try:
            found = json.loads(text).get("format")
            if found != FORMAT:
                raise UserError(f"{folder / CARD} has format {found}, this version reads format {FORMAT}; {again}")
            card = _reader.validate_json(text)
        except (ValueError, AttributeError, RecursionError, ValidationError) as error:
            raise UserError(f"{folder / CARD} is damaged; {again}") from error
        for shard in card._shards():
            path = folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
                raise UserError(f"{path} {state}; {again}")
        return card

    def save(self, folder: Path) -> None:
        """Writes `card.json`."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def verify(self, folder: Path) -> None:
        """Recomputes every checksum.

        Raises:
            UserError: names the first file that isn't what was written.
        """
        for shard in self._shards():
            if sha256(folder / shard.name) != shard.sha256:
                raise UserError(f"{folder / shard.name} has changed since it was prepared; delete {folder}, then `trainer prepare {self.name}` makes it again")

    def _shards(self) -> list[Shard]:
        return [shard for split in self.splits.values() for shard in split.files]


_reader = TypeAdapter(Card)
