"""Reads the samples of a split by id: images, masks and objects one at a time, labels and arrays as entire columns."""

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
        resize: applied to images, masks and objects, or None.
        cache: whether to cache decoded pixels in a memory map.
        window: row groups in a window of the order; the reader keeps twice as many in memory.
        max_unreadable: how many unreadable samples a process tolerates; the next readable sample replaces each. None
            if metrics need every sample.

    Attributes:
        name: of the split in messages, e.g. `shapes/train`.
        preloaded: columns of labels, int64 (N,), and of arrays, float32 (N, …), of all samples.
        pixels: images and masks; None if the set has neither.
        objects: boxes and masks of objects; None if the set has none.
        stand_ins: which samples replace unreadable ones.
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
        self.name, self.columns = f"{folder.name}/{split}", card.columns
        self.layout = Layout(card.row_groups(split))
        self.stand_ins = StandIns(folder, split, len(self), max_unreadable)
        files = {folder / file.name: file.row_groups for file in card.splits[split].files}
        self.rows = RowGroups(files, keep=2 * window)
        self.objects: Objects | None = None
        self.pixels: Pixels | None = None
        pixel_columns = {name: role for name, role in self.columns.items() if rules_of(role).sized}
        if pixel_columns:
            object_columns = [(name, role) for name, role in self.columns.items() if role in ROLES]
            if object_columns or not resize:
                sizes = self.rows.sizes()  # as prepared
            for name, role in object_columns[:1]:  # a set has at most one
                self.objects = Objects(self.rows.column(name), sizes, role, resize)
            shape = "native"
            if resize:
                sizes = np.tile(np.asarray(resize.size, dtype=np.int64), (len(self), 1))  # after the resize
                shape = "x".join(map(str, resize.size)) + "-letterbox" * isinstance(resize, Letterbox)
            cache_folder = (
                machine_folder(folder / "cache") / card.fingerprint[:16] / f"{split}-{shape}" if cache else None
            )
            self.pixels = Pixels(self.rows, self.layout, pixel_columns, sizes, resize, cache_folder)
        self.preloaded = {name: values for name in self.columns if (values := self._preload(name)) is not None}

    def _preload(self, name: str) -> npt.NDArray[Any] | None:
        """An entire column of labels or arrays; None for other roles."""
        if self.columns[name] == "label":
            return self.rows.integers(name)
        shape = shape_of(self.columns[name])
        return self.rows.arrays(name, shape) if shape else None

    def __len__(self) -> int:
        return self.layout.size

    def read(self, sample_id: int) -> tuple[int, Sample]:
        """The images, masks and objects of a sample, after its id; of another sample if this one is unreadable.

        Raises:
            TrainingFailed: too many samples are unreadable.
        """
        while True:
            read_id = self.stand_ins.of(sample_id)
            try:
                sample = self.pixels.read(read_id) if self.pixels else {}
                return read_id, sample | (self.objects.read(read_id) if self.objects else {})
            except Unreadable as error:
                self.stand_ins.add({read_id: str(error)})

    def file_names(self) -> list[str]:
        """File name of each sample's image; empty if it has none."""
        image = next((name for name, role in self.columns.items() if role == "image"), None)
        if image is None:
            return [""] * len(self)
        return [each["path"] or "" for each in self.rows.column(f"{image}.path").to_pylist()]
