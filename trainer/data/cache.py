"""Decoded, resized pixels in a memory map: an image is decoded once, not once per epoch.

The first epoch fills the cache, sample by sample; later epochs read it and never open the Parquet files. One file
stores every sample at a fixed offset, another has a byte per sample that marks it as present. All processes and workers
of a machine can thus fill the cache together without a lock. The operating system's page cache keeps in memory what
fits.
"""

from __future__ import annotations

import errno
import glob
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

SPARE_BYTES = 2**30  # to leave free on the disk
# macOS has no posix_fallocate.
_allocate = getattr(os, "posix_fallocate", None) or (lambda descriptor, start, size: os.ftruncate(descriptor, size))


class PixelCache:
    """A uint8 memory map of the image and mask columns of a split.

    Args:
        folder: of the files; its name includes the data and the resize, so a change of either uses another folder.
        channels: number of channels of each column, e.g. `{"image": 3, "mask": 1}`.
        sizes: int64 (N, 2), height and width of every sample.

    Raises:
        OSError: the folder can't be written or the disk has no room for all samples.
    """

    def __init__(self, folder: Path, channels: Mapping[str, int], sizes: npt.NDArray[np.int64]) -> None:
        self.channels = dict(channels)
        self.sizes = sizes
        pixels = sizes[:, 0] * sizes[:, 1]
        self.starts = np.concatenate([[0], np.cumsum(pixels * sum(channels.values()))])
        self.uniform = bool(len(sizes)) and bool((sizes == sizes[0]).all())
        folder.mkdir(parents=True, exist_ok=True)
        self.pixels = _reserve(folder / "pixels.u8", max(1, int(self.starts[-1])))
        self.filled = _reserve(folder / "filled.u8", max(1, len(sizes)))

    def __contains__(self, sample_id: int) -> bool:
        return bool(self.filled[sample_id])

    def read(self, sample_id: int) -> dict[str, Tensor]:
        """A copy of one sample: uint8 (C, H, W) for each column."""
        flat = self.pixels[self.starts[sample_id] : self.starts[sample_id + 1]]
        return {
            column: pixels[0] for column, pixels in self._split(torch.from_numpy(flat.copy())[None], sample_id).items()
        }

    def read_batch(self, sample_ids: list[int]) -> dict[str, Tensor]:
        """Samples of one size, all in the cache: uint8 (B, C, H, W) for each column."""
        assert self.uniform
        rows = self.pixels.reshape(len(self.sizes), -1)[sample_ids]
        return self._split(torch.from_numpy(rows), 0)

    def write(self, sample_id: int, sample: Mapping[str, Tensor]) -> None:
        """Stores one sample; marks it as present last."""
        start = self.starts[sample_id]
        for column in self.channels:
            flat = sample[column].numpy().reshape(-1)
            self.pixels[start : start + flat.size] = flat
            start += flat.size
        assert start == self.starts[sample_id + 1]
        self.filled[sample_id] = 1

    def _split(self, rows: Tensor, sample_id: int) -> dict[str, Tensor]:
        """Splits rows (B, bytes) of samples as large as `sample_id` into columns (B, C, H, W)."""
        height, width = self.sizes[sample_id].tolist()
        parts = rows.split([channels * height * width for channels in self.channels.values()], dim=1)
        return {
            column: part.reshape(len(rows), channels, height, width)
            for (column, channels), part in zip(self.channels.items(), parts, strict=True)
        }


def _reserve(file: Path, size: int) -> Bytes:
    """Maps a file of `size` bytes. The space is allocated now: on a full disk, a later write would raise SIGBUS."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        present = os.fstat(descriptor).st_size
        if present < size:  # never twice: another process may be filling it
            if shutil.disk_usage(file.parent).free < size - present + SPARE_BYTES:
                raise OSError(errno.ENOSPC, f"{size / 2**30:.1f} GiB would leave too little space for checkpoints")
            try:
                _allocate(descriptor, 0, size)
            except OSError:
                os.ftruncate(descriptor, present)
                raise
    finally:
        os.close(descriptor)
    return np.memmap(file, dtype=np.uint8, mode="r+", shape=(size,))


def machine_folder(root: Path) -> Path:
    """The folder below `root` for this machine and its current boot; removes those of earlier boots.

    Each machine has its own cache since memory maps on a network file system are not coherent between machines. Each
    boot has its own since after a crash a sample may be marked as present without being on disk.
    """
    node = platform.node() or "localhost"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        boot = "unknown"
    for old in root.glob(f"{glob.escape(node)}.*"):
        if old.name != f"{node}.{boot}":
            shutil.rmtree(old, ignore_errors=True)
    return root / f"{node}.{boot}"
