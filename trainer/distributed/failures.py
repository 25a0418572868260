"""Errors of libraries and of the system that mean a failed training, in this project's words."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.distributed.watchdog import Watchdog
from trainer.errors import TrainingFailed
from trainer.recipe.recipe import Recipe
from trainer.signals import Stopped

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE}


@contextmanager
def reported_to_peers(watchdog: Watchdog, world_size: int) -> Iterator[None]:
    """Inside, an error is reported to the other processes before it is raised; where one of them is to blame,
    it ends this process.
    """
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if world_size > 1 and _lost_connection(error):
            watchdog.disconnected()  # another rank is to blame; this ends the process when it is known which
        watchdog.failed(error)
        raise


@contextmanager
def failures_told(
    watchdog: Watchdog, fail: Callable[[BaseException], None], recipe: Recipe, world_size: int, folder: Path
) -> Iterator[None]:
    """Inside, whatever goes wrong is reported to the other processes and by `fail`,
    then raised in this project's words.
    """
    try:
        with reported_to_peers(watchdog, world_size):
            yield
    except Stopped:
        watchdog.close()
        raise
    except BaseException as error:
        failure = _as_training_failure(error, recipe, world_size, folder)
        with suppress(Exception):  # what went wrong first is what is reported
            fail(failure or error)
        if failure:
            raise failure from error
        raise
    watchdog.close()


def _lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _as_training_failure(error: BaseException, recipe: Recipe, world_size: int, folder: Path) -> TrainingFailed | None:
    """The failure that an error stands for, to be told in one message; None where it is itself what people must see."""
    message = ""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        samples = recipe.data.batch_size // (world_size * recipe.train.accumulate)
        message = (
            f"out of memory with {samples} samples at a time in each process: "
            f"train.accumulate={2 * recipe.train.accumulate} halves them and "
            "computes the same; a smaller data.batch_size, train.precision=bf16, smaller images (data.resize) or more "
            "processes help too"
        )
    elif isinstance(error, OSError) and error.errno in DISK:
        free = f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)" if error.errno == errno.ENOSPC else ""
        message = (
            f"{error.filename or folder} can't be written: {error.strerror}{free}; the checkpoints are intact: fix "
            "this and rerun to resume"
        )
    elif "Expected more than 1 value per channel when training" in str(error):
        message = (
            "batch norm can't learn from a micro-batch of one sample: raise data.batch_size or lower train.accumulate"
        )
    if not message:
        return None
    failure = TrainingFailed(message)
    failure.on_one_rank = True
    return failure
