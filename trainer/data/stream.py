"""The Stream: batches in the Order's order, read from Parquet through `datasets` or from the pixel cache.

A row stays undecoded bytes until its sample is really used. Any number of loader workers gives the same
batches: the loader hands each a list of positions and keeps their order.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from trainer.data.augment import Mosaic
from trainer.data.cache import PixelCache, machine_folder
from trainer.data.card import Card
from trainer.data.images import check_png
from trainer.data.objects import ROLES, TIDY, Letterbox, Objects, join
from trainer.data.order import Order, Shard, Slices
from trainer.data.parquet import RowGroups, Unreadable, first_line, make_again
from trainer.errors import TrainingFailed, UserError
from trainer.signals import STOP_SIGNALS

NEARBY = 64  # positions around a sample that the partners of its mosaic come from

Sample = dict[str, Any]

Transform = Callable[[Sample], Sample]

_READ = {"image": (ImageReadMode.RGB, tv_tensors.Image, 3), "mask": (ImageReadMode.UNCHANGED, tv_tensors.Mask, 1)}


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
        max_unreadable: how many samples may be unreadable, in one process; the next readable one takes the place of
            each.
        resize_mode: `stretch`, or `letterbox`, which keeps the aspect.

    Attributes:
        unreadable: what is wrong with each sample, by its id, that couldn't be read so far.
    """

    def __init__(
        self,
        folder: Path,
        card: Card,
        split: str,
        order: Order | None,
        resize: Sequence[int] | None,
        transforms: Sequence[Transform],
        cache: bool,
        window: int,
        max_unreadable: int = 0,
        resize_mode: str = "stretch",
    ) -> None:
        self.folder, self.split, self.columns = folder, split, card.columns
        self.order = order
        self.lookup = order or Order(card.row_groups(split), 0, window)
        self.max_unreadable = max_unreadable
        self.unreadable: dict[int, str] = {}
        self.rows = RowGroups(
            {folder / shard.name: shard.row_groups for shard in card.splits[split].files}, keep=2 * window
        )
        self.resize = (
            None
            if not resize
            else Letterbox(resize)
            if resize_mode == "letterbox"
            else v2.Resize(list(resize), antialias=True)
        )
        objects = [(name, role) for name, role in self.columns.items() if role in ROLES]
        if objects or not resize:
            self.sizes = self.rows.sizes()
        self.objects = (
            Objects(self.rows.column(objects[0][0]), self.sizes, objects[0][1], self.resize) if objects else None
        )
        if resize:
            self.sizes = np.tile(np.asarray(resize, dtype=np.int64), (len(self), 1))
        self.transform: v2.Compose | None = None
        self.mosaic: Mosaic | None = None  # the one augmentation that sees several samples
        if order and transforms:
            self.mosaic = transforms[0] if isinstance(transforms[0], Mosaic) else None
            self.transform = v2.Compose(
                [*transforms[1 if self.mosaic else 0 :], *(TIDY if self.objects else [nn.Identity()])]
            )
        self.labels = {name: self.rows.integers(name) for name, role in self.columns.items() if role == "label"}
        shape = "x".join(map(str, resize)) + f"-{resize_mode}" * (resize_mode != "stretch") if resize else "native"
        self.cache = (
            self._open_cache(machine_folder(folder / "cache") / card.fingerprint[:16] / f"{split}-{shape}")
            if cache
            else None
        )

    def __len__(self) -> int:
        return self.lookup.size

    @property
    def uniform(self) -> bool:
        """Whether all samples have one size before augmentation."""
        return bool((self.sizes == self.sizes[0]).all())

    def spread(self, count: int) -> list[int]:
        """Ids of so many samples, or of all, evenly from the set as its file names order it; for neighbours, e.g.
        frames of a video, are alike.
        """
        count = min(count, len(self))
        return [self._by_name[(2 * number + 1) * len(self) // (2 * count)] for number in range(count)]

    @cached_property
    def _by_name(self) -> list[int]:
        """Ids in the order of the images' file names; in their own where they have none."""
        image = next(name for name, role in self.columns.items() if role == "image")
        names = [each["path"] or "" for each in self.rows.column(f"{image}.path").to_pylist()]
        return sorted(range(len(self)), key=names.__getitem__)

    def _open_cache(self, folder: Path) -> PixelCache | None:
        channels = {name: _READ[role][2] for name, role in self.columns.items() if role in _READ}
        try:
            return PixelCache(folder, channels, self.sizes)
        except OSError as error:
            print(f"data.cache is off: {folder} can't be used ({error.strerror or error})", file=sys.stderr)
            return None

    def _decode(self, sample_id: int) -> dict[str, Tensor]:
        """Reads, decodes and resizes one sample: column -> uint8 (C, H, W)."""
        row = self.rows.row(*self.lookup.group(sample_id))
        sample: dict[str, Any] = {}
        for name, role in self.columns.items():
            if role not in _READ:
                continue
            mode, kind, channels = _READ[role]
            try:
                check_png(row[name]["bytes"])
                pixels = kind(decode_image(torch.frombuffer(bytearray(row[name]["bytes"]), dtype=torch.uint8), mode))
                sample[name] = self.resize(pixels) if self.resize else pixels
                # Of another size than it was prepared with, it would be written over its neighbours in the cache.
                if sample[name].shape != (channels, *self.sizes[sample_id]):
                    raise ValueError(f"it has the shape {tuple(pixels.shape)}")
            except Exception as error:  # bytes that were damaged after they were prepared raise all kinds of errors
                raise Unreadable(
                    f"{row[name]['path'] or 'no file name'}: {name} can't be decoded: {first_line(error)}"
                ) from error
        return sample

    def _read(self, sample_id: int) -> tuple[int, dict[str, Tensor]]:
        """Pixels and objects of a sample, or of the one that takes its place, and which one that is."""
        while True:
            found = self._readable(sample_id)
            try:
                return found, self._pixels(found) | (self.objects.read(found) if self.objects else {})
            except Unreadable as error:
                self.note_unreadable({found: str(error)})

    def _readable(self, sample_id: int) -> int:
        """The sample itself or, as far as is known by now, the next one that can be read."""
        while sample_id in self.unreadable:
            sample_id = (sample_id + 1) % len(self)
        return sample_id

    def note_unreadable(self, found: Mapping[int, str]) -> None:
        """Adds samples that can't be read, by their ids, with what is wrong with each.

        Raises:
            TrainingFailed: there are more than `max_unreadable`.
        """
        self.unreadable |= found
        if len(self.unreadable) > min(self.max_unreadable, len(self) - 1):
            advice = (
                "data.max_unreadable=N tolerates N such samples"
                if self.order
                else f"metrics need every sample; {make_again(self.folder)}"
            )
            if self.max_unreadable:
                advice = f"more than data.max_unreadable={self.max_unreadable} tolerates"
            samples = [f"sample {sample_id}: {what}" for sample_id, what in sorted(self.unreadable.items())]
            first = samples.pop() if len(samples) == 1 else f"{len(samples)} samples can't be read"
            raise TrainingFailed("\n  ".join([f"{self.folder.name}/{self.split}: {first}; {advice}", *samples]))

    def _pixels(self, sample_id: int) -> dict[str, Tensor]:
        if self.cache is None:
            return self._decode(sample_id)
        if sample_id not in self.cache:
            self.cache.write(sample_id, self._decode(sample_id))
        return {name: _READ[self.columns[name]][1](pixels) for name, pixels in self.cache.read(sample_id).items()}

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        """A batch: image and mask columns uint8 (B, C, H, W), labels int64 (B,), `sample_id` and `epoch` int64 (B,);
        objects as `join` has them.

        `sample_id` says what the Order has there. Where unreadable samples are tolerated, `unreadable`, int64 (0 … B,),
        are those of them that another one stands in for.
        """
        located = [self.order.sample(p) for p in positions] if self.order else [(0, p) for p in positions]
        ids = [self._readable(sample_id) for _, sample_id in located]
        pixels: dict[str, Tensor]
        if (
            self.transform is None
            and self.objects is None
            and self.cache is not None
            and self.cache.uniform
            and all(i in self.cache for i in ids)
        ):
            pixels = self.cache.read_batch(ids)
        else:
            ids, samples = map(list, zip(*(self._read(sample_id) for _, sample_id in located), strict=True))
            if self.order is not None and self.transform is not None:
                with torch.random.fork_rng(devices=[]):
                    samples = [
                        self._augment(self.order, position, sample)
                        for position, sample in zip(positions, samples, strict=True)
                    ]
            pixels = join(samples) if self.objects else self._stack(samples)
        batch = {name: torch.from_numpy(values[ids]) for name, values in self.labels.items()} | pixels
        batch["sample_id"] = torch.tensor([sample_id for _, sample_id in located])
        batch["epoch"] = torch.tensor([epoch for epoch, _ in located])
        if self.max_unreadable:
            replaced = [sample_id for (_, sample_id), found in zip(located, ids, strict=True) if found != sample_id]
            batch["unreadable"] = torch.tensor(replaced, dtype=torch.int64)
        return batch

    def _augment(self, order: Order, position: int, sample: Sample) -> Sample:
        """Augments the sample at a position, with its own seed."""
        assert self.transform is not None
        torch.default_generator.manual_seed(order.augment_seed(position))
        if self.mosaic and torch.rand(()) < self.mosaic.p:
            # From nearby, where row groups are held in memory.
            first = max(0, position - NEARBY // 2)
            near = (first + torch.randint(NEARBY, (self.mosaic.NUM_PARTNERS,))).tolist()
            sample = self.mosaic([sample, *(self._read(order.sample(each)[1])[1] for each in near)])
        sample.pop("content", None)  # it would not move with the image
        augmented: Sample = self.transform(sample)
        return augmented

    def _stack(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        for name in samples[0]:
            shapes = {tuple(sample[name].shape) for sample in samples}
            if len(shapes) > 1:
                raise UserError(
                    f"{self.folder.name}/{self.split}: images of a batch differ in size "
                    f"({', '.join(map(str, sorted(shapes)[:2]))}, …): set data.resize=[H,W]"
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
        self._samples = samples
        self._loader = _loader(samples, positions, workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch, unreadable in self._loader:
            try:
                if isinstance(batch, UserError | TrainingFailed):
                    raise batch
                self._samples.note_unreadable(unreadable)  # each worker knows of those it met
            except (UserError, TrainingFailed) as error:
                error.on_one_rank = True
                raise
            yield batch


class _Loaded(Dataset[Any]):
    """Samples whose errors travel from a loader worker as they are;
    the loader would turn them into a traceback's text.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, positions: list[int]) -> Any:
        try:
            return self.samples.__getitems__(positions), self.samples.unreadable
        except (UserError, TrainingFailed) as error:
            return error, {}


def _keep(batch: Any) -> Any:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    """A signal to the whole process group must not kill the workers:
    the process that started them decides when to stop.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Ends the workers of loaders that an error kept alive: at exit, multiprocessing sends SIGTERM, which they ignore,
    and waits.
    """
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
