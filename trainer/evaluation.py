"""Exact evaluation: every sample is counted once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.stream import Samples
from trainer.reduce import total
from trainer.tasks.task import Batch, Task

ToDevice = Callable[[Batch], Batch]


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, forward: Callable[..., Any], batches: Iterable[Batch], samples: Samples, to_device: ToDevice) -> dict[str, float]:
    """Metrics of a whole set from sums over unpadded shards.

    Args:
        task: says what is summed, and what follows from the totals.
        model: put into eval mode, and left in it.
        forward: calls the model (with autocast).
        batches: this process's share; may be empty.
        samples: the whole set.
        to_device: moves a batch.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    for batch in batches:
        found = task.evaluation_sums(forward, to_device(batch))
        sums = {key: sums[key] + value for key, value in found.items()} if sums else found
    if not sums:  # an empty share has nothing to add, but must know what is added
        found = task.evaluation_sums(forward, to_device(samples.__getitems__([0])))
        sums = {key: torch.zeros_like(value) for key, value in found.items()}
    sums = total(sums)
    assert int(sums["samples"]) == len(samples), f"evaluated {int(sums['samples'])} samples of {len(samples)}"
    return task.metrics(sums)
