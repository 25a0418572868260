"""Exact evaluation: every sample is counted once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainer.data.build import EvaluationData
from trainer.tasks.sums import EvaluationSums
from trainer.tasks.task import Forward, Observer, Task


def evaluate(
    task: Task[Any], model: nn.Module, forward: Forward, data: EvaluationData, may_continue: Callable[[], bool]
) -> dict[str, Any] | None:
    """Metrics of the whole set, see `total_sums`; None if `may_continue` interrupted it."""
    sums = total_sums(task, model, forward, data, may_continue)
    return None if sums is None else task.metrics(sums)


@torch.no_grad()
def total_sums(
    task: Task[Any],
    model: nn.Module,
    forward: Forward,
    data: EvaluationData,
    may_continue: Callable[[], bool],
    observe: Observer | None = None,
) -> EvaluationSums | None:
    """What the metrics of the whole set follow from, summed over unpadded shards; None if `may_continue` interrupted
    it. When it returns on one process, all processes have evaluated their shares.

    Args:
        task: defines what is summed, and the metrics that follow from the totals.
        model: put into eval mode, and left in it.
        forward: calls the model (with autocast).
        data: the set, and this process's share, which may be empty.
        may_continue: called before each round by all processes; returns the same answer on each.
        observe: called with the predictions for each batch of this process's share.
    """
    model.eval()
    sums: EvaluationSums | None = None
    batches = iter(data.validation_batches)
    for _ in range(data.validation_rounds):
        if not may_continue():
            return None
        batch = next(batches, None)
        if batch is not None:
            of_batch = task.evaluation_sums(forward, batch, observe)
            sums = sums + of_batch if sums else of_batch
    if sums is None:  # an empty share adds nothing, but takes part in every reduction
        sums = task.evaluation_sums(forward, data.validation_batch([0])).emptied()
    sums = sums.over_processes()
    size = len(data.validation)
    assert int(sums.samples) == size, f"evaluated {int(sums.samples)} samples of {size}"
    return sums
