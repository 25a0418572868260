"""The samples of a split by their ids: images, masks and objects sample by sample, columns of numbers whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.transforms import v2

from trainer.data.arrays import shape_of
from trainer.data.augment import Sample
from trainer.data.cache import machine_folder
from trainer.data.card import Card
from trainer.data.objects import ROLES, Letterbox, Objects
from trainer.data.order import Layout
from trainer.data.parquet import RowGroups, Unreadable
from trainer.data.pixels import Pixels
from trainer.data.roles import rules_of
from trainer.data.unreadable import StandIns


class Reader:
    """Reads the samples of one split.

    Args:
        folder: the prepared data set.
        card: its card.
        split: `train` or `validation`.
        resize: the deterministic resize of images, masks and objects, or None.
        cache: whether decoded pixels are kept in a memory map.
        window: row groups in a window of the order; the reader holds twice as many in memory.
        max_unreadable: how many samples may be unreadable, in one process; the next readable one takes the place of
            each. None where metrics need every sample.

    Attributes:
        place: what messages call the split, e.g. `shapes/train`.
        numbers: columns of labels, int64 (N,), and of arrays, float32 (N, …), of all samples.
        pixels: the images and masks, where there are any.
        objects: their objects, where there are any.
        stand_ins: the samples that can't be read.
    """

    def __init__(
        self,
        folder: Path,
        card: Card,
        split: str,
        *,
        resize: v2.Resize | Letterbox | None = None,
        cache: bool = True,
        window: int = 2,
        max_unreadable: int | None = None,
    ) -> None:
        self.place, self.columns = f"{folder.name}/{split}", card.columns
        self.layout = Layout(card.row_groups(split))
        self.stand_ins = StandIns(folder, split, len(self), max_unreadable)
        files = {folder / shard.name: shard.row_groups for shard in card.splits[split].files}
        self.rows = RowGroups(files, keep=2 * window)
        self.objects: Objects | None = None
        self.pixels: Pixels | None = None
        pixel_columns = {name: role for name, role in self.columns.items() if rules_of(role).sized}
        if pixel_columns:
            objects = [(name, role) for name, role in self.columns.items() if role in ROLES]
            if objects or not resize:
                sizes = self.rows.sizes()
            for name, role in objects[:1]:
                self.objects = Objects(self.rows.column(name), sizes, role, resize)
            shape = "native"
            if resize:
                sizes = np.tile(np.asarray(resize.size, dtype=np.int64), (len(self), 1))
                shape = "x".join(map(str, resize.size)) + "-letterbox" * isinstance(resize, Letterbox)
            cached = machine_folder(folder / "cache") / card.fingerprint[:16] / f"{split}-{shape}" if cache else None
            self.pixels = Pixels(self.rows, self.layout, pixel_columns, sizes, resize, cached)
        self.numbers = {name: values for name in self.columns if (values := self._numbers(name)) is not None}

    def _numbers(self, name: str) -> npt.NDArray[Any] | None:
        """A column of labels or arrays, read whole."""
        if self.columns[name] == "label":
            return self.rows.integers(name)
        shape = shape_of(self.columns[name])
        return self.rows.arrays(name, shape) if shape else None

    def __len__(self) -> int:
        return self.layout.size

    def read(self, sample_id: int) -> tuple[int, Sample]:
        """The images, masks and objects of a sample, or of the one that stands in for it; and which one that is.

        Raises:
            TrainingFailed: too many samples are unreadable.
        """
        while True:
            found = self.stand_ins.of(sample_id)
            try:
                sample = self.pixels.read(found) if self.pixels else {}
                return found, sample | (self.objects.read(found) if self.objects else {})
            except Unreadable as error:
                self.stand_ins.add({found: str(error)})

    def file_names(self) -> list[str]:
        """Of each sample's image; empty where it has none."""
        image = next((name for name, role in self.columns.items() if role == "image"), None)
        if image is None:
            return [""] * len(self)
        return [each["path"] or "" for each in self.rows.column(f"{image}.path").to_pylist()]
