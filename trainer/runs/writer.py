"""Writes checkpoints in the background: training waits only while the state is copied."""

from __future__ import annotations

import shutil
import threading

from safetensors import SafetensorError

from trainer.errors import TrainingFailed
from trainer.runs.durable import flush
from trainer.runs.folder import RunFolder
from trainer.runs.state import Checkpoint


class Writer:
    """Writes a run's checkpoints in a thread, one after the other.

    Args:
        folder: the run folder.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, checkpoint: Checkpoint, best: bool) -> None:
        """Starts writing, once the previous checkpoint is written; raises the error of that one."""
        self.wait()
        # No daemon: a normal exit waits for it.
        self._thread = threading.Thread(target=self._write, args=(checkpoint, best), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises the error of the last checkpoint, if it has failed by now."""
        if (thread := self._thread) and not thread.is_alive():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the last checkpoint is written, at most for `seconds`; raises its error.

        Raises:
            TrainingFailed: it can't be written, e.g. the disk is full; older checkpoints are intact.
        """
        if thread := self._thread:
            thread.join(seconds)
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint, best: bool) -> None:
        try:
            if self.folder.metrics.exists():
                flush(self.folder.metrics)  # a checkpoint's lines are on disk before it is
            self.folder.checkpoints.save(checkpoint, self.keep, best)
        except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
            root = self.folder.checkpoints.path
            reason = getattr(error, "strerror", None) or error
            free = shutil.disk_usage(root).free / 2**20
            self._error = TrainingFailed(
                f"the checkpoint of step {checkpoint.step} can't be written to {root}: {reason} ({free:.0f} MiB free); "
                "older checkpoints are intact: free some space and rerun to resume from the newest"
            )
            self._error.on_one_rank = True
        except BaseException as error:
            self._error = error
