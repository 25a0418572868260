"""Reports errors to the other processes; turns errors of libraries and of the system into messages for users."""

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
    """Reports an error inside to the other processes, then raises it; exits here if another process caused it."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if world_size > 1 and _lost_connection(error):
            watchdog.disconnected()  # another rank failed; exits as soon as it is known which one
        watchdog.failed(error)
        raise


@contextmanager
def failures_reported(
    watchdog: Watchdog, fail: Callable[[BaseException], None], recipe: Recipe, world_size: int, folder: Path
) -> Iterator[None]:
    """Reports an error inside to the other processes and to `fail`, then raises it, as `TrainingFailed` if it is a
    known one.
    """
    try:
        with reported_to_peers(watchdog, world_size):
            yield
    except Stopped:
        watchdog.close()
        raise
    except BaseException as error:
        failure = _as_training_failure(error, recipe, world_size, folder)
        with suppress(Exception):  # the first error is the one to report
            fail(failure or error)
        if failure:
            raise failure from error
        raise
    watchdog.close()


def _lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _as_training_failure(error: BaseException, recipe: Recipe, world_size: int, folder: Path) -> TrainingFailed | None:
    """A known error of a library or of the system as a message for users; None for any other error."""
    message = ""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        samples = recipe.data.batch_size // (world_size * recipe.train.accumulate)
        message = (
            f"out of memory with {samples} samples at a time per process: "
            f"train.accumulate={2 * recipe.train.accumulate} halves this without changing the result; a smaller "
            "data.batch_size, train.precision=bf16, smaller images (data.resize) or more processes also help"
        )
    elif isinstance(error, OSError) and error.errno in DISK:
        free = f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)" if error.errno == errno.ENOSPC else ""
        message = (
            f"{error.filename or folder} can't be written: {error.strerror}{free}; the checkpoints are intact: fix "
            "this and rerun to resume"
        )
    elif "Expected more than 1 value per channel when training" in str(error):
        message = (
            "batch norm can't train on a micro-batch of one sample: raise data.batch_size or lower train.accumulate"
        )
    if not message:
        return None
    failure = TrainingFailed(message)
    failure.on_one_rank = True
    return failure
