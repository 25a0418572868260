"""Batches of a split: training samples are addressed by their position in the Order, validation samples by their id."""

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
    """The samples of one split, in batches.

    Args:
        reader: reads single samples by id.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    @abstractmethod
    def batch(self, indices: Sequence[int], /) -> dict[str, Tensor]:
        """A batch: image and mask columns uint8 (B, C, H, W), labels int64 (B,), arrays float32 (B, …), `sample_id` and
        `epoch` int64 (B,); objects as described in `join`.

        If unreadable samples are tolerated, `unreadable`, int64 (0 … B,), lists the ids whose content was replaced by
        another sample's; `sample_id` always holds the requested ids.

        Args:
            indices: positions in the Order or sample ids, depending on the split.
        """

    def _batch(
        self,
        epochs: Sequence[int],
        sample_ids: Sequence[int],
        augment: Callable[[list[Sample]], list[Sample]] | None = None,
    ) -> dict[str, Tensor]:
        """Reads samples, all at once from the cache if possible, then augments and joins them."""
        reader, stand_ins = self.reader, self.reader.stand_ins
        read_ids = [stand_ins.of(sample_id) for sample_id in sample_ids]
        fields: dict[str, Tensor] | None = None
        if reader.pixels and not reader.objects and not augment:
            fields = reader.pixels.read_cached(read_ids)
        if fields is None:  # reading may find more unreadable samples, so the ids may change
            read_ids, samples = map(list, zip(*map(reader.read, sample_ids), strict=True))
            fields = collate(augment(samples) if augment else samples, reader.name)
        batch = {name: torch.from_numpy(values[read_ids]) for name, values in reader.preloaded.items()} | fields
        batch |= {"sample_id": torch.tensor(sample_ids), "epoch": torch.tensor(epochs)}
        if stand_ins.tolerated:
            replaced = [wanted for wanted, read in zip(sample_ids, read_ids, strict=True) if read != wanted]
            batch["unreadable"] = torch.tensor(replaced, dtype=torch.int64)
        return batch


class TrainingSamples(Samples):
    """The training split, addressed by positions in the Order.

    Args:
        reader: reads single samples by id.
        order: of the samples.
        transforms: the augmentations; empty for none.
    """

    def __init__(self, reader: Reader, order: Order, transforms: Sequence[Transform] = ()) -> None:
        super().__init__(reader)
        self.order = order
        self.augmenter = Augmenter(transforms, order, self._read, reader.objects is not None) if transforms else None

    def _read(self, sample_id: int) -> Sample:
        return self.reader.read(sample_id)[1]

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same size before augmentation."""
        return self.reader.pixels is None or self.reader.pixels.uniform

    def batch(self, positions: Sequence[int], /) -> dict[str, Tensor]:
        """The samples at these positions; see `Samples`."""
        epochs, sample_ids = zip(*map(self.order.sample, positions), strict=True)
        return self._batch(epochs, sample_ids, partial(self.augmenter, positions) if self.augmenter else None)


class ValidationSamples(Samples):
    """The validation split, addressed by sample ids; never augmented."""

    def batch(self, sample_ids: Sequence[int], /) -> dict[str, Tensor]:
        """The samples with these ids; their `epoch` is 0; see `Samples`."""
        return self._batch([0] * len(sample_ids), sample_ids)

    def spread(self, count: int) -> list[int]:
        """Ids of at most `count` samples, evenly spaced over the split by file name: neighbours, e.g. frames of a
        video, look alike.
        """
        count = min(count, len(self))
        if not count:
            return []
        names = self.reader.file_names()
        ids = sorted(range(len(self)), key=names.__getitem__)
        return [ids[(2 * number + 1) * len(self) // (2 * count)] for number in range(count)]
