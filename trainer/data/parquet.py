"""Parquet files of a prepared set: the writer and, through `datasets` streaming, the reader."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.card import Card, DataFile, Split, sha256
from trainer.data.source import Row
from trainer.errors import UserError

# An epoch shuffles row groups, so a set needs several; and a reader holds entire row groups in memory.
GROUP_ROWS = 64

GROUP_BYTES = 2**20

MIN_GROUPS = 8

FILE_BYTES = 256 * 2**20


class SplitWriter:
    """Writes the rows of one split: full row groups, then the rest in `MIN_GROUPS` groups of equal size."""

    def __init__(self, folder: Path, split: str, schema: Any) -> None:
        self.folder, self.split, self.schema = folder, split, schema
        self.rows = 0
        self.pending: list[list[Row]] = [[]]  # row groups
        self.bytes = 0  # in the last pending group
        self.files: list[DataFile] = []
        self.writer: Any = None
        self.groups: list[int] = []  # of the open file
        (folder / split).mkdir(parents=True)

    def add(self, row: Row) -> None:
        """Adds a row; writes the oldest row group once enough are pending."""
        self.rows += 1
        self.pending[-1].append(row)
        self.bytes += sum(len(value["bytes"]) for value in row.values() if isinstance(value, dict))
        if len(self.pending[-1]) == GROUP_ROWS or self.bytes >= GROUP_BYTES:
            self.pending.append([])
            self.bytes = 0
        if len(self.pending) > MIN_GROUPS:
            self._write_group(self.pending.pop(0))

    def close(self) -> Split:
        """Writes the remaining rows; returns the split."""
        rows = [row for group in self.pending for row in group]
        count = min(MIN_GROUPS, len(rows))
        for i in range(count):
            self._write_group(rows[i * len(rows) // count : (i + 1) * len(rows) // count])
        self._close_file()
        return Split(self.rows, tuple(self.files))

    def abandon(self) -> None:
        """Closes the open file, which the caller deletes; errors on writing its rest don't matter."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()
            with suppress(OSError):
                self.file.close()

    def _write_group(self, rows: list[Row]) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        if self.writer is None:
            self.file = (self.folder / self.split / f"{len(self.files):05d}.parquet").open("wb")
            # Images are already compressed and all different: neither compression nor dictionaries nor statistics help.
            self.writer = ParquetWriter(
                self.file, self.schema, compression="none", use_dictionary=False, write_statistics=False
            )
        self.writer.write_table(pa.Table.from_pylist(rows, schema=self.schema), row_group_size=len(rows))
        self.groups.append(len(rows))
        if self.file.tell() >= FILE_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self.writer is None:
            return
        self.writer.close()
        self.file.close()
        path = Path(self.file.name)
        name = f"{self.split}/{path.name}"
        self.files.append(DataFile(name, sha256(path), path.stat().st_size, tuple(self.groups)))
        self.writer, self.groups = None, []


class Unreadable(Exception):
    """A sample or row group can't be read; the message names the file and the reason."""


class RowGroups:
    """Undecoded rows of a split, one Parquet row group at a time, through `datasets` streaming.

    Args:
        files: rows in each row group of the split's Parquet files, in order.
        keep: row groups held in memory; the least recently used is evicted.
    """

    def __init__(self, files: Mapping[Path, Sequence[int]], keep: int) -> None:
        self.files, self.keep = files, keep
        self.groups = [(file, count) for file, counts in files.items() for count in counts]
        self._stream: Any = None
        self._held: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None, "_held": OrderedDict()}

    def row(self, group: int, index: int) -> dict[str, Any]:
        """One row; image columns are `{"bytes": …, "path": …}`.

        Raises:
            Unreadable: its row group can't be read.
        """
        if group not in self._held:
            self._held[group] = self._read(group)
            if len(self._held) > self.keep:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group][index]

    def _read(self, group: int) -> list[dict[str, Any]]:
        file, count = self.groups[group]
        try:
            if self._stream is None:
                import datasets

                datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, below
                # Or it sends a request to the Hub for each set, and without a network waits for it.
                datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
                stream = datasets.load_dataset(
                    "parquet", data_files={"split": [str(file) for file in self.files]}, split="split", streaming=True
                )
                self._stream = stream.decode(False).reshard()  # one shard per row group
            shard = self._stream.shard(num_shards=self._stream.num_shards, index=group)
            # Not list(shard), which inside a loader worker would split the row group among the workers.
            columns = next(iter(shard.iter(batch_size=count)))
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            if len(rows) != count:
                raise ValueError(f"it has {len(rows)} rows instead of {count}")
        except Exception as error:  # deleted or damaged files raise all kinds of errors
            raise Unreadable(
                f"row group {group} of the split, in {file}, can't be read: {first_line(error)}"
            ) from error
        return rows

    def integers(self, name: str) -> npt.NDArray[np.int64]:
        """An entire column of integers: int64 (N,)."""
        return np.array(self.column(name).to_pylist(), dtype=np.int64)

    def arrays(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """An entire column of arrays: float32 (N, …)."""
        return np.concatenate([chunk.flatten().to_numpy() for chunk in self.column(name).chunks]).reshape(-1, *shape)

    def sizes(self) -> npt.NDArray[np.int64]:
        """Height and width of every image as prepared: int64 (N, 2)."""
        return np.stack([self.integers("height"), self.integers("width")], axis=1)

    def column(self, name: str) -> Any:
        """An entire column as an Arrow array, or `column.field`, a struct of only that field.

        Raises:
            UserError: a file can't be read.
        """
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        chunks = []
        for file, counts in self.files.items():
            try:
                # Not read_table(), which imports pandas and delays the start by seconds.
                values = ParquetFile(file).read([name], use_pandas_metadata=False).column(0)
                if len(values) < sum(counts):
                    raise ValueError(f"it has {len(values)} rows instead of {sum(counts)}")
            except Exception as error:  # Arrow's errors on damaged files have no narrower common base
                raise UserError(
                    f"{file} can't be read: {first_line(error)}; {how_to_repair(file.parents[1])}"
                ) from error
            chunks += values.slice(0, sum(counts)).chunks
        return pa.chunked_array(chunks)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def how_to_repair(folder: Path) -> str:
    """Advice on a prepared set that can't be read."""
    advice = f"run `trainer prepare {folder.name}` to prepare it again"
    with suppress(UserError):  # the card may be damaged, too
        advice = Card.load(folder).how_to_prepare
    return f"delete {folder}, then {advice}"
