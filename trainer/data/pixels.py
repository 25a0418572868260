"""Images and masks of a split: decoded and resized, only once if cached."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from trainer.data.cache import PixelCache
from trainer.data.images import check_png
from trainer.data.order import Layout
from trainer.data.parquet import RowGroups, Unreadable, first_line

_READ = {"image": (ImageReadMode.RGB, tv_tensors.Image, 3), "mask": (ImageReadMode.UNCHANGED, tv_tensors.Mask, 1)}


class Pixels:
    """Reads the image and mask columns of a sample: uint8 (C, H, W) each.

    Args:
        rows: the undecoded rows of the split.
        layout: locates each sample in its row group.
        columns: role of each image and mask column.
        sizes: int64 (N, 2), height and width of every sample after the resize.
        resize: applied to images and masks, or None.
        cache_folder: where decoded pixels are cached; None decodes every time.
    """

    def __init__(
        self,
        rows: RowGroups,
        layout: Layout,
        columns: Mapping[str, str],
        sizes: npt.NDArray[np.int64],
        resize: v2.Transform | None,
        cache_folder: Path | None,
    ) -> None:
        self.rows, self.layout, self.columns, self.sizes, self.resize = rows, layout, dict(columns), sizes, resize
        self.cache = self._open_cache(cache_folder) if cache_folder else None

    def _open_cache(self, folder: Path) -> PixelCache | None:
        try:
            return PixelCache(folder, {name: _READ[role][2] for name, role in self.columns.items()}, self.sizes)
        except OSError as error:
            print(f"data.cache is disabled: {folder} can't be used ({error.strerror or error})", file=sys.stderr)
            return None

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same size."""
        return bool((self.sizes == self.sizes[0]).all())

    def read(self, sample_id: int) -> dict[str, Tensor]:
        """The images and masks of one sample, from the cache if possible.

        Raises:
            Unreadable: they can't be decoded, or their size has changed since they were prepared.
        """
        if self.cache is None:
            return self._decode(sample_id)
        if sample_id not in self.cache:
            self.cache.write(sample_id, self._decode(sample_id))
        return {name: _READ[self.columns[name]][1](pixels) for name, pixels in self.cache.read(sample_id).items()}

    def read_cached(self, sample_ids: Sequence[int]) -> dict[str, Tensor] | None:
        """Samples of one size, uint8 (B, C, H, W) for each column; None unless all of them are cached."""
        if self.cache is None or not self.cache.uniform or not all(each in self.cache for each in sample_ids):
            return None
        return self.cache.read_batch(list(sample_ids))

    def _decode(self, sample_id: int) -> dict[str, Tensor]:
        row = self.rows.row(*self.layout.group(sample_id))
        sample: dict[str, Any] = {}
        for name, role in self.columns.items():
            mode, kind, channels = _READ[role]
            try:
                check_png(row[name]["bytes"])
                pixels = kind(decode_image(torch.frombuffer(bytearray(row[name]["bytes"]), dtype=torch.uint8), mode))
                sample[name] = self.resize(pixels) if self.resize else pixels
                # Pixels of another size would overwrite neighbouring samples in the cache.
                if sample[name].shape != (channels, *self.sizes[sample_id]):
                    raise ValueError(f"it has the shape {tuple(pixels.shape)}")
            except Exception as error:  # damaged bytes raise all kinds of errors
                raise Unreadable(
                    f"{row[name]['path'] or 'no file name'}: {name} can't be decoded: {first_line(error)}"
                ) from error
        return sample
