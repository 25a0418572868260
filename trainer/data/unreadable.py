"""Unreadable samples, and the samples that replace them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.data.parquet import how_to_repair
from trainer.errors import TrainingFailed


class StandIns:
    """Maps every unreadable sample to the next readable one.

    Args:
        folder: the prepared data set.
        split: `train` or `validation`.
        size: samples in the split.
        tolerated: how many unreadable samples a process tolerates; None if metrics need every sample.

    Attributes:
        unreadable: the error of each unreadable sample found so far, by its id.
    """

    def __init__(self, folder: Path, split: str, size: int, tolerated: int | None) -> None:
        self.folder, self.split, self.size, self.tolerated = folder, split, size, tolerated
        self.unreadable: dict[int, str] = {}

    def of(self, sample_id: int) -> int:
        """The sample itself or, if it is known to be unreadable, the next one that isn't."""
        while sample_id in self.unreadable:
            sample_id = (sample_id + 1) % self.size
        return sample_id

    def add(self, unreadable: Mapping[int, str]) -> None:
        """Adds unreadable samples: the error of each, by its id.

        Raises:
            TrainingFailed: there are more than tolerated.
        """
        self.unreadable |= unreadable
        if len(self.unreadable) <= min(self.tolerated or 0, self.size - 1):
            return
        if self.tolerated is None:
            advice = f"metrics need every sample; {how_to_repair(self.folder)}"
        elif self.tolerated:
            advice = f"more than data.max_unreadable={self.tolerated} tolerates"
        else:
            advice = "data.max_unreadable=N tolerates N such samples"
        samples = [f"sample {sample_id}: {error}" for sample_id, error in sorted(self.unreadable.items())]
        first = samples.pop() if len(samples) == 1 else f"{len(samples)} samples can't be read"
        raise TrainingFailed("\n  ".join([f"{self.folder.name}/{self.split}: {first}; {advice}", *samples]))
