"""The Stream: batches of a split, of training samples by their positions in the Order or of validation samples by id.

A row stays undecoded bytes until its sample is really used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trainer.data.augment import Augmenter, Sample, Transform
from trainer.data.collate import collate
from trainer.data.order import Order
from trainer.data.reader import Reader


class Samples(ABC):
    """One split, batch by batch.

    Args:
        reader: gives each sample by its id.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    @abstractmethod
    def batch(self, numbers: Sequence[int], /) -> dict[str, Tensor]:
        """A batch: image and mask columns uint8 (B, C, H, W), labels int64 (B,), arrays float32 (B, …), `sample_id` and
        `epoch` int64 (B,); objects as `join` has them.

        `sample_id` says what was meant. Where unreadable samples are tolerated, `unreadable`, int64 (0 … B,), are those
        of them that another one stands in for.
        """

    def _batch(
        self,
        epochs: Sequence[int],
        sample_ids: Sequence[int],
        augment: Callable[[list[Sample]], list[Sample]] | None = None,
    ) -> dict[str, Tensor]:
        reader, stand_ins = self.reader, self.reader.stand_ins
        used = [stand_ins.of(sample_id) for sample_id in sample_ids]
        fields: dict[str, Tensor] | None = None
        if reader.pixels and not reader.objects and not augment:
            fields = reader.pixels.read_cached(used)
        if fields is None:
            used, samples = map(list, zip(*map(reader.read, sample_ids), strict=True))
            fields = collate(augment(samples) if augment else samples, reader.place)
        batch = {name: torch.from_numpy(values[used]) for name, values in reader.numbers.items()} | fields
        batch |= {"sample_id": torch.tensor(sample_ids), "epoch": torch.tensor(epochs)}
        if stand_ins.tolerated:
            replaced = [meant for meant, found in zip(sample_ids, used, strict=True) if found != meant]
            batch["unreadable"] = torch.tensor(replaced, dtype=torch.int64)
        return batch


class TrainingSamples(Samples):
    """The training split, by positions in the Order.

    Args:
        reader: gives each sample by its id.
        order: of the samples.
        transforms: the augmentations; none for the samples as they are.
    """

    def __init__(self, reader: Reader, order: Order, transforms: Sequence[Transform] = ()) -> None:
        super().__init__(reader)
        self.order = order
        self.augmenter = Augmenter(transforms, order, self._read, reader.objects is not None) if transforms else None

    def _read(self, sample_id: int) -> Sample:
        return self.reader.read(sample_id)[1]

    @property
    def uniform(self) -> bool:
        """Whether all samples have one size before augmentation."""
        return self.reader.pixels is None or self.reader.pixels.uniform

    def batch(self, positions: Sequence[int], /) -> dict[str, Tensor]:
        """The samples at these positions; see `Samples`."""
        epochs, sample_ids = zip(*map(self.order.sample, positions), strict=True)
        return self._batch(epochs, sample_ids, partial(self.augmenter, positions) if self.augmenter else None)


class ValidationSamples(Samples):
    """The validation split, by sample ids; never augmented."""

    def batch(self, sample_ids: Sequence[int], /) -> dict[str, Tensor]:
        """The samples with these ids, of epoch 0; see `Samples`."""
        return self._batch([0] * len(sample_ids), sample_ids)

    def spread(self, count: int) -> list[int]:
        """Ids of so many samples, or of all, evenly from the set as its file names order it; for neighbours, e.g.
        frames of a video, are alike.
        """
        count = min(count, len(self))
        if not count:
            return []
        names = self.reader.file_names()
        ids = sorted(range(len(self)), key=names.__getitem__)
        return [ids[(2 * number + 1) * len(self) // (2 * count)] for number in range(count)]
