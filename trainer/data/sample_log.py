"""Which samples a run has trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.order import FINGERPRINT_MODULUS, fingerprint
from trainer.distributed.control import Control
from trainer.errors import TrainingFailed


class SampleLog:
    """A fingerprint of all samples that a run has trained on, and the ids of the unreadable ones.

    Two runs have the same fingerprint if they trained on the same samples at the same steps, with any number of
    processes. Each process sums over its own samples; rank 0 also holds the restored sum.

    Args:
        control: communicates with the other processes.
        max_unreadable: how many unreadable samples the run tolerates.

    Attributes:
        unreadable: their ids, of all processes after `gather`.
    """

    def __init__(self, control: Control, max_unreadable: int) -> None:
        self.control, self.max_unreadable = control, max_unreadable
        self.unreadable: list[int] = []
        self._fingerprint = 0

    def add(self, step: int, batch: Mapping[str, Any]) -> None:
        """Adds a micro-batch of this process: `sample_id` and `epoch`, int64 (B,), and `unreadable` if tolerated."""
        self._fingerprint += fingerprint(step, batch["epoch"].tolist(), batch["sample_id"].tolist())
        self._fingerprint %= FINGERPRINT_MODULUS
        if self.max_unreadable:
            self.unreadable = sorted({*self.unreadable, *batch["unreadable"].tolist()})

    def gather(self) -> None:
        """Merges the unreadable samples of all processes, all of which must call this.

        Raises:
            TrainingFailed: there are too many.
        """
        if self.max_unreadable:
            self.unreadable = self.control.union(self.unreadable)
        if len(self.unreadable) > self.max_unreadable:
            raise TrainingFailed(
                f"samples {self.unreadable} can't be read; more than data.max_unreadable={self.max_unreadable}"
            )

    def fingerprint(self) -> int:
        """The fingerprint over all processes, all of which must call this."""
        return self.control.sum([self._fingerprint])[0] % FINGERPRINT_MODULUS

    def counters(self) -> dict[str, Any]:
        """The state for a checkpoint; all processes must call this."""
        return {"fingerprint": self.fingerprint(), "unreadable": self.unreadable}

    def restore(self, counters: Mapping[str, Any], is_main: bool) -> None:
        """Restores the state from a checkpoint."""
        self._fingerprint = counters["fingerprint"] if is_main else 0
        self.unreadable = counters["unreadable"]
