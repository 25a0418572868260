"""The Stream: batches in the Order's order, read from Parquet through `datasets` or from the pixel cache.

A row stays undecoded bytes until its sample is really used. Any number of loader workers gives the same
batches: the loader hands each a list of positions and keeps their order.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from trainer.data.cache import PixelCache, machine_folder
from trainer.data.card import Card
from trainer.data.order import Order, Shard, Slices
from trainer.errors import TrainingFailed, UserError
from trainer.signals import STOP_SIGNALS

Sample = dict[str, Any]
Transform = Callable[[Sample], Sample]
_READ = {"image": (ImageReadMode.RGB, tv_tensors.Image, 3), "mask": (ImageReadMode.UNCHANGED, tv_tensors.Mask, 1)}


class RowGroups:
    """Undecoded rows of a split, one Parquet row group at a time, through `datasets` streaming.

    Args:
        files: the split's Parquet files, in order.
        counts: rows in each row group, over all files.
        keep: row groups held in memory (the least recently used goes first).
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], keep: int) -> None:
        self.files, self.counts, self.keep = [str(f) for f in files], list(counts), keep
        self._stream: Any = None
        self._held: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None, "_held": OrderedDict()}

    def row(self, group: int, index: int) -> dict[str, Any]:
        """One row; image columns are `{"bytes": …, "path": …}`."""
        if group not in self._held:
            self._held[group] = self._read(group)
            if len(self._held) > self.keep:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group][index]

    def _read(self, group: int) -> list[dict[str, Any]]:
        if self._stream is None:
            import datasets

            stream = datasets.load_dataset("parquet", data_files={"split": self.files}, split="split", streaming=True)
            self._stream = stream.decode(False).reshard()  # a shard for each row group
            assert self._stream.num_shards == len(self.counts)
        shard = self._stream.shard(num_shards=len(self.counts), index=group)
        # Not list(shard): inside a loader worker that would split the row group among the workers.
        (columns,) = shard.iter(batch_size=self.counts[group])
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        assert len(rows) == self.counts[group]
        return rows

    def column(self, name: str) -> np.ndarray:
        """A column of integers, read whole."""
        from pyarrow.parquet import ParquetFile

        # Not read_table(), which imports pandas: seconds before the first step.
        return np.array([value for file in self.files for value in ParquetFile(file).read([name], use_pandas_metadata=False)[name].to_pylist()])


class Samples(Dataset[Any]):
    """Decoded samples of one split, by position in the Order (training) or by sample id (evaluation).

    Args:
        folder: the prepared data set.
        card: its card.
        split: `train` or `validation`.
        order: the training order; None reads sample ids as they are, without augmentation.
        resize: height and width of the deterministic resize, or None.
        transforms: the augmentations.
        cache: whether pixels are kept in a memory map.
        window: row groups in a window of the order.
    """

    def __init__(
        self, folder: Path, card: Card, split: str, order: Order | None, resize: Sequence[int] | None, transforms: Sequence[Transform], cache: bool, window: int
    ) -> None:
        self.name, self.split, self.columns = card.name, split, card.columns
        self.counts = card.row_groups(split)
        self.order = order
        self.lookup = order or Order(self.counts, 0, window)
        self.rows = RowGroups(card.files(folder, split), self.counts, keep=2 * window)
        self.resize = v2.Resize(list(resize), antialias=True) if resize else None
        self.transform = v2.Compose(list(transforms)) if order and transforms else None
        if resize:
            self.sizes = np.tile(np.asarray(resize, dtype=np.int64), (len(self), 1))
        else:
            self.sizes = np.stack([self.rows.column("height"), self.rows.column("width")], axis=1)
        self.labels = {name: self.rows.column(name) for name, role in self.columns.items() if role == "label"}
        self.cache = self._open_cache(machine_folder(folder / "cache") / card.fingerprint[:16], resize) if cache else None

    def __len__(self) -> int:
        return self.lookup.size

    @property
    def uniform(self) -> bool:
        """Whether all samples have one size before augmentation."""
        return bool((self.sizes == self.sizes[0]).all())

    def _open_cache(self, folder: Path, resize: Sequence[int] | None) -> PixelCache | None:
        channels = {name: _READ[role][2] for name, role in self.columns.items() if role in _READ}
        shape = "x".join(map(str, resize)) if resize else "native"
        try:
            return PixelCache(folder / f"{self.split}-{shape}", channels, self.sizes)
        except OSError as error:
            print(f"data.cache is off: {folder} can't be used ({error.strerror or error})", file=sys.stderr)
            return None

    def _decode(self, sample_id: int) -> dict[str, Tensor]:
        """Reads, decodes and resizes one sample: column -> uint8 (C, H, W)."""
        row = self.rows.row(*self.lookup.group(sample_id))
        sample: dict[str, Any] = {}
        for name, role in self.columns.items():
            if role in _READ:
                mode, kind, _ = _READ[role]
                try:
                    pixels = decode_image(torch.frombuffer(bytearray(row[name]["bytes"]), dtype=torch.uint8), mode)
                except RuntimeError as error:
                    raise TrainingFailed(f"{self.name}/{self.split}: sample {sample_id}: {name} can't be decoded: {error}") from error
                sample[name] = kind(pixels)
        return self.resize(sample) if self.resize else sample

    def _pixels(self, sample_id: int) -> dict[str, Tensor]:
        if self.cache is None:
            return self._decode(sample_id)
        if sample_id not in self.cache:
            self.cache.write(sample_id, self._decode(sample_id))
        return self.cache.read(sample_id)

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        """A batch: image and mask columns uint8 (B, C, H, W), labels int64 (B,), `sample_id` and `epoch` int64 (B,)."""
        located = [self.order.sample(p) for p in positions] if self.order else [(0, p) for p in positions]
        ids = [sample_id for _, sample_id in located]
        batch: dict[str, Any] = {name: torch.from_numpy(values[ids]) for name, values in self.labels.items()}
        if self.transform is None and self.cache is not None and self.cache.uniform and all(i in self.cache for i in ids):
            batch |= self.cache.read_batch(ids)
        else:
            samples = [self._pixels(i) for i in ids]
            if self.transform is not None and self.order is not None:
                samples = self._augment(samples, [self.order.augment_seed(p) for p in positions])
            batch |= self._stack(samples)
        batch["sample_id"] = torch.tensor(ids)
        batch["epoch"] = torch.tensor([epoch for epoch, _ in located])
        return batch

    def _augment(self, samples: list[Any], seeds: list[int]) -> list[Any]:
        assert self.transform is not None
        with torch.random.fork_rng(devices=[]):
            out = []
            for sample, seed in zip(samples, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                out.append(self.transform({name: _READ[self.columns[name]][1](pixels) for name, pixels in sample.items()}))
        return out

    def _stack(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        for name in samples[0]:
            shapes = {tuple(sample[name].shape) for sample in samples}
            if len(shapes) > 1:
                raise UserError(
                    f"{self.name}/{self.split}: images of a batch differ in size ({', '.join(map(str, sorted(shapes)[:2]))}, …): set data.resize=[H,W]"
                )
        return {name: torch.stack([sample[name].as_subclass(Tensor) for sample in samples]) for name in samples[0]}


class Batches:
    """Batches of one process: endless micro-batches for `Slices`, its share of a set for a `Shard`; workers stay.

    Args:
        samples: what is loaded.
        positions: gives the positions of each batch, anew for every iteration.
        workers: loader processes; 0 loads in this one.
    """

    def __init__(self, samples: Samples, positions: Slices | Shard, workers: int) -> None:
        self._loader = _loader(samples, positions, workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            if isinstance(batch, UserError | TrainingFailed):
                batch.on_one_rank = True
                raise batch
            yield batch


class _Loaded(Dataset[Any]):
    """Samples whose errors travel from a loader worker as they are; the loader would turn them into a traceback's text."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, positions: list[int]) -> Any:
        try:
            return self.samples.__getitems__(positions)
        except (UserError, TrainingFailed) as error:
            return error


def _keep(batch: Any) -> Any:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    """A signal to the whole process group must not kill the workers: the process that started them decides when to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Ends the workers of loaders that an error kept alive: at exit, multiprocessing sends SIGTERM, which they ignore, and waits."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _loader(samples: Samples, positions: Slices | Shard, workers: int) -> DataLoader[Any]:
    if workers:
        atexit.register(_end_workers)  # runs before what multiprocessing registered
    return DataLoader(
        _Loaded(samples),
        batch_sampler=positions,
        num_workers=workers,
        worker_init_fn=_ignore_stop_signals,
        collate_fn=_keep,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # starts in milliseconds
        generator=torch.Generator(),  # a loader otherwise draws from the global generator at every start
    )
