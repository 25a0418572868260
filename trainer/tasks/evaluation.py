"""Exact evaluation: every sample is counted once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.build import Data
from trainer.distributed.reduce import joined, total
from trainer.tasks.task import ROWS, Task


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    forward: Callable[..., Any],
    data: Data,
    may_go_on: Callable[[], bool],
) -> dict[str, Any] | None:
    """Metrics of the whole validation set from sums over unpadded shards; None where `may_go_on` ended it.

    Args:
        task: says what is summed, and what follows from the totals.
        model: put into eval mode, and left in it.
        forward: calls the model (with autocast).
        data: the set, and this process's share, which may be empty.
        may_go_on: asked before each round, by all processes alike and with the same answer.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    batches = iter(data.validation_batches)
    for _ in range(data.validation_rounds):
        if not may_go_on():
            return None
        batch = next(batches, None)
        if batch is not None:
            found = task.evaluation_sums(forward, batch)
            sums = (
                {
                    key: torch.cat([sums[key], value]) if key.startswith(ROWS) else sums[key] + value
                    for key, value in found.items()
                }
                if sums
                else found
            )
    if not sums:  # an empty share has nothing to add, but must know what is added
        found = task.evaluation_sums(forward, data.validation_batch([0]))
        sums = {key: value[:0] if key.startswith(ROWS) else torch.zeros_like(value) for key, value in found.items()}
    rows = joined({key: value for key, value in sums.items() if key.startswith(ROWS)})
    sums = total({key: value for key, value in sums.items() if key not in rows}) | rows
    # Metrics are many small figures: the host would wait for each.
    sums = {key: value.cpu() for key, value in sums.items()}
    size = len(data.validation)
    assert int(sums["samples"]) == size, f"evaluated {int(sums['samples'])} samples of {size}"
    return task.metrics(sums)
