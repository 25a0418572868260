"""Measures how long and how fast a run trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """The clock of a run; starts when created.

    Args:
        step: optimizer steps completed.
        seconds: of training before this start, to which `seconds()` adds.
    """

    def __init__(self, step: int, seconds: float) -> None:
        self._lap_step, self._lap_start = step, time.monotonic()
        self._start = self._lap_start - seconds

    def seconds(self) -> float:
        """Seconds of training, including evaluations and checkpoints, accumulated over all interruptions."""
        return time.monotonic() - self._start

    def steps_per_second(self, step: int) -> float:
        """Steps per second since the last lap, excluding pauses; starts the next lap."""
        now = time.monotonic()
        rate = (step - self._lap_step) / max(now - self._lap_start, 1e-9)
        self._lap_step, self._lap_start = step, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from the lap: the logged speed is that of training alone."""
        pause = time.monotonic()
        try:
            yield
        finally:
            self._lap_start += time.monotonic() - pause
