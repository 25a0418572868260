"""The loader: worker processes prefetch batches, which are then moved to the device.

The number of workers does not change the batches: a worker loads entire batches, and the loader preserves their order.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.order import Shard, Slices
from trainer.data.stream import Samples, TrainingSamples, ValidationSamples
from trainer.errors import TrainingFailed, UserError
from trainer.signals import STOP_SIGNALS

ON_HOST = ("sample_id", "epoch", "unreadable", "height", "width")  # fields that the model doesn't read


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves what the model reads to the device; ids and sizes stay on the CPU."""
    return {name: value if name in ON_HOST else value.to(device, non_blocking=True) for name, value in batch.items()}


class Batches:
    """Batches of one process on its device: endless micro-batches for `Slices`, its share of a set for a `Shard`.

    Workers persist between iterations.

    Args:
        samples: loads the batches.
        batch_sampler: yields the positions or sample ids of each batch; every iteration starts over.
        workers: loader processes; 0 loads in the main process.
        device: of the model.
    """

    def __init__(
        self,
        samples: TrainingSamples | ValidationSamples,
        batch_sampler: Slices | Shard,
        workers: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self._samples, self._device = samples, device
        self._loader = _loader(samples, batch_sampler, workers, pin_memory=device.type == "cuda")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, unreadable in self._loader:
            try:
                if isinstance(batch, UserError | TrainingFailed):
                    raise batch
                self._samples.reader.stand_ins.add(unreadable)  # a worker knows only of those it read itself
            except (UserError, TrainingFailed) as error:
                error.on_one_rank = True
                raise
            yield to_device(batch, self._device)


class _Loaded(Dataset[Any]):
    """Returns users' errors from workers as objects, since the DataLoader would turn them into tracebacks."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return self.samples.batch(indices), self.samples.reader.stand_ins.unreadable
        except (UserError, TrainingFailed) as error:
            return error, {}


def _keep(batch: Any) -> Any:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    """A signal to the process group must not kill the workers: the process that started them decides when to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kills workers that are still alive after an error: at exit, multiprocessing sends SIGTERM, which they ignore, and
    would wait forever.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _loader(samples: Samples, batch_sampler: Slices | Shard, workers: int, pin_memory: bool) -> DataLoader[Any]:
    if workers:
        atexit.register(_end_workers)  # runs before the exit handler of multiprocessing
    return DataLoader(
        _Loaded(samples),
        batch_sampler=batch_sampler,
        num_workers=workers,
        worker_init_fn=_ignore_stop_signals,
        collate_fn=_keep,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # starts in milliseconds
        generator=torch.Generator(),  # otherwise each iteration would draw from the global one
    )
