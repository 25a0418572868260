"""The Order: which sample is at which position of the endless training stream.

    epochs      0                           | 1                           | 2 …
    an epoch    a permutation of the Parquet row groups
    a window    `window` consecutive groups of it, whose rows are permuted together
    a batch     batch k holds positions k·B … k·B + B - 1, across the ends of epochs

The order is a pure function of (row groups, seed, position). The state of the data is therefore a single integer, which
does not depend on the number of processes, workers or interruptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.seeds import Use, mix, permutation

# Divides 2**64, so int64 sums that overflow still have the right remainder.
FINGERPRINT_MODULUS = 2**61
Integers = npt.NDArray[np.int64]


class _Epoch(NamedTuple):
    starts: Integers  # first index (within the epoch) of each window, and the size of the set
    groups: tuple[Integers, ...]  # row groups of each window


class Layout:
    """Locates samples in row groups: sample ids number the rows of the Parquet files.

    Args:
        row_groups: rows in each row group, in file order.
    """

    def __init__(self, row_groups: Sequence[int]) -> None:
        self.row_groups = np.asarray(row_groups, dtype=np.int64)
        self.first_ids = np.concatenate([[0], np.cumsum(self.row_groups)])
        self.size = int(self.first_ids[-1])

    def group(self, sample_id: int) -> tuple[int, int]:
        """Row group of a sample, and its row within that group."""
        group = int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1
        return group, int(sample_id - self.first_ids[group])


class Order(Layout):
    """Maps positions to samples.

    Args:
        row_groups: rows in each Parquet row group, in file order.
        seed: the recipe's seed.
        window: row groups that are shuffled together; a larger window shuffles better and keeps more in memory.
    """

    def __init__(self, row_groups: Sequence[int], seed: int, window: int) -> None:
        super().__init__(row_groups)
        self.seed = seed
        self.window = window
        self._create_caches()

    def _create_caches(self) -> None:
        self._epoch = lru_cache(maxsize=2)(self._arrange_epoch)
        self._window = lru_cache(maxsize=4)(self._arrange_window)

    def __getstate__(self) -> dict[str, Any]:
        # For workers that don't fork: the caches can't be pickled.
        return {key: value for key, value in self.__dict__.items() if key not in ("_epoch", "_window")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._create_caches()

    def _arrange_epoch(self, epoch: int) -> _Epoch:
        groups = permutation(len(self.row_groups), self.seed, Use.ROW_GROUPS, epoch)
        windows = tuple(groups[i : i + self.window] for i in range(0, len(groups), self.window))
        sizes = [int(self.row_groups[window].sum()) for window in windows]
        return _Epoch(np.concatenate([[0], np.cumsum(sizes)]), windows)

    def _arrange_window(self, epoch: int, window: int) -> Integers:
        groups = self._epoch(epoch).groups[window]
        ids = np.concatenate([np.arange(self.first_ids[g], self.first_ids[g + 1]) for g in groups])
        return ids[permutation(len(ids), self.seed, Use.WINDOW, epoch, window)]

    def sample(self, position: int) -> tuple[int, int]:
        """Epoch and sample id at `position` (from 0)."""
        epoch, index = divmod(position, self.size)
        starts = self._epoch(epoch).starts
        window = int(np.searchsorted(starts, index, side="right")) - 1
        return epoch, int(self._window(epoch, window)[index - starts[window]])

    def augment_seed(self, position: int) -> int:
        """Seed of the augmentation at `position`."""
        return mix(self.seed, Use.AUGMENT, position)


class Slices:
    """The positions that one process trains on: its slice of every micro-batch, endlessly, starting at a given step.

    Micro-batch m of a step is the same contiguous range of positions for any number of processes.

    Args:
        batch_size: samples in one optimizer step, over all processes and micro-batches.
        accumulate: micro-batches in a step.
        rank, world_size: of this process.
        first_step: the step to start at.
    """

    def __init__(self, batch_size: int, accumulate: int, rank: int, world_size: int, first_step: int) -> None:
        assert batch_size % (accumulate * world_size) == 0
        self.share = batch_size // (accumulate * world_size)
        self.stride = self.share * world_size
        self.offset = self.share * rank
        self.first = first_step * accumulate

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.first
        while True:
            start = micro * self.stride + self.offset
            yield list(range(start, start + self.share))
            micro += 1


class Shard:
    """The sample ids that one process evaluates: a contiguous share of the set in batches, without padding."""

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        self.ids = range(size * rank // world_size, size * (rank + 1) // world_size)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.ids), self.batch_size):
            yield list(self.ids[start : start + self.batch_size])

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)


def fingerprint(step: int, epochs: list[int], sample_ids: list[int]) -> int:
    """The sum of blake2b-8 over (step, epoch, sample id) of some samples, modulo 2**61:
    equal for the same samples in any order.
    """
    total = 0
    for epoch, sample_id in zip(epochs, sample_ids, strict=True):
        triple = b"".join(number.to_bytes(8, "little", signed=True) for number in (step, epoch, sample_id))
        total += int.from_bytes(blake2b(triple, digest_size=8).digest(), "little")
    return total % FINGERPRINT_MODULUS


def read_amplification(order: Order, batch_size: int, accumulate: int, world_size: int, workers: int) -> float:
    """Rows read from Parquet per row used, over all processes and workers, in the first epoch without a cache.

    Every worker of every process reads the row groups that contain its samples.
    """
    read = used = 0
    loaders = max(1, workers)
    for rank in range(world_size):
        held: list[dict[int, None]] = [{} for _ in range(loaders)]
        for number, positions in enumerate(Slices(batch_size, accumulate, rank, world_size, 0)):
            if positions[0] >= order.size:
                break
            groups = held[number % loaders]
            for position in positions:
                group, _ = order.group(order.sample(position)[1])
                if group in groups:
                    groups.pop(group)
                else:
                    read += int(order.row_groups[group])
                groups[group] = None  # most recently used last
                if len(groups) > 2 * order.window:
                    groups.pop(next(iter(groups)))
                used += 1
    return read / used
