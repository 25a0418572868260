"""Preparing a data set: its archives become Parquet files with many small row groups, once.

    <data>/<name>/card.json
    <data>/<name>/train/00000.parquet …
    <data>/<name>/validation/00000.parquet …
    <data>/<name>/test/00000.parquet …         where there is a test split

Rows are written to a hidden folder beside it, which is renamed at the very end: a set is whole or it isn't there.
"""

from __future__ import annotations

import inspect
import io
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from trainer.data.archives import Member, locate, locked
from trainer.data.card import CARD, Card, Shard, Split, sha256
from trainer.data.object_checks import OBJECTS, checked_objects
from trainer.data.png import check_png
from trainer.data.source import Role, Row, Source
from trainer.errors import UserError
from trainer.signals import STOP

# An epoch shuffles row groups, so a set needs several, and a row group is what a reader holds in memory.
GROUP_ROWS = 64
GROUP_BYTES = 2**20
MIN_GROUPS = 8
FILE_BYTES = 256 * 2**20

MASK = "mask"  # the column of class indices
IGNORED = 255  # the label that most sets with one ignore
SHOWN = 5  # objects that a note lists, and labels or differences that a message does
DEPTH_BYTE = 24  # of a PNG, where it says how many bits a channel has

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
                raise UserError(f"{folder} exists but isn't a prepared data set; move it away, or set TRAINER_DATA to another folder")
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
    if made.split()[0] != makes.split()[0] and (card.version or source.version):  # a set of files: nothing else can make it again
        raise UserError(
            f"{folder} was made by `trainer prepare {made}`, which `trainer prepare {makes}` would replace; choose another name, or delete {folder}"
        )
    if (card.info, card.columns, {*card.splits}, card.version) != (source.info, source.columns, {*source.splits}, source.version):
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
            **{option: value for option, value in zip(words[::2], words[1::2], strict=False) if option.startswith("--")},
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
        raise UserError(f"{name} can't be written to {folder}: {reason} ({free:.0f} MiB free); make room, or set TRAINER_DATA to another folder") from error


# ---------------------------------------------------------------- rows


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 (H, W, 3) as an RGB, uint8 (H, W) as a one-channel PNG whose pixels are the values themselves."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _open(data: bytes) -> Image.Image:
    """Opens an image of any format that Pillow reads, but for PostScript: Pillow would have Ghostscript run it."""
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":
        raise ValueError("a PostScript file is a program")
    return image


def read_indices(data: bytes) -> np.ndarray:
    """Decodes a one-channel image to its indices, uint8 (H, W); of a palette image they are not the colours.

    Raises:
        ValueError: the image has several channels, or more than 8 bits.
    """
    with _open(data) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"a mask has one channel of 8 bits, this image has mode {image.mode}")
        return np.asarray(image).astype(np.uint8)


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height that an image will have when it is stored, which is upright; only its header is decoded."""
    check_png(data)
    with _open(data) as image:
        on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
        return image.size[::-1] if on_its_side else image.size


def _checked_image(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """Decodes an image fully; returns its own bytes, or a PNG where they need rotating or aren't 8-bit JPEG or PNG, and (width, height)."""
    with _open(data) as image:
        image.load()
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"it has mode {image.mode}, not 8 bits a channel")  # Pillow would cut off at 255
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        deep = image.format == "PNG" and data[DEPTH_BYTE] == 16
        if image.format in ("JPEG", "MPO", "PNG") and not rotated and not deep:  # MPO: a camera's JPEG with a second picture behind it
            return data, image.size
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return encode_png(np.asarray(upright)), upright.size


def _checked_mask(data: bytes) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """Decodes a mask fully; returns it as one-channel index PNG, and its indices (H, W)."""
    indices = read_indices(data)
    with _open(data) as image:
        ready = image.format == "PNG" and image.mode == "L"
    return data if ready else encode_png(indices), indices


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
            remedy = f"if {unknown[-1]} marks pixels that don't count, pass {source.ignore_option.format(unknown[-1])}; otherwise {remedy}"
        labels = ", ".join(map(str, unknown[:SHOWN]))
        raise ValueError(f"this mask holds the labels {labels}; classes are 0 to {info.num_classes - 1}, and {ignored}; {remedy}")
    return counts[: info.num_classes]


def _checked_row(source: Source, row: Row, place: str) -> tuple[Row, Counts, list[str]]:
    """A row as it is written: `{"bytes", "path"}` for images and masks, `height` and `width`, and the objects as structs.

    Returns:
        The row, the pixels of each class in its `mask` or else its objects of each class, and what is wrong with objects that are left out.
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
        name, data = value if isinstance(value, Member) else (None, value)
        place = name or place
        try:
            check_png(data)
            if role == "image":
                data, sizes[column] = _checked_image(data)
            else:
                data, indices = _checked_mask(data)
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
    schema = _schema(source.columns)
    writers = {split: _SplitWriter(folder, split, schema) for split in source.splits}
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
            raise UserError(f"{', '.join(map(str, paths.values())) or source.name}: no {split} samples; {source.remedy}")
    statistics = source.statistics(paths)
    if MASK in source.columns:
        statistics |= {"class_pixels": class_counts.tolist()}
    if OBJECTS in source.columns:
        statistics |= {"class_objects": class_counts.tolist()}
    notes = (inspect.getdoc(source.rows) or "").splitlines()
    if dropped:
        notes.append(f"{len(dropped)} objects that can't be so are left out: {'; '.join(dropped[:SHOWN])}{'; …' * (len(dropped) > SHOWN)}")
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


def _schema(columns: Mapping[str, Role]) -> Any:
    """Arrow schema with the `datasets` features of each column."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    of_object = {"box": List(Value("float64"), length=4), "label": Value("int64"), "mask": Value("binary"), "crowd": Value("bool")}
    features = {"image": ImageFeature(mode="RGB"), "mask": ImageFeature(mode="L"), "label": Value("int64")}
    features |= dict.fromkeys(("boxes", "instances"), List(of_object))
    sizes = {"height": Value("int64"), "width": Value("int64")} if {"image", "mask"} & set(columns.values()) else {}
    return Features({column: features[role] for column, role in columns.items()} | sizes).arrow_schema


class _SplitWriter:
    """Writes the rows of one split: full row groups, and at the end what is left in `MIN_GROUPS` even ones."""

    def __init__(self, folder: Path, split: str, schema: Any) -> None:
        self.folder, self.split, self.schema = folder, split, schema
        self.rows = 0
        self.waiting: list[list[Row]] = [[]]
        self.bytes = 0  # in the last of the waiting groups
        self.shards: list[Shard] = []
        self.writer: Any = None
        self.groups: list[int] = []  # of the open file
        (folder / split).mkdir(parents=True)

    def add(self, row: Row) -> None:
        self.rows += 1
        self.waiting[-1].append(row)
        self.bytes += sum(len(value["bytes"]) for value in row.values() if isinstance(value, dict))
        if len(self.waiting[-1]) == GROUP_ROWS or self.bytes >= GROUP_BYTES:
            self.waiting.append([])
            self.bytes = 0
        if len(self.waiting) > MIN_GROUPS:
            self._write_group(self.waiting.pop(0))

    def close(self) -> Split:
        rows = [row for group in self.waiting for row in group]
        count = min(MIN_GROUPS, len(rows))
        for i in range(count):
            self._write_group(rows[i * len(rows) // count : (i + 1) * len(rows) // count])
        self._close_file()
        return Split(self.rows, tuple(self.shards))

    def abandon(self) -> None:
        """Closes the open file, which goes with its folder; that what is in memory can't be written any more is no news."""
        if self.writer is not None:
            with suppress(OSError):
                self.writer.close()
            with suppress(OSError):
                self.file.close()

    def _write_group(self, rows: list[Row]) -> None:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        if self.writer is None:
            self.file = (self.folder / self.split / f"{len(self.shards):05d}.parquet").open("wb")
            # Images are compressed already and no two are alike: neither a codec nor a dictionary nor minima and maxima help.
            self.writer = ParquetWriter(self.file, self.schema, compression="none", use_dictionary=False, write_statistics=False)
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
        self.shards.append(Shard(name, sha256(path), path.stat().st_size, tuple(self.groups)))
        self.writer, self.groups = None, []
