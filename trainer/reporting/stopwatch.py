"""How long a run has trained, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """The clock of a run; it starts when it is made.

    Args:
        step: optimizer steps done.
        seconds: of training before, which `seconds` goes on from.
    """

    def __init__(self, step: int, seconds: float) -> None:
        self._lap_step, self._lap_start = step, time.monotonic()
        self._start = self._lap_start - seconds

    def seconds(self) -> float:
        """Seconds of training, with evaluations and checkpoints, over all interruptions."""
        return time.monotonic() - self._start

    def lap(self, step: int) -> float:
        """Steps per second since the last lap, without pauses; starts the next one."""
        now = time.monotonic()
        rate = (step - self._lap_step) / max(now - self._lap_start, 1e-9)
        self._lap_step, self._lap_start = step, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside doesn't count for the lap: the logged speed is that of training alone."""
        pause = time.monotonic()
        try:
            yield
        finally:
            self._lap_start += time.monotonic() - pause
