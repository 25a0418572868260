"""Samples that turn out to be unreadable, and which ones stand in for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.data.parquet import make_again
from trainer.errors import TrainingFailed


class StandIns:
    """Replaces every unreadable sample by the next readable one.

    Args:
        folder: the prepared data set.
        split: `train` or `validation`.
        size: samples in the split.
        tolerated: how many samples may be unreadable, in one process; None where metrics need every sample.

    Attributes:
        unreadable: what is wrong with each sample, by its id, that couldn't be read so far.
    """

    def __init__(self, folder: Path, split: str, size: int, tolerated: int | None) -> None:
        self.folder, self.split, self.size, self.tolerated = folder, split, size, tolerated
        self.unreadable: dict[int, str] = {}

    def of(self, sample_id: int) -> int:
        """The sample itself or, as far as is known by now, the next one that can be read."""
        while sample_id in self.unreadable:
            sample_id = (sample_id + 1) % self.size
        return sample_id

    def add(self, unreadable: Mapping[int, str]) -> None:
        """Adds samples that can't be read, by their ids, with what is wrong with each.

        Raises:
            TrainingFailed: there are more than are tolerated.
        """
        self.unreadable |= unreadable
        if len(self.unreadable) <= min(self.tolerated or 0, self.size - 1):
            return
        if self.tolerated is None:
            advice = f"metrics need every sample; {make_again(self.folder)}"
        elif self.tolerated:
            advice = f"more than data.max_unreadable={self.tolerated} tolerates"
        else:
            advice = "data.max_unreadable=N tolerates N such samples"
        samples = [f"sample {sample_id}: {what}" for sample_id, what in sorted(self.unreadable.items())]
        first = samples.pop() if len(samples) == 1 else f"{len(samples)} samples can't be read"
        raise TrainingFailed("\n  ".join([f"{self.folder.name}/{self.split}: {first}; {advice}", *samples]))
