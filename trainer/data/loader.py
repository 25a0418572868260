"""The loader: batches one after the other, read ahead by worker processes and moved to the device.

Any number of workers gives the same batches: each is handed the numbers of a whole batch, and the loader keeps their
order.
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

ON_HOST = ("sample_id", "epoch", "unreadable", "height", "width")  # fields that the model doesn't see


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Moves what the model sees to the device; ids and sizes stay on the CPU."""
    return {name: value if name in ON_HOST else value.to(device, non_blocking=True) for name, value in batch.items()}


class Batches:
    """Batches of one process on its device: endless micro-batches for `Slices`, its share of a set for a `Shard`;
    workers stay.

    Args:
        samples: what is loaded.
        numbers: gives the positions or sample ids of each batch, anew for every iteration.
        workers: loader processes; 0 loads in this one.
        device: where the model is.
    """

    def __init__(
        self,
        samples: TrainingSamples | ValidationSamples,
        numbers: Slices | Shard,
        workers: int,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self._samples, self._device = samples, device
        self._loader = _loader(samples, numbers, workers, pin_memory=device.type == "cuda")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, unreadable in self._loader:
            try:
                if isinstance(batch, UserError | TrainingFailed):
                    raise batch
                self._samples.reader.stand_ins.add(unreadable)  # each worker knows of those it met
            except (UserError, TrainingFailed) as error:
                error.on_one_rank = True
                raise
            yield to_device(batch, self._device)


class _Loaded(Dataset[Any]):
    """Samples whose errors travel from a loader worker as they are;
    the loader would turn them into a traceback's text.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, numbers: list[int]) -> Any:
        try:
            return self.samples.batch(numbers), self.samples.reader.stand_ins.unreadable
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


def _loader(samples: Samples, numbers: Slices | Shard, workers: int, pin_memory: bool) -> DataLoader[Any]:
    if workers:
        atexit.register(_end_workers)  # runs before what multiprocessing registered
    return DataLoader(
        _Loaded(samples),
        batch_sampler=numbers,
        num_workers=workers,
        worker_init_fn=_ignore_stop_signals,
        collate_fn=_keep,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # starts in milliseconds
        generator=torch.Generator(),  # a loader otherwise draws from the global generator at every start
    )
